"""Slow truths, tiny models and comparisons that name what differs, for tests and benchmarks."""
