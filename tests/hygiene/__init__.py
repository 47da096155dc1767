"""Rules that the text of the repository follows; no torch is imported."""
