"""Generations by a plan: cache, options that change memory, and streamed answers."""
