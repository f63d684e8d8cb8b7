"""Which layouts there are, which is best, and why (Hagemann et al. 2023)."""
