"""layout.toml goes there and back; junk in it, and in cluster.toml, is named in one line."""

from dataclasses import replace

import pytest
import tomli_w

from fourfold.layouts.inputs.cluster import cluster_presets, load_cluster, preset_for_gpu
from fourfold.layouts.inputs.layout import Layout, check, read_layout_file, write_layout_file
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import load_model, model_presets


def test_a_layout_goes_there_and_back(tmp_path):
    layout = Layout(dp=2, tp=2, micro_batch=2, zero_stage=3, checkpointing="full", global_batch=16, seq_len=256)
    write_layout_file(tmp_path / "layout.toml", layout, load_model("llama-3.2-1b"))
    again, model = read_layout_file(tmp_path / "layout.toml")
    assert again == layout
    assert model.num_params == load_model("llama-3.2-1b").num_params
    assert model.config["rope_theta"] == 500000.0


def test_null_values_of_a_config_are_left_out(tmp_path):
    layout = Layout(global_batch=1, seq_len=8)
    write_layout_file(tmp_path / "layout.toml", layout, load_model("qwen3-8b"))
    assert model_presets()["qwen3-8b"]["config"]["sliding_window"] is None
    assert "sliding_window" not in read_layout_file(tmp_path / "layout.toml")[1].config


SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 96, "vocab_size": 128}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", **SMALL, "sliding_window": None, "rope_scaling": None},
        {"model_type": "mistral", **SMALL, "num_key_value_heads": None},
        {"model_type": "deepseek_v3", **SMALL, "q_lora_rank": None, "n_routed_experts": 8},
        {"model_type": "qwen3", **SMALL, "head_dim": None},
        {"model_type": "gemma", **SMALL, "head_dim": 16, "tie_word_embeddings": None},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_null_that_makes_another_model_is_kept(tmp_path, config):
    """What is trained is what was priced: left out, each of these would have the family's default."""
    model = load_model(config)
    write_layout_file(tmp_path / "layout.toml", Layout(global_batch=1, seq_len=8), model)
    again = read_layout_file(tmp_path / "layout.toml")[1]
    assert again == model
    null = next(key for key, value in config.items() if value is None)
    assert again.config[null] is None


@pytest.mark.parametrize("nulls", ["sliding_window", [1], ["vocab_size"], {"a": 1}], ids=str)
def test_nulls_that_are_none_are_refused(tmp_path, nulls):
    path = tmp_path / "layout.toml"
    document = {"layout": {"global_batch": 1, "seq_len": 8}, "model": {"model_type": "llama", **SMALL}}
    path.write_text(tomli_w.dumps({"model_nulls": nulls, **document}))
    with pytest.raises(ValueError, match=r"a list of keys that .model. leaves out"):
        read_layout_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 3}, "8 attention heads cannot be shared by tp=3"),
        ({"pp": 9}, "4 layers cannot fill pp=9"),
        ({"cp": 3}, "seq_len=256 cannot be cut into 6 pieces for cp=3"),
        ({"dp": 3}, "global_batch=16 is no multiple of dp=3 x micro_batch=1"),
        ({"dp": 0}, "dp=0: a layout's dp is a whole number"),
        ({"dp": "2"}, "dp='2'"),
        ({"checkpointing": "some"}, "checkpointing='some': choose one of none"),
        ({"zero_stage": 4}, "zero_stage=4: choose 0, 1, 2 or 3"),
        ({"precision": "fp16"}, "precision='fp16': choose one of auto, fp32, bf16-mixed, bf16, fp64"),
        ({"sharded_accumulation": True}, "sharded_accumulation=true with zero_stage=0: .*choose zero_stage=3"),
        ({"speed": 9}, r"\[layout\] has 'speed', which no layout has: remove it"),
        ({"seq_len": None}, r"\[layout\] has no 'seq_len': add it"),
    ],
)
def test_junk_in_a_layout_is_named(tmp_path, change, message):
    entries = {"dp": 1, "global_batch": 16, "seq_len": 256, **change}
    document = {
        "layout": {key: value for key, value in entries.items() if value is not None},
        "model": model_presets()["tiny-llama-bytes"]["config"],
    }
    path = tmp_path / "layout.toml"
    path.write_text(tomli_w.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_layout_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[layout", "not a TOML file"), ("[layout]\ndp = 1\n", r"no \[model\] table"), (None, "cannot be read")],
)
def test_a_broken_layout_file_is_named(tmp_path, text, message):
    path = tmp_path / "layout.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layout_file(path)


def test_heads_experts_and_stages_must_fit():
    with pytest.raises(ValueError, match="8 key-value heads cannot be shared by tp=16"):
        check(Layout(tp=16, global_batch=1, seq_len=8), load_model("llama-3.1-8b"))
    with pytest.raises(ValueError, match="8 experts cannot be shared by ep=3"):
        check(Layout(ep=3, global_batch=1, seq_len=8), load_model("mixtral-8x7b"))
    with pytest.raises(ValueError, match="32 layers cannot fill pp=8 x vp=8"):
        check(Layout(pp=8, vp=8, global_batch=8, seq_len=8), load_model("llama-3.1-8b"))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(global_batch=8, seq_len=64),
        Layout(dp=2, pp=2, tp=2, micro_batch=2, vp=2, sequence_parallel=True, zero_stage=1, global_batch=8, seq_len=64),
        Layout(dp=2, cp=4, cp_heads=2, checkpointing="stream", stream_chunks=8, global_batch=8, seq_len=64),
        Layout(dp=8, ep=4, checkpointing="full", checkpoint_every=2, offload=True, global_batch=8, seq_len=64),
        Layout(dp=2, pp=4, schedule="lockstep", checkpointing="full", global_batch=8, seq_len=64),
        Layout(pp=4, schedule="1f1b-async", mitigation="stash+sc", global_batch=8, seq_len=64),
        Layout(pp=4, schedule="2bw", mitigation="none", global_batch=8, seq_len=64),
        Layout(pp=4, embedding_counts_as=1, head_counts_as=12, global_batch=8, seq_len=64),
        Layout(dp=2, zero_stage=3, sharded_accumulation=True, precision="bf16", global_batch=8, seq_len=64),
        Layout(precision="bf16-mixed", checkpointing="full", global_batch=8, seq_len=64),
        Layout(tp=2, sequence_parallel=True, checkpointing="selective", compile=False, global_batch=8, seq_len=64),
        Layout(dp=2, zero_stage=2, compile=True, global_batch=8, seq_len=64),
    ],
)
def test_a_printed_name_reads_back(layout):
    again = parse_layout(str(layout), num_devices=layout.world_size, global_batch=8, seq_len=64)
    assert again == layout


