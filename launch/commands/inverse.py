"""`layout-advisor longest`, `largest` and `cheapest`: how long, how large, how many."""

import json
from dataclasses import replace
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fourfold.launch.commands.explain import ClusterName, Config, GlobalBatch, GpusPerNode, SeqLen, SoftwareName, Space
from fourfold.launch.commands.plan import cluster_in_nodes, parse_fix
from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.inputs.cluster import Cluster, load_cluster
from fourfold.layouts.inputs.model import human_count, load_model
from fourfold.layouts.inputs.reading import number
from fourfold.layouts.inputs.software import Software, load_software
from fourfold.layouts.output.tables import describe, seconds_text
from fourfold.layouts.search.inverse import Host, parse_prices
from fourfold.layouts.search.inverse import cheapest as find_cheapest
from fourfold.layouts.search.inverse import largest as find_largest
from fourfold.layouts.search.inverse import longest as find_longest
from fourfold.layouts.search.request import SearchRequest

Gpus = Annotated[int, typer.Option(help="Devices in all.")]
Fix = Annotated[list[str] | None, typer.Option(help="Hold a field, as tp=8 or checkpointing=none; repeat.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")]


def longest(
    config: Config,
    cluster: ClusterName,
    gpus: Gpus,
    global_batch: GlobalBatch = 1,
    space: Space = "runtime",
    fix: Fix = None,
    host_gib: Annotated[
        float, typer.Option(help="Host memory a device for checkpointed layer inputs, GiB; 0: none are offloaded.")
    ] = 0.0,
    pcie: Annotated[float, typer.Option(help="GB/s to host memory, one way; 0: as the cluster says.")] = 0.0,
    gpus_per_node: GpusPerNode = 0,
    software: SoftwareName = "",
    as_json: Json = False,
) -> None:
    """Tell the longest sequence that MODEL can be trained on, and how long its step takes."""
    machine = _with_host(cluster_in_nodes(cluster, gpus, gpus_per_node), pcie)
    request = SearchRequest(
        num_devices=gpus, global_batch=global_batch, seq_len=1, space=space, fix=parse_fix(fix or [])
    )
    host = Host(bytes_per_device=number(host_gib, "--host-gib", zero=True, most=1e9) * GIB)
    if pcie and not host_gib:
        raise ValueError(f"--pcie {pcie:g} without --host-gib: nothing is offloaded; give the host memory a device has")
    found = find_longest(load_model(config), machine, request, host=host, software=_software(software))
    if as_json:
        typer.echo(json.dumps({"seq_len": found.seq_len, "host_gib": found.host_bytes / GIB} | describe(found.priced)))
        return
    held = f", {found.host_bytes / GIB:.3g} GiB of host memory a device" if found.host_bytes else ""
    _say(f"{found.seq_len:,} tokens a sequence{held}", found.priced)


def largest(
    config: Config,
    cluster: ClusterName,
    gpus: Gpus,
    seq_len: SeqLen,
    global_batch: GlobalBatch,
    space: Space = "runtime",
    fix: Fix = None,
    gpus_per_node: GpusPerNode = 0,
    software: SoftwareName = "",
    as_json: Json = False,
) -> None:
    """Tell the largest model of MODEL's proportions that can be trained: as much deeper as wider."""
    machine = cluster_in_nodes(cluster, gpus, gpus_per_node)
    request = SearchRequest(
        num_devices=gpus, global_batch=global_batch, seq_len=seq_len, space=space, fix=parse_fix(fix or [])
    )
    found = find_largest(load_model(config), machine, request, software=_software(software))
    model = found.model
    sizes = {
        "num_params": model.num_params, "num_layers": model.num_layers, "hidden_size": model.hidden_size,
        "num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "ffn_size": model.ffn_size,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(sizes | describe(found.priced)))
        return
    _say(
        f"{human_count(model.num_params)} parameters: {model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_heads} heads ({model.num_kv_heads} of keys), feed-forward {model.ffn_size}",
        found.priced,
    )


def cheapest(
    config: Config,
    price: Annotated[list[str], typer.Option(help="CLUSTER=PRICE, of a device an hour; repeat for a list.")],
    days: Annotated[float, typer.Option(help="At most so many days.")],
    tokens: Annotated[float, typer.Option(help="Tokens of the whole training.")],
    seq_len: SeqLen,
    global_batch: GlobalBatch,
    most_gpus: Annotated[int, typer.Option(help="At most so many devices.")] = 1024,
    space: Space = "runtime",
    fix: Fix = None,
    software: SoftwareName = "",
    as_json: Json = False,
) -> None:
    """Tell how many devices of which cluster train MODEL in time for the least money."""
    number(days, "--days", most=1e6)
    number(tokens, "--tokens", most=1e30)
    prices = [(load_cluster(name), hourly) for name, hourly in parse_prices(price).items()]
    request = SearchRequest(
        num_devices=most_gpus, global_batch=global_batch, seq_len=seq_len, space=space, fix=parse_fix(fix or [])
    )
    offers = find_cheapest(
        load_model(config), prices, request, num_tokens=tokens, days=days, software=_software(software)
    )
    if as_json:
        rows = [
            {"cluster": offer.cluster.name, "num_devices": offer.num_devices, "days": offer.days, "price": offer.price,
             **describe(offer.priced)}
            for offer in offers
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("devices", "layout", "days", "8 of 10", "price"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for offer in offers:
        low, high = (offer.days * bound / offer.priced.step_s for bound in _bounds(offer.priced))
        table.add_row(
            f"{offer.num_devices} x {offer.cluster.name}", str(offer.priced.layout), f"{offer.days:.3g}",
            f"{low:.3g} to {high:.3g}", f"{offer.price:,.0f}",
        )  # fmt: skip
    Console(markup=False, emoji=False).print(table)


def _bounds(priced: PricedLayout) -> tuple[float, float]:
    return priced.step_low_s, priced.step_high_s


def _say(words: str, priced: PricedLayout) -> None:
    typer.echo(
        f"{words}\nin {priced.layout}: a step of {seconds_text(priced.step_s)} ({seconds_text(priced.step_low_s)} to "
        f"{seconds_text(priced.step_high_s)} in 8 cases of 10), {priced.tokens_per_s:,.0f} tokens/s, "
        f"{priced.peak_bytes / GIB:.3g} of {priced.capacity_bytes / GIB:.3g} GiB, P(fits) {priced.fit_probability:.2f}"
    )


def _with_host(cluster: Cluster, pcie: float) -> Cluster:
    if not pcie:
        return cluster
    rate = number(pcie, "--pcie", most=1e6) * 1e9
    return replace(cluster, device=replace(cluster.device, host_bytes_per_s=rate))


def _software(name: str) -> Software | None:
    return load_software(name) if name else None
