"""The Lua scripts of the worker, each documented in its own file."""
