"""fourfold: four ways to train past the limits of one device, and the advisor that picks the layout."""

__version__ = "0.1.0"
