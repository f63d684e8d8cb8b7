"""A cluster as the planner sees it: one kind of device, and tiers of links from the inside out.

Read from `cluster.toml` (what `layout-advisor profile` measured, samples kept) or from a preset (datasheet figures,
each with its source). Every device of a cluster is the same; a file that lists several kinds is refused.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fourfold.layouts.inputs.reading import MOST_DEVICES, finite, number, read_toml, shortened, shown, whole

OPERATIONS = ("send", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SCHEMA = 1
_SHAPE = ("tp", "micro_batch", "seq_len")
MODEL_COLUMNS: dict[str, tuple[str, ...]] = {
    "layer": _SHAPE, "ends": _SHAPE, "optimizer": ("parameters", "step_s", "clip_s"),
    "tp_layer": (*_SHAPE, "forward_s", "backward_s"), "tp_ends": _SHAPE,
    "cp_layer": ("cp", "micro_batch", "seq_len", "forward_s", "backward_s"),
}  # fmt: skip
"""What each row of a real model's timings must have."""
MODEL_TABLES = tuple(MODEL_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulSample:
    """seconds of out[m,n] = a[m,k] @ b[k,n]."""

    dtype: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSample:
    """Seconds of one attention block, forward and backward, on [batch, heads, seq_len, head_dim]."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    causal: bool
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ElementwiseSample:
    """Seconds of one elementwise operator that reads and writes `bytes` in all."""

    dtype: str
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkOperation:
    """A fitted communication operation: seconds = latency_s + bytes / bandwidth_bytes_per_s.

    `bytes` is the message of a send, and the whole (unsharded) tensor of a collective.
    """

    operation: str
    group_size: int
    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One tier; `num_ranks` neighbours reach each other over it (0: any number)."""

    name: str
    num_ranks: int
    operations: tuple[LinkOperation, ...]
    samples: tuple[Mapping[str, Any], ...] = ()
    share: float = 0.0
    """Of the stated bandwidth, what this cluster's sends and collectives reached; 0 where nobody measured it."""
    reduction_share: float = 0.0
    """The same of gradient reduction and weight gathering."""
    pipelined_share: float = 1.0
    """Of `share`, what collectives over several nodes reach in the stages of a pipeline."""
    pipelined_layer_s: float = 0.0
    """What it takes longer to issue a layer, each doubling of tp, in a pipeline over several nodes: measured, not
    explained."""

    def find(self, operation: str, group_size: int) -> LinkOperation | None:
        """The measured operation of the nearest group size, or None where it was not measured."""
        found = [op for op in self.operations if op.operation == operation]
        return min(found, key=lambda op: abs(op.group_size - group_size), default=None)

    @property
    def send(self) -> LinkOperation:
        """Point to point: what collectives that were not measured are priced from."""
        found = self.find("send", 2)
        assert found is not None  # checked when the cluster was read
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator, or one rank's share of a host's processors."""

    name: str
    type: str
    dtype: str
    memory_bytes: float
    peak_flops_per_s: float
    memory_bandwidth_bytes_per_s: float
    operator_overhead_s: float
    host_bytes_per_s: float = 20e9
    """To and from pinned host memory, one way: of the 31.5 GB/s of PCIe 4.0 x16, what copies commonly reach."""
    reserve_bytes: float | None = None
    """Of memory_bytes, what lies outside the framework's allocator; None: not measured."""

    @property
    def itemsize(self) -> int:
        """Bytes an element of the compute dtype."""
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and links; `measured` where matmul samples came along."""

    name: str
    provenance: str
    num_devices: int
    """Ranks measured together; 0 for a preset, which has as many as asked for."""
    devices_per_node: int
    device: Device
    links: tuple[Link, ...]
    matmul: tuple[MatmulSample, ...] = field(default=(), repr=False)
    attention: tuple[AttentionSample, ...] = field(default=(), repr=False)
    elementwise: tuple[ElementwiseSample, ...] = field(default=(), repr=False)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False, hash=False)
    """MODEL_TABLES: a real model's timings, where `profile --model` took them."""

    @property
    def measured(self) -> bool:
        return bool(self.matmul)

    def check_links(self, num_devices: int) -> None:
        """Refuse several devices where none could be measured together. Raises ValueError with the mend."""
        if num_devices > 1 and not self.links:
            raise ValueError(
                f"{self.name} was measured on one device and has no link to price {num_devices} with: "
                "give --gpus 1, or measure again with `layout-advisor profile --ranks 2`"
            )

    def with_devices_per_node(self, count: int) -> "Cluster":
        """The same devices in nodes of another size; the innermost tier spans a node."""
        whole(count, "gpus per node", most=MOST_DEVICES)
        if not self.links:
            return replace(self, devices_per_node=count)
        inner = replace(self.links[0], num_ranks=count)
        return replace(self, devices_per_node=count, links=(inner, *self.links[1:]))


@cache
def cluster_presets() -> dict[str, dict[str, Any]]:
    """name -> the preset's table, as shipped in data/clusters.toml."""
    return tomllib.loads(files("fourfold.layouts").joinpath("data/clusters.toml").read_text(encoding="utf-8"))


def load_cluster(path_or_preset: str | Path) -> Cluster:
    """A measured cluster.toml, or a preset by name.

    Raises:
        ValueError: no such file or preset; broken TOML; a missing, senseless or heterogeneous field.
    """
    name = str(path_or_preset)
    presets = cluster_presets()
    by_name = {key.lower(): key for key in presets}
    if name.lower() in by_name:
        return _preset(by_name[name.lower()])
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"{shortened(name)}: neither a cluster.toml nor a preset; the presets are {', '.join(presets)}"
        )
    return read_cluster(read_toml(path, "write it with `layout-advisor profile`"), title=str(path))


