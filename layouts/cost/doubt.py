"""How far a step time may be off: the scatter of measured about predicted times, on runs that had no say in a fit.

The logarithm of measured over predicted is taken as normal. Its deviation has a part that every step has, and one that
grows with what the device waits in it, which differs most from cluster to cluster.
"""

import numpy as np

from fourfold.layouts.cost.candidates import Column
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


def waited_share(time: StepTime) -> Column:
    """Of the step, what the device waits: for other ranks, for its host, for the pipeline to fill."""
    return (time.exposed_communication + time.overhead + time.bubble) / time.total
