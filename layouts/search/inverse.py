"""The search turned round: how long a sequence, how large a model, how few devices, given all the rest.

Each question is answered by whole searches at a few sizes: what fits at a length fits at a shorter one, and what fits
of a model fits of a smaller one, so doubling and halving find the limit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fourfold.layouts.cost.price import PricedLayout
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.reading import MOST
from fourfold.layouts.inputs.software import Software
from fourfold.layouts.search.rank import Plan, rank_layouts
from fourfold.layouts.search.request import SearchRequest

Answer = TypeVar("Answer")
LOOKED_AT = 64
"""Layouts of a search whose need of host memory is looked at, fastest first."""
SHORTEST = 256
"""Tokens: a length below it is no answer to how long."""
FINENESS = 16
"""Steps to a doubling in which a limit is found."""
SECONDS_A_DAY = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Host memory for each device, into which checkpointed layer inputs may move. 0 bytes: none is offloaded."""

    bytes_per_device: float = 0.0


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest sequence that fits, in its fastest layout."""

    seq_len: int
    priced: PricedLayout
    host_bytes: float
    """What the layout keeps in host memory a device."""


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest model of some proportions that fits, in its fastest layout."""

    model: ModelConfig
    priced: PricedLayout


@dataclass(frozen=True, slots=True)
class Offer:
    """Some devices of a cluster, and what training on them takes and costs."""

    cluster: Cluster
    num_devices: int
    priced: PricedLayout
    days: float
    price: float


def longest(
    model: ModelConfig, cluster: Cluster, request: SearchRequest, *, host: Host, software: Software | None = None
) -> Longest:
    """The longest sequence whose step fits (P(fits) of at least 0.5).

    Args:
        request: its seq_len is not read.
        host: memory for what is offloaded.
    Raises:
        ValueError: not even SHORTEST tokens fit; offloading that is asked for without host memory.
    Cost: some 20 searches.
    """
    if request.fix.get("offload") and not host.bytes_per_device:
        raise ValueError("offload=true without host memory: say how much a device has (--host-gib), or leave it out")
    kinds = (False, True) if host.bytes_per_device else (False,)

    def answer(size: int) -> Longest | None:
        return next(filter(None, map(at_length, _lengths(size, request.num_devices))), None)

    def at_length(seq_len: int) -> Longest | None:
        # What offloads is looked for where nothing else fits: it is no faster.
        for offload in kinds if "offload" not in request.fix else (request.fix["offload"],):
            asked = replace(request, seq_len=seq_len, fix={**request.fix, "offload": offload})
            result = _searched(model, cluster, asked, software)
            if result is None:
                continue
            for priced in result.layouts:
                if priced.host_bytes <= host.bytes_per_device:
                    return Longest(seq_len, priced, priced.host_bytes)
        return None

    most = model.learned_positions or MOST
    # Some hundred devices, of which no part cuts SHORTEST tokens, may cut a longer sequence.
    leasts = dict.fromkeys((SHORTEST, math.lcm(SHORTEST, 2 * request.num_devices)))
    found = next(filter(None, (_limit(answer, least, most) for least in leasts if least <= most)), None)
    if found is None:
        rank_layouts(model, cluster, replace(request, seq_len=SHORTEST), top=1, software=software)  # or why not
        raise ValueError(
            f"not even a sequence of {SHORTEST} tokens fits on {request.num_devices} devices: give more of them, a "
            "smaller model, or on CUDA precision=bf16, which halves what a parameter takes"
        )
    return found


def largest(
    model: ModelConfig, cluster: Cluster, request: SearchRequest, *, software: Software | None = None
) -> Largest:
    """The largest model of the proportions of `model` that fits: depth and width grow alike, heads stay as wide.

    Raises:
        ValueError: not even a model of one layer fits.
    Cost: some 20 searches.
    """

    def answer(size: int) -> Largest | None:
        grown = scaled_model(model, size / FINENESS)
        result = _searched(grown, cluster, request, software)
        return Largest(grown, result.layouts[0]) if result is not None else None

    found = _limit(answer, 1, 64 * FINENESS)
    if found is None:
        rank_layouts(scaled_model(model, 1 / FINENESS), cluster, request, top=1, software=software)  # or why not
        raise ValueError(
            f"not even a sixteenth of {model.name} fits on {request.num_devices} devices at {request.seq_len} tokens: "
            "give more of them, or a shorter sequence"
        )
    return found


