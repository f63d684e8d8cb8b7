"""Seconds of the three kinds of work on one device: matmuls, attention, and operators bound by memory.

Efficiency is a function of shape, never one constant. A measured cluster answers from its samples (nearby shapes,
weighted by distance in log2); a preset from a saturating curve whose few constants were fitted on published runs.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fourfold.layouts.cost.candidates import Column
from fourfold.layouts.inputs.cluster import AttentionSample, Cluster, Device
from fourfold.layouts.inputs.constants import Constants


class Kernels(Protocol):
    """What a layer's price is made of."""

    def matmul_s(self, m: Column, n: Column, k: Column) -> Column:
        """Seconds of out[m,n] = a[m,k] @ b[k,n]."""
        ...

    def attention_s(
        self, batch: Column, heads: Column, q_len: Column, kv_len: Column, block: Column, head_dim: int
    ) -> tuple[Column, Column]:
        """Seconds (forward, backward) of attention that computes q_len x kv_len scores a head, nothing masked.

        `block` is how many of the kv_len keys one call sees.
        """
        ...

    def memory_s(self, num_bytes: Column, num_operators: float) -> Column:
        """Seconds of `num_operators` operators that read and write `num_bytes` together."""
        ...


@dataclass(frozen=True, slots=True)
class CurveKernels:
    """A preset's kernels: peak x saturating curves of the shape."""

    device: Device
    constants: Constants

    def matmul_s(self, m: Column, n: Column, k: Column) -> Column:
        k_ = self.constants
        flops = 2.0 * m * n * k
        # Each dim fills tiles and pipelines in its own measure: half of the loss is gone at `matmul_half`.
        loss = 1.0 + k_.matmul_half * (1.0 / m + 1.0 / n + 1.0 / k)
        compute = flops * loss / (self.device.peak_flops_per_s * k_.matmul_peak(self.device.name))
        traffic = self.device.itemsize * (1.0 * m * k + 1.0 * k * n + 1.0 * m * n)
        return np.maximum(compute, traffic / self._bandwidth) + k_.kernel_gap_s

    def attention_s(
        self, batch: Column, heads: Column, q_len: Column, kv_len: Column, block: Column, head_dim: int
    ) -> tuple[Column, Column]:
        k_ = self.constants
        flops = 4.0 * batch * heads * q_len * kv_len * head_dim
        rate = self.device.peak_flops_per_s * k_.matmul_peak(self.device.name) * min(1.0, head_dim / 128) ** 0.2
        loss = 1.0 + k_.attention_half / np.asarray(block, float)
        forward = flops * loss / (rate * k_.attention_forward)
        return forward + k_.kernel_gap_s, 2.5 * flops * loss / (rate * k_.attention_backward) + k_.kernel_gap_s

    def memory_s(self, num_bytes: Column, num_operators: float) -> Column:
        return num_bytes / self._bandwidth + num_operators * self.constants.kernel_gap_s

    @property
    def _bandwidth(self) -> float:
        return self.device.memory_bandwidth_bytes_per_s * self.constants.memory_efficiency


@dataclass(frozen=True, slots=True)
class MeasuredKernels:
    """A profiled cluster's kernels: rates from nearby samples, in the training dtype."""

    cluster: Cluster

    def matmul_s(self, m: Column, n: Column, k: Column) -> Column:
        device = self.cluster.device
        samples = [s for s in self.cluster.matmul if s.dtype == device.dtype] or list(self.cluster.matmul)
        flops = 2.0 * m * n * k
        overhead = device.operator_overhead_s
        shapes = np.array([(s.m, s.n, s.k) for s in samples], float)
        rates = np.array([2.0 * s.m * s.n * s.k / max(s.seconds - overhead, 0.1 * s.seconds) for s in samples])
        return flops / _nearby(np.stack(np.broadcast_arrays(m, n, k)), shapes, rates) + overhead

    def attention_s(
        self, batch: Column, heads: Column, q_len: Column, kv_len: Column, block: Column, head_dim: int
    ) -> tuple[Column, Column]:
        device = self.cluster.device
        samples = [s for s in self.cluster.attention if s.dtype == device.dtype] or list(self.cluster.attention)
        flops = 4.0 * batch * heads * q_len * kv_len * head_dim
        if not samples:
            rate = 0.5 * device.peak_flops_per_s
            return flops / rate, 2.5 * flops / rate
        shapes = np.array([(s.batch * s.heads, s.seq_len, s.head_dim) for s in samples], float)
        wanted = np.stack(np.broadcast_arrays(batch * heads, np.sqrt(2.0 * q_len * kv_len), head_dim))
        forward = flops / _nearby(wanted, shapes, np.array([_attention_flops(s) / s.forward_s for s in samples]))
        return forward, flops / _nearby(wanted, shapes, np.array([_attention_flops(s) / s.backward_s for s in samples]))

    def memory_s(self, num_bytes: Column, num_operators: float) -> Column:
        device = self.cluster.device
        each = np.asarray(num_bytes, float) / max(num_operators, 1.0)
        bandwidth: Column | float = device.memory_bandwidth_bytes_per_s
        if self.cluster.elementwise:
            samples = sorted(self.cluster.elementwise, key=lambda s: s.bytes)
            sizes = np.log([s.bytes for s in samples])
            rates = [s.bytes / max(s.seconds - device.operator_overhead_s, 0.1 * s.seconds) for s in samples]
            # At least a byte a second: nothing real is slower, and a step stays a number.
            bandwidth = np.exp(np.interp(np.log(np.maximum(each, 1.0)), sizes, np.log(np.maximum(rates, 1.0))))
        return num_operators * (device.operator_overhead_s + each / bandwidth)


def kernels_of(cluster: Cluster, constants: Constants) -> Kernels:
    return MeasuredKernels(cluster) if cluster.measured else CurveKernels(cluster.device, constants)


def _attention_flops(sample: AttentionSample) -> float:
    """FLOPs that the scores of a sample need: half of them with a causal mask."""
    full = 4.0 * sample.batch * sample.heads * sample.seq_len**2 * sample.head_dim
    return full / 2 if sample.causal else full


def _nearby(wanted: Column, shapes: Column, rates: Column) -> Column:
    """Rates at `wanted` [3, ...]: the samples' log rates, weighted by the inverse fourth power of log2 distance."""
    flat = np.log2(wanted.reshape(3, -1)).T
    unique, inverse = np.unique(flat, axis=0, return_inverse=True)
    squared = ((unique[:, None, :] - np.log2(shapes)[None]) ** 2).sum(-1)
    weights = 1.0 / (squared + 1e-3) ** 2
    log_rates = (weights * np.log(rates)).sum(1) / weights.sum(1)
    return np.exp(log_rates)[inverse.reshape(-1)].reshape(wanted.shape[1:])
