"""Attention of one block of queries to one block of keys: kernels, masks cut into blocks, and their merging."""
