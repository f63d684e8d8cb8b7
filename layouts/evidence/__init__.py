"""Measured runs: read, fitted to, and held against the model."""
