"""Sequence parallelism with ring self-attention (Li et al. 2021)."""
