"""Storage formats of merged weights, a piece of rows at a time."""
