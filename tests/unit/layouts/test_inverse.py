"""How long, how large, how many: each answer fits, the next size does not, and host memory is bounded."""

import json
from dataclasses import replace

import pytest
from support.clusters import measured_cluster
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.layouts.inputs.cluster import load_cluster, read_cluster
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.search.inverse import FINENESS, Host, cheapest, largest, longest, parse_prices, scaled_model
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

H100, A100 = load_cluster("H100-80GB"), load_cluster("A100-80GB")
QWEN, LLAMA = load_model("qwen3-8b"), load_model("llama-3.1-8b")
ONE = SearchRequest(num_devices=8, global_batch=1, seq_len=1)
NO_HOST = Host()


def fits(model, request):
    return bool(rank_layouts(model, H100, request, top=1).layouts)


def test_the_longest_sequence_fits_and_a_sixteenth_more_does_not():
    found = longest(QWEN, H100, ONE, host=NO_HOST)
    held = {"offload": False}
    assert found.priced.layout.seq_len == found.seq_len
    assert found.priced.fits
    assert fits(QWEN, replace(ONE, seq_len=found.seq_len, fix=held))
    more = round(found.seq_len * (1 + 1.2 / FINENESS) / 256) * 256
    assert not fits(QWEN, replace(ONE, seq_len=more, fix=held))


def test_host_memory_makes_it_longer_and_is_not_exceeded():
    alone = longest(QWEN, H100, ONE, host=NO_HOST)
    some = longest(QWEN, H100, ONE, host=Host(bytes_per_device=64 * 2**30))
    plenty = longest(QWEN, H100, ONE, host=Host(bytes_per_device=1000 * 2**30))
    assert alone.host_bytes == 0
    assert alone.seq_len < some.seq_len <= plenty.seq_len
    assert 0 < some.host_bytes <= 64 * 2**30
    assert plenty.priced.layout.offload
    # The inputs of the layers of one micro-batch, bf16, on each of the ranks that share the sequence.
    layout = plenty.priced.layout
    assert plenty.host_bytes == pytest.approx(
        QWEN.num_layers / layout.pp * plenty.seq_len / layout.cp * QWEN.hidden_size * 2, rel=0.1
    )


def test_a_slower_way_to_the_host_makes_a_step_that_offloads_no_faster():
    slow = replace(H100, device=replace(H100.device, host_bytes_per_s=1e9))
    request = replace(ONE, seq_len=131072, fix={"offload": True, "cp": 8})
    quick, slowed = (rank_layouts(QWEN, machine, request, top=1).layouts[0] for machine in (H100, slow))
    assert slowed.step_s > quick.step_s


def test_learned_positions_end_the_search():
    found = longest(load_model("gpt2"), H100, replace(ONE, num_devices=1, space="full"), host=NO_HOST)
    assert found.seq_len == 1024
    with pytest.raises(ValueError, match="gpt2"):  # which this runtime has not
        longest(load_model("gpt2"), H100, replace(ONE, num_devices=1), host=NO_HOST)


def test_what_does_not_fit_at_all_is_refused():
    with pytest.raises(ValueError, match="not even a sequence of 256 tokens fits on 1 devices"):
        longest(load_model("llama-3.1-405b"), H100, replace(ONE, num_devices=1), host=NO_HOST)
    tiny = replace(H100, device=replace(H100.device, memory_bytes=2.1e9))
    with pytest.raises(ValueError, match="not even a sixteenth of"):
        largest(LLAMA, tiny, SearchRequest(num_devices=1, global_batch=1, seq_len=8192))


def test_the_largest_model_fits_and_the_next_does_not():
    request = SearchRequest(num_devices=8, global_batch=64, seq_len=4096)
    found = largest(LLAMA, H100, request)
    assert found.model.num_params > 2 * LLAMA.num_params
    factor = float(found.model.name.rsplit(" ", 1)[1])
    assert fits(found.model, request)
    assert not fits(scaled_model(LLAMA, factor * (1 + 1.5 / FINENESS)), request)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "mixtral-8x7b", "gemma-2-9b", "mistral-7b"])
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 3.0])
def test_a_scaled_model_is_a_model_of_the_same_proportions(name, factor):
    model = load_model(name)
    scaled = scaled_model(model, factor)
    if factor == 1.0:
        assert scaled.num_params == pytest.approx(model.num_params, rel=0.02)
    assert scaled.num_heads % scaled.num_kv_heads == 0
    assert scaled.num_moe_layers <= scaled.num_layers
    assert scaled.num_windowed_layers <= scaled.num_layers
    if factor > 0.2:
        assert scaled.hidden_size / scaled.num_layers == pytest.approx(model.hidden_size / model.num_layers, rel=0.35)


