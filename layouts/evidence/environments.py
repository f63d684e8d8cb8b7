"""Software together with the network that its published runs had: what a row of measurements may have been run in."""

from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

from fourfold.layouts.evidence.study import KERNELS, STUDY, shipped_study
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.reading import number, read_toml
from fourfold.layouts.inputs.software import Software, load_software, software_names

NETWORKS = {"nanotron": ("ultrascale_h100", "H100-80GB")}
"""Software whose constants were seen on one published cluster: the file of its network, and the preset of its nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What runs a layout, and what the links of the cluster `network_of` reached."""

    software: Software
    outer: dict[str, float] = field(default_factory=dict, hash=False)
    """Fields of the outermost link."""
    network_of: str = ""

    @property
    def name(self) -> str:
        return self.software.name

    def cluster(self, cluster: Cluster) -> Cluster:
        """A row's cluster with the network that was measured, where it is one of such nodes."""
        if not self.outer or cluster.name != self.network_of or not cluster.links:
            return cluster
        *inner, outer = cluster.links
        return replace(cluster, links=(*inner, replace(outer, **self.outer)))  # type: ignore[arg-type]

    def software_for(self, kernel: str) -> Software:
        """The software with the attention kernel that a row names."""
        study = shipped_study()
        if self.name == STUDY.name:
            return study.software(kernel if kernel in KERNELS else "flash_attention2")
        return study.applied_to(replace(self.software, attention=attention_of(kernel, self.software.attention)))


def attention_of(kernel: str, default: str = "flash2") -> str:
    """The kind of attention that a row's kernel means; `default` where it names none."""
    known = {"torch": "eager", "fused": "fused", "eager": "eager", "math": "eager"}
    if kernel in known:
        return known[kernel]
    if "triton" in kernel:
        return "triton"
    if kernel.startswith("flash_attentionv1"):
        return "flash1"
    return "flash2" if kernel else default


@cache
def environment(name_or_file: str) -> Environment:
    """The environment of software by name or file. Raises ValueError as `load_software`."""
    software = load_software(name_or_file)
    file, preset = NETWORKS.get(software.name, ("", ""))
    return Environment(software=software, outer=_network(file) if file else {}, network_of=preset)


@cache
def _network(name: str) -> dict[str, float]:
    path = str(files("fourfold.layouts").joinpath(f"data/networks/{name}.toml"))
    return {key: number(value, f"{path}: {key}") for key, value in read_toml(path, "it is shipped")["outer"].items()}


def environments(device_type: str) -> list[Environment]:
    """Every shipped software that runs on such devices."""
    on_cpu, only_stated = {"fourfold-cpu"}, {"fourfold-bf16-compiled"}  # whose constants follow from others'
    names = [name for name in software_names() if (name in on_cpu) == (device_type == "cpu")]
    names = [name for name in names if name not in only_stated]
    return [environment(name) for name in names]
