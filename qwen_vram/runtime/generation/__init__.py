"""Generations by a plan: the cache, the options that change memory, and answers while they are made."""
