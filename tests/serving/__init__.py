"""The server: its wire format, its engine, and real requests to a real process."""
