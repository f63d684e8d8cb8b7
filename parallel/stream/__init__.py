"""StreamBP: exact backpropagation in sequence chunks (Luo et al. 2025)."""