def test_the_cheapest_is_in_time_and_first():
    request = SearchRequest(num_devices=64, global_batch=512, seq_len=4096)
    prices = [(H100, 2.5), (A100, 1.3)]
    offers = cheapest(LLAMA, prices, request, num_tokens=1e11, days=30)
    assert [offer.price for offer in offers] == sorted(offer.price for offer in offers)
    assert all(offer.days <= 30 for offer in offers)
    first = offers[0]
    hourly = {cluster.name: price for cluster, price in prices}[first.cluster.name]
    assert first.price == pytest.approx(first.days * 24 * first.num_devices * hourly)
    assert first.days == pytest.approx(1e11 / first.priced.tokens_per_s / 86400)
    with pytest.raises(ValueError, match=r"no offer is done in 0.001 days .the quickest, 64 x H100-80GB, takes"):
        cheapest(LLAMA, prices, request, num_tokens=1e11, days=0.001)


@pytest.mark.parametrize("count", [3, 7])
def test_the_longest_sequence_of_an_odd_count_of_devices_is_one_that_they_can_cut(count):
    """A ring cuts two pieces a device, and no power of two is a multiple of 6 or 14."""
    ring = replace(ONE, num_devices=count, fix={"cp": count})
    found = longest(LLAMA, H100, ring, host=NO_HOST)
    assert found.seq_len % (2 * count) == 0
    assert found.priced.layout.cp == count


def test_devices_that_cut_no_short_sequence_are_asked_for_a_longer_one():
    found = longest(LLAMA, H100, replace(ONE, num_devices=384, fix={"cp": 384}), host=NO_HOST)
    assert found.seq_len % 768 == 0


def test_the_cheapest_counts_the_devices_that_were_offered_and_one_where_no_link_is_known():
    alone = read_cluster(measured_cluster(1), title="cluster.toml")
    seven = read_cluster(measured_cluster(7), title="cluster.toml")
    request = SearchRequest(num_devices=7, global_batch=28, seq_len=56)
    tiny = load_model("tiny-llama-bytes")
    offers = cheapest(tiny, [(alone, 1.0), (seven, 2.0)], request, num_tokens=1e6, days=1e3)
    counts = {
        name: sorted(o.num_devices for o in offers if o.cluster.name == name) for name in ("1 x test", "7 x test")
    }
    assert counts == {"1 x test": [1], "7 x test": [1, 2, 4, 7]}


@pytest.mark.parametrize("word", ["H100-80GB", "=2", "H100-80GB=", "H100-80GB=free", "H100-80GB=-1", "A=nan", "A=inf"])
def test_a_price_that_is_none_is_refused(word):
    with pytest.raises(ValueError, match="write it as CLUSTER=PRICE"):
        parse_prices([word])


def test_the_commands_answer():
    runner = CliRunner(env={"COLUMNS": "140"})
    on = ["qwen3-8b", "--cluster", "H100-80GB", "--gpus", "8"]
    said = runner.invoke(app, ["longest", *on, "--json", "--host-gib", "64", "--pcie", "50"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.output)["seq_len"] > 100_000
    assert "tokens a sequence" in runner.invoke(app, ["longest", *on]).output
    said = runner.invoke(app, ["largest", *on, "--seq-len", "4096", "--global-batch", "8"])
    assert said.exit_code == 0, said.output
    assert "parameters:" in said.output
    words = ["--days", "60", "--tokens", "1e11", "--seq-len", "4096", "--global-batch", "512", "--most-gpus", "16"]
    said = runner.invoke(app, ["cheapest", "llama-3.1-8b", "--price", "H100-80GB=2.5", *words])
    assert said.exit_code == 0, said.output
    assert "8 x H100-80GB" in said.output
    silent = (["--pcie", "50"], ["--fix", "offload=true"])  # of no effect without host memory
    for bad in (["--host-gib", "nan"], ["--host-gib", "-1"], ["--pcie", "inf"], *silent):
        result = runner.invoke(app, ["longest", *on, *bad])
        assert isinstance(result.exception, ValueError), bad
