"""A run's allocations in order, and torch's caching allocator, which they are replayed through."""
