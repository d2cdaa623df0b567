"""The C sources, the library that gcc makes of them on first use, and its functions with checked
arguments.

It may import nothing else of the engine. Begin with native_library.py, which compiles and loads;
the others call.
"""
