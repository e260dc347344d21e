"""What every service process is made of: lifecycle, registry, settings, telemetry, bus and partition worker."""