def preset_for_gpu(gpu_type: str) -> str:
    """The preset that a GPU's printed type means: "A100-80GB-SXM" is "A100-80GB".

    Every part of the preset's name must be among the type's parts; a type without a size means the largest.

    Raises:
        ValueError: no preset is meant.
    """
    parts = set(gpu_type.lower().replace("_", "-").replace(" ", "-").split("-"))
    presets = list(cluster_presets())
    fits = [key for key in presets if set(key.lower().split("-")) <= parts]
    if not fits and not any(part.endswith("gb") for part in parts):
        fits = [key for key in presets if key.lower().split("-")[0] in parts][-1:]
    if not fits:
        raise ValueError(f"gpu_type={gpu_type!r}: no preset of that name; there are {', '.join(presets)}")
    return max(fits, key=len)


def read_cluster(table: Mapping[str, Any], *, title: str) -> Cluster:
    """A cluster from cluster.toml's table (schema 1)."""
    if table.get("schema") != SCHEMA:
        raise ValueError(
            f"{title}: schema={shown(table.get('schema'))}, but this reads {SCHEMA}: "
            "measure again with `layout-advisor profile`"
        )
    device = table.get("device")
    if isinstance(device, list):
        raise ValueError(
            f"{title}: {len(device)} kinds of device, but every rank must be the same: plan each kind alone"
        )
    links = tuple(
        _read_link(entry, f"{title}: [[link]] {index}") for index, entry in enumerate(_tables(table, "link", title))
    )
    return _checked(
        Cluster(
            name=str(table.get("name", title)),
            provenance=str(table.get("provenance", "not stated")),
            num_devices=_whole(table, "num_devices", title),
            devices_per_node=_whole(table, "devices_per_node", title),
            device=_read_device(device, title),
            links=links,
            matmul=_samples(MatmulSample, table, "matmul", title),
            attention=_samples(AttentionSample, table, "attention", title),
            elementwise=_samples(ElementwiseSample, table, "elementwise", title),
            tables={key: _model_table(table, key, title) for key in MODEL_TABLES},
        ),
        title,
    )


@cache
def _preset(name: str) -> Cluster:
    table = cluster_presets()[name]
    links = tuple(
        Link(
            name=link["name"],
            num_ranks=link["num_ranks"],
            operations=(
                LinkOperation(
                    operation="send",
                    group_size=2,
                    latency_s=link["latency_s"],
                    bandwidth_bytes_per_s=link["bandwidth_bytes_per_s"],
                ),
            ),
        )
        for link in table["link"]
    )
    return _checked(
        Cluster(
            name=name,
            provenance=table["source"],
            num_devices=0,
            devices_per_node=table["devices_per_node"],
            device=_read_device(table["device"], name),
            links=links,
        ),
        name,
    )