def test_what_the_runtime_has_not_is_named():
    layout = Layout(tp=2, pp=2, ep=2, sequence_parallel=True, zero_stage=1, global_batch=8, seq_len=64)
    assert layout.unrunnable_reason() == "ep"
    assert not layout.runnable
    assert replace(layout, ep=1).runnable
    assert replace(layout, ep=1, vp=2).runnable
    assert replace(layout, ep=1, vp=2, zero_stage=3).unrunnable_reason() == "interleaving with ZeRO 2 or 3"
    assert replace(layout, ep=1, zero_stage=2).unrunnable_reason() == "zero_stage=2 needs pp=1"
    assert Layout(dp=2, zero_stage=3, checkpointing="full", global_batch=8, seq_len=64).runnable
    streamed = Layout(cp=2, checkpointing="stream", stream_chunks=4, global_batch=8, seq_len=64)
    assert streamed.runnable
    assert replace(streamed, tp=2).unrunnable_reason() == "checkpointing=stream with tp"


def test_presets_state_their_source():
    for name, table in cluster_presets().items():
        cluster = load_cluster(name)
        assert len(table["source"]) > 40
        assert cluster.device.memory_bytes > 3e10
        assert [link.send.bandwidth_bytes_per_s for link in cluster.links] == sorted(
            (link.send.bandwidth_bytes_per_s for link in cluster.links), reverse=True
        )
    named = {"A100-80GB-SXM": "A100-80GB", "A100-SXM4-40GB": "A100-40GB", "V100": "V100-32GB", "A100": "A100-80GB"}
    assert {name: preset_for_gpu(name) for name in named} == named
    with pytest.raises(ValueError, match="gpu_type='TPUv4'"):
        preset_for_gpu("TPUv4")


def cluster_document() -> dict:
    send = {"operation": "send", "group_size": 2, "latency_s": 1e-5, "bandwidth_bytes_per_s": 1e9}
    return {
        "schema": 1, "name": "two ranks", "num_devices": 2, "devices_per_node": 2,
        "device": {"name": "cpu", "type": "cpu", "dtype": "float32", "memory_bytes": 1e10, "peak_flops_per_s": 5e10,
                   "memory_bandwidth_bytes_per_s": 1e10, "operator_overhead_s": 5e-6},
        "link": [{"name": "host", "num_ranks": 2, "operation": [send]}],
        "matmul": [{"dtype": "float32", "m": 256, "n": 256, "k": 256, "seconds": 1e-3}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema=2, but this reads 1"),
        ({"device": [{}, {}]}, "2 kinds of device, but every rank must be the same"),
        ({"device": {"type": "cpu"}}, r"dtype=None, but it is one of float64"),
        ({"link": [{"name": "host", "num_ranks": 2}]}, "link 'host' has no 'send' operation"),
        ({"link": {}}, r"'link' is not a list of tables"),
        ({"matmul": [{"dtype": "float32"}]}, r"\[\[matmul\]\] 0 has no 'k'"),
        ({"num_devices": 0}, "num_devices=0"),
    ],
)
def test_junk_in_a_cluster_is_named(tmp_path, change, message):
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps({**cluster_document(), **change}))
    with pytest.raises(ValueError, match=message) as error:
        load_cluster(path)
    assert "\n" not in str(error.value)


def test_no_free_memory_is_refused(tmp_path):
    document = cluster_document()
    document["device"]["memory_bytes"] = 1000.0
    (tmp_path / "cluster.toml").write_text(tomli_w.dumps(document))
    with pytest.raises(ValueError, match="no free memory to train in"):
        load_cluster(tmp_path / "cluster.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tp2 tp4", "'tp4' states tp a second time"),
        ("z1 z2", "'z2' states zero_stage a second time"),
        ("fp32 bf16", "'bf16' states precision a second time"),
        ("compile nocompile", "'nocompile' states compile a second time"),
        ("full selective", "'selective' states checkpointing a second time"),
        ("full/2x3", "'full/2x3' is none of"),
        ("none/2", "'none/2' is none of"),
        ("selectivex4", "'selectivex4' is none of"),
    ],
)
def test_a_name_that_says_two_things_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(words, num_devices=8, global_batch=8, seq_len=64)