def scaled_model(model: ModelConfig, factor: float) -> ModelConfig:
    """A model `factor` times as deep and as wide; heads come in whole groups, the feed-forward in steps of 128."""
    groups = max(1, round(model.num_kv_heads * factor)) if model.num_kv_heads < model.num_heads else 0
    share = model.num_heads // model.num_kv_heads
    heads = groups * share or max(1, round(model.num_heads * factor))
    layers = max(1, round(model.num_layers * factor))
    hidden = max(1, round(model.hidden_size / model.num_heads)) * heads

    def width(size: int) -> int:
        return max(128, round(size * hidden / model.hidden_size / 128) * 128) if size else 0

    def some(count: int) -> int:
        return min(layers, round(count * layers / model.num_layers))

    return replace(
        model, name=f"{model.name} x {factor:.3g}", num_layers=layers, num_heads=heads, num_kv_heads=groups or heads,
        hidden_size=hidden, ffn_size=width(model.ffn_size), expert_ffn_size=width(model.expert_ffn_size),
        shared_expert_ffn_size=width(model.shared_expert_ffn_size), num_moe_layers=some(model.num_moe_layers),
        num_windowed_layers=some(model.num_windowed_layers), num_linear_layers=some(model.num_linear_layers),
    )  # fmt: skip


def cheapest(
    model: ModelConfig,
    prices: Sequence[tuple[Cluster, float]],
    request: SearchRequest,
    *,
    num_tokens: float,
    days: float,
    software: Software | None = None,
) -> list[Offer]:
    """What training on `num_tokens` costs, for counts of devices that double and the request's own, cheapest first.

    Args:
        prices: (cluster, price of a device an hour).
        days: offers that take longer are left out.
    Raises:
        ValueError: no offer is in time; names the quickest.
    Cost: a search a cluster and count.
    """
    offers: list[Offer] = []
    for cluster, hourly in prices:
        # A cluster that was measured on one device has no link to price more of them with.
        most = request.num_devices if cluster.links else 1
        for count in sorted({*(1 << power for power in range(most.bit_length())), most}):
            result = _searched(model, cluster, replace(request, num_devices=count), software, top=1)
            if result is not None:
                priced = result.layouts[0]
                taken = num_tokens / priced.tokens_per_s / SECONDS_A_DAY
                offers.append(Offer(cluster, count, priced, taken, taken * 24 * count * hourly))
    in_time = [offer for offer in offers if offer.days <= days]
    if not in_time:
        quickest = min(offers, key=lambda offer: offer.days, default=None)
        told = "nothing fits" if quickest is None else (
            f"the quickest, {quickest.num_devices} x {quickest.cluster.name}, takes {quickest.days:.3g}"
        )  # fmt: skip
        raise ValueError(f"no offer is done in {days:g} days ({told}): allow more days, devices or a larger batch")
    return sorted(in_time, key=lambda offer: offer.price)


def _searched(
    model: ModelConfig, cluster: Cluster, request: SearchRequest, software: Software | None, *, top: int = LOOKED_AT
) -> Plan | None:
    """A search's plan; None where nothing fits, or nothing can be cut so."""
    cluster.check_links(request.num_devices)
    try:
        result = rank_layouts(model, cluster, request, top=top, software=software)
    except ValueError:
        return None
    return result if result.layouts else None


def _lengths(size: int, num_devices: int) -> list[int]:
    """Lengths of at most `size` to try, the longest first.

    Multiples of SHORTEST, and such as a ring of all devices can cut into its two pieces a device: of three or seven
    devices no power of two is one.
    """
    pieces = 2 * num_devices
    steps = (SHORTEST, math.lcm(SHORTEST, pieces), pieces)
    # One step alone where it is a multiple of the others; the last where no common multiple is as short.
    lengths = {size // step * step for step in steps[:2]} | ({size // pieces * pieces} if size < steps[1] else set())
    return sorted(lengths - {0}, reverse=True)


def _limit(answer: Callable[[int], Answer | None], least: int, most: int) -> Answer | None:
    """The answer at the largest size that has one, to a sixteenth of a doubling; None where `least` has none."""
    best, low = answer(least), least
    if best is None:
        return None
    high = low
    while high < most:
        high = min(high * 2, most)
        found = answer(high)
        if found is None:
            break
        best, low = found, high
    # Between the last that fits and the first that does not.
    while high - low > max(1, low // FINENESS):
        middle = (low + high) // 2
        found = answer(middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
    return best


def parse_prices(words: Sequence[str]) -> dict[str, float]:
    """["H100-80GB=2.5"] as {"H100-80GB": 2.5}: of a device an hour, in any currency.

    Raises:
        ValueError: not NAME=NUMBER, or no number above 0.
    """
    prices: dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not name or not 0 < value < 1e12:
            raise ValueError(f"--price {word}: write it as CLUSTER=PRICE, the price of a device an hour above 0")
        prices[name] = value
    return prices