def _read_device(table: Any, title: str) -> Device:
    if not isinstance(table, Mapping):
        raise ValueError(f"{title}: no [device] table: measure again with `layout-advisor profile`")
    dtype = table.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"{title}: [device] dtype={shown(dtype)}, but it is one of {', '.join(ITEMSIZE)}")
    if table.get("type") not in ("cpu", "cuda"):
        raise ValueError(f"{title}: [device] type={shown(table.get('type'))}, but it is 'cpu' or 'cuda'")
    where = f"{title}: [device]"
    return Device(
        name=str(table.get("name", "unnamed")),
        type=table["type"],
        dtype=dtype,
        memory_bytes=_positive(table, "memory_bytes", where),
        peak_flops_per_s=_positive(table, "peak_flops_per_s", where),
        memory_bandwidth_bytes_per_s=_positive(table, "memory_bandwidth_bytes_per_s", where),
        operator_overhead_s=_positive(table, "operator_overhead_s", where),
        reserve_bytes=_positive(table, "reserve_bytes", where, zero=True) if "reserve_bytes" in table else None,
    )


def _read_link(table: Mapping[str, Any], where: str) -> Link:
    operations = []
    for entry in _tables(table, "operation", where):
        operation = entry.get("operation")
        if operation not in OPERATIONS:
            raise ValueError(f"{where}: operation={shown(operation)}, but it is one of {', '.join(OPERATIONS)}")
        operations.append(
            LinkOperation(
                operation=operation,
                group_size=_whole(entry, "group_size", where),
                latency_s=_positive(entry, "latency_s", where, zero=True),
                bandwidth_bytes_per_s=_positive(entry, "bandwidth_bytes_per_s", where),
            )
        )
    return Link(
        name=str(table.get("name", "link")),
        num_ranks=_whole(table, "num_ranks", where, least=0),
        operations=tuple(operations),
        samples=tuple(_tables(table, "sample", where)),
    )


def _checked(cluster: Cluster, title: str) -> Cluster:
    if cluster.device.memory_bytes < 1 << 20:
        raise ValueError(f"{title}: memory_bytes={cluster.device.memory_bytes:.0f}: no free memory to train in")
    for link in cluster.links:
        if link.find("send", 2) is None:
            raise ValueError(f"{title}: link {link.name!r} has no 'send' operation: measure again with `profile`")
    return cluster


def _samples(kind: type[Any], table: Mapping[str, Any], key: str, title: str) -> tuple[Any, ...]:
    """Entries of a table as samples, each field checked by its annotation."""
    samples = []
    for index, entry in enumerate(_tables(table, key, title)):
        where = f"{title}: [[{key}]] {index}"
        missing = sorted(set(kind.__dataclass_fields__) - set(entry))
        if missing:
            raise ValueError(f"{where} has no {missing[0]!r}: measure again with `profile`")
        samples.append(
            kind(**{name: _field(entry, name, field.type, where) for name, field in kind.__dataclass_fields__.items()})
        )
    return tuple(samples)


def _field(entry: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    value = entry[name]
    if kind is int:
        return _whole(entry, name, where)
    if kind is float:
        return _positive(entry, name, where)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name}={shown(value)}, but it is a {kind.__name__}")
    return value


def _model_table(table: Mapping[str, Any], key: str, title: str) -> tuple[Mapping[str, Any], ...]:
    """Rows of one of MODEL_TABLES: counts are whole, seconds above 0, and nothing else is nan or infinite."""
    rows = tuple(_tables(table, key, title))
    for index, row in enumerate(rows):
        where = f"{title}: [[{key}]] {index}"
        finite(row, where)
        for name in (*MODEL_COLUMNS[key], *(name for name in row if name.endswith("_s"))):
            _positive(row, name, where) if name.endswith("_s") else _whole(row, name, where)
        if not isinstance(row.get("dtype", ""), str):
            raise ValueError(f"{where}: dtype={shown(row['dtype'])}, but it is a word")
        for name in ("sequence_parallel", "compiled"):
            if not isinstance(row.get(name, False), bool):
                raise ValueError(f"{where}: {name}={shown(row[name])}, but it is true or false")
        number(row.get("activation_bytes", 0), f"{where}: activation_bytes", zero=True)
    return rows


def _tables(table: Mapping[str, Any], key: str, where: str) -> Sequence[Mapping[str, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"{where}: {key!r} is not a list of tables: write it as [[{key}]]")
    return value


def _whole(table: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> int:
    return whole(table.get(key), f"{where}: {key}", least=least)


def _positive(table: Mapping[str, Any], key: str, where: str, *, zero: bool = False) -> float:
    return number(table.get(key), f"{where}: {key}", zero=zero)
