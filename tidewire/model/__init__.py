"""Values that travel between processes, and rules about them. No I/O."""
