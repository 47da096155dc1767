"""Tools around the library, each usable from Python and from the command line."""
