"""Redis: connections to every topology, the Lua functions, and every key."""
