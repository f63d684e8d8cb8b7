"""Turns a layout into running processes: the command line, torchrun, the training loop, checkpoints."""

if __name__ != "fourfold.launch":
    raise ImportError(f"import fourfold.launch, not {__name__!r}: a second copy would make second classes")
