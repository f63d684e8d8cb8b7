"""What a training step would cost. No torch anywhere below: importable and fast on a laptop."""

if __name__ != "fourfold.layouts":
    raise ImportError(f"import fourfold.layouts, not {__name__!r}: a second copy would make second classes")
