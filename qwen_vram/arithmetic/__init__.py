"""What a model costs: integers of bytes, and predicted times. Opens no file, imports no torch."""
