"""Which tokens of a sequence each context-parallel rank holds, and tensors cut that way."""
