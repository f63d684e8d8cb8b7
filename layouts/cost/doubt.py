"""How far a step time may be off: the scatter of measured about predicted times, on runs that had no say in a fit.

The logarithm of measured over predicted is taken as normal. Its deviation has a part that every step has, and one that
grows with what the device waits in it, which differs most from cluster to cluster.
"""

from statistics import NormalDist

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import StepTime

TENTH = 1.2816
"""Standard deviations from the middle of a normal distribution to its 10% and 90% points."""
UNSEEN = 2.0
"""How many times as wide the scatter is taken on devices that the software's runs were not on."""


def time_deviation(pricing: Pricing, time: StepTime) -> Column:
    """Standard deviation of the logarithm of the step time, a candidate."""
    software, device = pricing.software, pricing.cluster.device
    own = software.time_spread * (1.0 if software.seen_on(device.name) else UNSEEN)
    return np.hypot(own, software.network_spread * waited_share(time))


def step_interval(pricing: Pricing, time: StepTime) -> tuple[Column, Column]:
    """(low, high): one step in ten is quicker than the first, and one in ten slower than the second.

    Where a part of a software's pipelined runs stalled, the step is one of two: the low end is the quick one's, the
    high end the other's, each at the point that leaves a tenth of all beyond it.
    """
    deviation, step = time_deviation(pricing, time), time.total
    low, high = step * np.exp(-TENTH * deviation), step * np.exp(TENTH * deviation)
    chance = pricing.software.stall_chance
    if not pricing.software.stall_s or not 0.1 < chance < 0.9:
        return low, high
    waits = pricing.software.stall_s * num_exchanges(pricing.layouts)
    quick, stalled = (NormalDist().inv_cdf(0.1 / share) for share in (1 - chance, chance))
    return (
        np.where(waits > 0, step * np.exp(quick * deviation), low),
        np.where(waits > 0, np.maximum((step + waits) * np.exp(-stalled * deviation), step), high),
    )


def num_exchanges(layouts: Candidates) -> Column:
    """Exchanges of a stage with its neighbours in a step: with one at the ends, with two between."""
    return layouts.num_micro_batches * np.minimum(layouts.pp - 1, 2)


def waited_share(time: StepTime) -> Column:
    """Of the step, what the device waits: for other ranks, for its host, for the pipeline to fill."""
    return (time.exposed_communication + time.launch + time.overhead + time.bubble) / time.total
