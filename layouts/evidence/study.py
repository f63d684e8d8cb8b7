"""The software and the cluster of Hagemann et al. 2023 (arXiv 2311.05610), whose runs are most of the evidence here.

What is said of them holds for them alone: how its network did, how its pipelines cut their stages and stall.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from fourfold.layouts.inputs.cluster import Cluster, load_cluster
from fourfold.layouts.inputs.constants import shipped_table
from fourfold.layouts.inputs.software import Software, load_software

STUDY = load_software("study")
KERNELS = {
    "torch": ("eager", False), "fused": ("fused", False), "flash_attentionv1.0.8": ("flash1", False),
    "flash_attention2": ("flash2", False), "flash_attention2 + rms kernel": ("flash2", True),
}  # fmt: skip
"""The kernels of its sheets: (attention, whether the norm is fused)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConstants:
    """Constants that its runs tell of its own network and software, and of nothing else."""

    sends_share: float
    """Of its outer links' datasheet bandwidth, what sends and collectives reached: near one port a node of eight."""
    reduction_share: float
    """The same of gradient reduction and weight gathering, conversions included."""
    checkpoint_stall_s: float
    """What each micro-batch waits on a stage of its pipelines where tp ranks recompute every layer: measured, not
    explained."""
    flash1_bytes: float
    """What runs with FlashAttention 1 hold besides: its work spaces, and the older software around it."""

    def software(self, kernel: str) -> Software:
        """Its software with a kernel of its sheets."""
        attention, fused_norm = KERNELS[kernel]
        return self.applied_to(replace(STUDY, attention=attention, fused_norm=fused_norm))

    def applied_to(self, software: Software) -> Software:
        """Software with the constants that are its: the stall of the study's own, the memory of FlashAttention 1's."""
        extra = self.flash1_bytes if software.attention == "flash1" else 0.0
        stall = self.checkpoint_stall_s if software.name == STUDY.name else 0.0
        return replace(software, checkpoint_stall_s=stall, extra_reserve_bytes=extra)

    def cluster(self, cluster: Cluster) -> Cluster:
        """Its cluster: a preset's devices, and an outer network that reached what it reached."""
        *inner, outer = cluster.links
        outer = replace(outer, share=self.sends_share, reduction_share=self.reduction_share)
        return replace(cluster, links=(*inner, outer))


def study_constants(table: Mapping[str, Any]) -> StudyConstants:
    return StudyConstants(**{entry.name: float(table[entry.name]) for entry in fields(StudyConstants)})


@cache
def shipped_study() -> StudyConstants:
    """As fitted to its published sweeps."""
    return study_constants(shipped_table("constants")["study"])


def study_cluster() -> Cluster:
    """A100-80GB with the network that the study had."""
    return shipped_study().cluster(load_cluster("A100-80GB"))
