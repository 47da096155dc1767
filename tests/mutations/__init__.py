"""Faults that the tests must find: one in each mechanism, put into a copy of the code. See `mutations`."""
