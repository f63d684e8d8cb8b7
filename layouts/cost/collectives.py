"""Seconds of communication on a cluster's tiers of links.

Measured operations are used where the cluster has them; the rest is priced by the ring formulas from point-to-point
latency and bandwidth: an all-gather or reduce-scatter of n ranks moves (n-1)/n of the tensor in n-1 hops, an all-reduce
is both (Thakur et al. 2005).
"""

from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.inputs.cluster import Cluster, Link
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.software import Software

_PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True, slots=True)
class RankDistance:
    """How far apart in rank numbers the neighbours of an axis stand, a candidate."""

    tp: Column
    cp: Column
    pp: Column
    dp: Column

    @classmethod
    def of(cls, layouts: Candidates, software: Software) -> "RankDistance":
        """From the order in which the software numbers its ranks: tp, then cp, then pp and dp, either of them first."""
        one = np.ones_like(layouts.tp)
        inner = layouts.tp * layouts.cp
        pp, dp = (inner * layouts.dp, inner) if software.pp_outermost else (inner, inner * layouts.pp)
        return cls(one, layouts.tp, pp, dp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A cluster's links with the share of their bandwidth that is reached, innermost tier first."""

    cluster: Cluster
    efficiency: tuple[float, ...] = (1.0, 1.0)

    @classmethod
    def of(cls, cluster: Cluster, constants: Constants, *, reducing: bool) -> "Network":
        """The links of a cluster, with the shares of a preset's bandwidths that the constants or its own links state.

        Args:
            reducing: for gradient reduction and weight gathering, which some networks carry worse than the rest.
        """
        if cluster.measured or not cluster.links:
            return cls(cluster=cluster)
        outer = cluster.links[-1]
        reached = outer.reduction_share if reducing else outer.share
        return cls(cluster=cluster, efficiency=(constants.inner_link, reached or constants.outer_link))

    def _tier(self, index: int) -> tuple[Link, float]:
        links = self.cluster.links
        return links[min(index, len(links) - 1)], self.efficiency[min(index, len(self.efficiency) - 1)]

    def ranks_in_node(self, size: Column, stride: Column) -> Column:
        """How many of a group of `size` ranks, `stride` apart, share one node."""
        return np.clip(self.cluster.devices_per_node // stride, 1, size)

    def collective_s(self, operation: str, num_bytes: Column, size: Column, stride: Column) -> Column:
        """Seconds of a collective.

        Args:
            num_bytes: the whole tensor: input of an all-reduce or reduce-scatter, output of an all-gather; what one
                rank sends in all of an all-to-all.
            size: ranks of the group; one costs nothing.
            stride: distance between neighbours of the group, in ranks.
        A group over several nodes enters each by as many network ports as it has ranks there.
        """
        size, stride, num_bytes = np.broadcast_arrays(
            np.asarray(size), np.asarray(stride), np.asarray(num_bytes, float)
        )
        if not self.cluster.links:
            return np.zeros(size.shape)  # one device: `price` and the search refuse groups of more
        inside = self.ranks_in_node(size, stride)
        inner = self._one_tier(operation, num_bytes, size, 0, ports=np.ones_like(size))
        if len(self.cluster.links) == 1:
            return np.where(size > 1, inner, 0.0)
        outer = self._one_tier(operation, num_bytes, size, 1, ports=inside)
        return np.where(size > 1, np.where(inside >= size, inner, np.maximum(inner, outer)), 0.0)

    def _one_tier(self, operation: str, num_bytes: Column, size: Column, tier: int, *, ports: Column) -> Column:
        link, efficiency = self._tier(tier)
        passes = _PASSES[operation]
        # Rings inside a node and trees between nodes: hops grow with the logarithm for small messages.
        hops = np.minimum(size - 1, 2 * np.ceil(np.log2(np.maximum(size, 2))))
        bandwidth = link.send.bandwidth_bytes_per_s * efficiency
        seconds = passes * (link.send.latency_s * hops + (size - 1) / size * num_bytes / (bandwidth * ports))
        for measured in link.operations:
            if measured.operation == operation:
                fitted = measured.latency_s + num_bytes / (measured.bandwidth_bytes_per_s * ports)
                seconds = np.where(size == measured.group_size, fitted, seconds)
        return seconds

    def send_s(self, num_bytes: Column, size: Column, stride: Column) -> Column:
        """Seconds of one neighbour exchange on an axis of `size` ranks; the slowest boundary decides."""
        if not self.cluster.links:
            return np.zeros(np.broadcast_shapes(np.shape(num_bytes), np.shape(size)))
        inside = self.ranks_in_node(np.asarray(size), np.asarray(stride))
        inner, inner_share = self._tier(0)
        outer, outer_share = self._tier(1)
        one = inner.send.latency_s + num_bytes / (inner.send.bandwidth_bytes_per_s * inner_share)
        other = outer.send.latency_s + num_bytes / (outer.send.bandwidth_bytes_per_s * outer_share)
        return np.where(np.asarray(size) > 1, np.where(inside >= size, one, np.maximum(one, other)), 0.0)
