"""Ranked layouts as tables, a report, and the files that launch them."""
