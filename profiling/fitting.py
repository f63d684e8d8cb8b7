"""Latency and bandwidth from timed messages, and medians with their spread."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median, quantiles

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


def fit_latency_bandwidth(sizes_bytes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit seconds = latency + bytes / bandwidth by the least sum of absolute relative errors.

    Relative, because sizes span five decades and the small messages carry the latency; absolute and not squared,
    because one disturbed sample must not move the line. Such a line passes through two of the samples, or through one
    with latency 0, so trying each is exact.

    Args:
        sizes_bytes: message sizes, at least one above 0.
        seconds: their times, above 0.
    Returns:
        (latency in s, at least 0; bandwidth in bytes/s, above 0 and finite).
    Raises:
        ValueError: no sample with bytes, a time not above 0, or sizes and times of unequal number.
    Cost: O(n^3) for n samples.
    """
    points = list(zip(sizes_bytes, seconds, strict=True))
    if any(time <= 0 for _, time in points) or not any(size > 0 for size, _ in points):
        raise ValueError(f"cannot fit a line through {points}: needs times above 0 and one size above 0")
    candidates = [(0.0, size / time) for size, time in points if size > 0]
    for (size, time), (other_size, other_time) in combinations(points, 2):
        if (other_size - size) * (other_time - time) > 0:
            bandwidth = (other_size - size) / (other_time - time)
            candidates.append((time - size / bandwidth, bandwidth))

    def error(line: tuple[float, float]) -> float:
        return sum(abs(line[0] + size / line[1] - time) / time for size, time in points)

    return min((line for line in candidates if line[0] >= 0), key=error)


def spread(samples: Sequence[float]) -> float:
    """(80th - 20th percentile) / median: how far a repetition may lie from the figure; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    fifths = quantiles(samples, n=5, method="inclusive")
    return (fifths[3] - fifths[0]) / median(samples)
