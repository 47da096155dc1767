"""Storage formats of merged weights, encoded some rows at a time."""
