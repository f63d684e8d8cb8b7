"""What every cost function reads: the layouts to be priced, and the model, machine, software and constants behind them.

The figures that several cost functions need (stages, parameters a rank holds, kernels, links) are worked out once here.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.collectives import Network, RankDistance
from fourfold.layouts.cost.kernels import Kernels, kernels_of
from fourfold.layouts.cost.stages import Stages, stage_params, stages_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Software, load_software


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """One question to the cost model; all columns that follow from it have a value a layout."""

    layouts: Candidates
    model: ModelConfig
    cluster: Cluster
    software: Software
    constants: Constants

    def of(self, layouts: Candidates) -> "Pricing":
        """The same question about other layouts."""
        return replace(self, layouts=layouts)

    @property
    def uncompiled(self) -> "Pricing":
        """The same question to the same runtime without a compiler; this one where it has none, or names none such."""
        other = self.software.uncompiled
        return replace(self, software=load_software(other)) if other else self

    @cached_property
    def kernels(self) -> Kernels:
        return kernels_of(self.cluster, self.constants)

    @cached_property
    def network(self) -> Network:
        """The links as collectives and sends inside a micro-batch reach them."""
        return Network.of(self.cluster, self.constants, reducing=False)

    @cached_property
    def reduction_network(self) -> Network:
        """The links as gradient reduction and weight gathering reach them."""
        return Network.of(self.cluster, self.constants, reducing=True)

    @cached_property
    def distance(self) -> RankDistance:
        return RankDistance.of(self.layouts, self.software)

    @cached_property
    def stages(self) -> Stages:
        software = self.software
        return stages_of(
            self.model, self.layouts, overshoot=software.stages_overshoot, few_at_once=software.few_at_once
        )

    @cached_property
    def held_params(self) -> tuple[Column, Column]:
        """Parameters a rank holds of its stage before ZeRO: (all but routed experts, routed experts)."""
        return stage_params(self.model, self.layouts, self.stages)

    @cached_property
    def sharded_weights(self) -> Column:
        """Which layouts have FSDP2 shard the weights between steps, and cast what it gathers; autocast does in others.

        Without it, a layout whose replicas of an asynchronous stage share optimizer states by whole tensors.
        """
        least = 1 if self.software.gathers_below_zero3 else 3
        return (self.layouts.zero_stage >= least) & self.layouts.drains

    @cached_property
    def hidden_bytes(self) -> Column:
        """An element of the hidden states between layers."""
        software = self.software
        wide = software.residual_bytes or software.compute_bytes
        return np.where(self.sharded_weights, software.compute_bytes, wide)

    @property
    def memory_bandwidth_bytes_per_s(self) -> float:
        """What operators bound by memory reach; a profile measured it, a preset states the datasheet's."""
        reached = 1.0 if self.cluster.measured else self.constants.memory_efficiency
        return self.cluster.device.memory_bandwidth_bytes_per_s * reached
