"""Linear layers by storage format, and products of few rows."""
