"""Candidate profiles, least lossy first, and the search for the one to load."""
