"""Every exported file is read back as the layout that was asked; what a tool has not is refused by name."""

import itertools
import json
import tomllib
from importlib.resources import files

import pytest

from fourfold.launch.commands.export import exported
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model, model_presets
from fourfold.layouts.output.export import deepspeed_config, torchtitan_config
from fourfold.layouts.output.megatron import VERSION, megatron_arguments, megatron_config
from fourfold.layouts.output.round_trip import layout_of_deepspeed, layout_of_megatron, layout_of_torchtitan
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

LLAMA = load_model("llama-3.1-8b")
H100 = load_cluster("H100-80GB")
REQUEST = SearchRequest(num_devices=16, global_batch=64, seq_len=4096, space="full")
TRIP = {
    "megatron": lambda layout: layout_of_megatron(megatron_arguments(layout, LLAMA), LLAMA, num_devices=16),
    "deepspeed": lambda layout: layout_of_deepspeed(
        json.loads(json.dumps(deepspeed_config(layout, LLAMA))), seq_len=4096
    ),
    "torchtitan": lambda layout: layout_of_torchtitan(
        tomllib.loads(exported(layout, LLAMA, to="torchtitan", gpus_per_node=8, file="")), LLAMA
    ),
}


@pytest.fixture(scope="module")
def ranked():
    """Layouts of every kind that a plan of the full space ranks: a few of each combination of options."""
    seen, chosen = {}, []
    for priced in rank_layouts(LLAMA, H100, REQUEST).layouts:
        layout = priced.layout
        kind = (
            layout.checkpointing, layout.zero_stage, layout.vp, layout.sequence_parallel, layout.offload, layout.pp > 1,
            layout.cp > 1, layout.tp > 1, layout.checkpoint_every, layout.cp_heads, layout.head_counts_as > 0,
        )  # fmt: skip
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            chosen.append(layout)
    return chosen


@pytest.mark.parametrize("tool", TRIP)
def test_every_ranked_layout_comes_back_or_is_refused(ranked, tool):
    came_back, refused = 0, 0
    for layout in ranked:
        try:
            again = TRIP[tool](layout)
        except ValueError as error:
            refused += len(str(error).splitlines()) == 1
            continue
        assert again == layout, (tool, str(layout), str(again))
        came_back += 1
    assert came_back > 5
    assert refused > 5


def test_options_are_those_of_the_release():
    text = files("fourfold.layouts").joinpath(f"data/megatron_{VERSION}.txt").read_text()
    known = {line for line in text.splitlines() if line.startswith("--")}
    assert len(known) > 500
    shapes = [
        Layout(dp=2, pp=2, tp=2, cp=2, sequence_parallel=True, zero_stage=1, checkpointing="full", **batch())
        , Layout(dp=2, pp=4, vp=2, checkpointing="selective", **batch()),
        Layout(dp=8, pp=2, head_counts_as=2, **batch()),
    ]  # fmt: skip
    written = set()
    for name, layout in itertools.product(sorted(model_presets()), shapes):
        try:
            arguments = megatron_arguments(layout, load_model(name))
        except ValueError:
            continue
        written |= {word for word in arguments if word.startswith("--")}
    assert {"--qk-layernorm", "--add-qkv-bias", "--moe-ffn-hidden-size", "--rotary-base"} <= written
    assert written <= known


def batch() -> dict:
    return {"global_batch": 64, "seq_len": 2048}


MODELS = {
    "llama-3.1-8b": {"--rotary-base": "500000", "--norm-epsilon": "1e-05"},
    "mistral-7b": {"--window-size": "4095,0"},
    "mixtral-8x7b": {"--moe-ffn-hidden-size": "14336", "--moe-router-topk": "2"},
    "gpt2": {"--position-embedding-type": "learned_absolute", "--attention-dropout": "0.0"},
    "gpt3-175b": {"--normalization": "LayerNorm"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_arguments_make_this_model(name):
    layout = Layout(dp=8, global_batch=64, seq_len=1024)
    pairs = dict(itertools.pairwise(megatron_arguments(layout, load_model(name))))
    assert MODELS[name].items() <= pairs.items()
    assert pairs["--hidden-dropout"] == "0.0"


def test_rotary_scaling_is_llamas_or_refused():
    layout, config = Layout(dp=8, global_batch=64, seq_len=1024), model_presets()["llama-3.1-8b"]["config"]
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    pairs = dict(itertools.pairwise(megatron_arguments(layout, load_model({**config, "rope_scaling": scaling}))))
    assert pairs["--rope-scaling-factor"] == "8.0"
    assert "--use-rope-scaling" in pairs
    for other in ({**scaling, "low_freq_factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}):
        with pytest.raises(ValueError, match="rotary scaling"):
            megatron_arguments(layout, load_model({**config, "rope_scaling": other}))


def test_biases_and_norms_of_qwen():
    layout = Layout(dp=8, global_batch=64, seq_len=1024)
    assert "--add-qkv-bias" in megatron_arguments(layout, load_model("qwen2.5-7b"))
    assert "--qk-layernorm" in megatron_arguments(layout, load_model("qwen3-8b"))
    mixture = dict(itertools.pairwise(megatron_arguments(layout, load_model("qwen3-30b-a3b"))))
    assert (mixture["--num-experts"], mixture["--moe-ffn-hidden-size"]) == ("128", "768")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma-2-9b", "no norms after each block and soft caps"),
        ("gemma-7b", "embeddings scaled by the width"),
        ("phi-2", "attention and feed-forward side by side"),
        ("gpt-neox-20b", "use_parallel_residual"),
    ],
)
def test_models_that_megatron_would_not_compute_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        megatron_arguments(Layout(dp=8, global_batch=64, seq_len=1024), load_model(name))


@pytest.mark.parametrize(
    ("to", "name", "fields", "message"),
    [
        ("megatron", "mixtral-8x7b", {"tp": 2}, "needs sequence parallelism where tp meets experts"),
        ("deepspeed", "llama-3.1-8b", {"checkpointing": "selective"}, "selective checkpointing"),
        ("deepspeed", "llama-3.1-8b", {"checkpointing": "full", "checkpoint_every": 2}, "every few layers"),
        ("deepspeed", "mixtral-8x7b", {"ep": 2}, "expert parallelism"),
        ("torchtitan", "llama-3.1-8b", {"pp": 2}, "replicas without sharding beside other axes"),
        ("torchtitan", "llama-3.1-8b", {"cp": 2, "dp": 1}, "replicas without sharding beside other axes"),
        ("torchtitan", "mistral-7b", {"zero_stage": 3}, "torchtitan has no model of mistral-7b's dimensions"),
    ],
)
def test_what_a_tool_has_not_is_named(to, name, fields, message):
    layout = Layout(**{"dp": 4, "global_batch": 64, "seq_len": 2048, **fields})
    with pytest.raises(ValueError, match=message):
        exported(layout, load_model(name), to=to, gpus_per_node=8, file="layout.toml")


def test_torchtitan_is_told_this_model():
    layout = Layout(dp=8, zero_stage=3, global_batch=64, seq_len=2048)
    assert torchtitan_config(layout, LLAMA)["model"] == {"name": "llama3", "flavor": "8B"}
    assert torchtitan_config(layout, load_model("qwen3-8b"))["model"] == {"name": "qwen3", "flavor": "8B"}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b", "mixtral-8x7b", "qwen2.5-7b", "qwen3-8b", "gpt2"])
def test_megatron_core_builds_the_same_model(name):
    core = pytest.importorskip("megatron.core.transformer.transformer_config")
    model = load_model(name)
    layout = Layout(dp=4, tp=2, sequence_parallel=True, global_batch=64, seq_len=1024)
    built = core.TransformerConfig(**megatron_config(layout, model))
    assert built.add_qkv_bias == model.qkv_bias
    assert built.qk_layernorm == model.qk_norm
    assert (built.num_moe_experts or 0) == model.num_experts
    assert built.hidden_dropout == built.attention_dropout == 0.0
    assert (built.window_size is not None) == bool(model.sliding_window)


SHAPES = [
    {"dp": 16}, {"dp": 1, "tp": 16, "sequence_parallel": True}, {"dp": 8, "tp": 2}, {"dp": 4, "pp": 4},
    {"dp": 8, "cp": 2}, {"dp": 4, "cp": 4, "cp_heads": 2}, {"dp": 4, "pp": 4, "vp": 2},
]  # fmt: skip
OPTIONS = [
    {}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 3, "sharded_accumulation": True},
    {"checkpointing": "selective"}, {"checkpointing": "full", "checkpoint_every": 2},
    {"checkpointing": "full", "offload": True}, {"offload": True}, {"checkpointing": "stream", "stream_chunks": 4},
    {"precision": "fp32"}, {"precision": "bf16"}, {"precision": "bf16-mixed"}, {"zero_stage": 3, "precision": "fp32"},
    {"compile": True}, {"compile": False}, {"schedule": "2bw"}, {"micro_batch": 2},
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("tool", TRIP)
def test_every_option_comes_back_or_is_refused_by_name(tool, option):
    for shape in SHAPES:
        try:
            layout = Layout(**{"global_batch": 64, "seq_len": 4096, **shape, **option})
        except ValueError:
            continue  # no such layout: 2bw without a pipeline
        refusal = ""
        try:
            again = TRIP[tool](layout)
        except ValueError as error:
            again, refusal = layout, str(error)
        assert again == layout
        assert not refusal or (tool in refusal and "\n" not in refusal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "no biases"),
        ({"mlp_bias": True}, "no biases"),
        ({"head_dim": 64}, "no heads of 64"),
        ({"tie_word_embeddings": True}, "no head tied to the embedding"),
        ({"rope_theta": 10000.0}, "no rotary base 10000.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no rotary scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "no activation 'gelu'"),
        ({"model_type": "mistral"}, "no parts of the family mistral, no sliding window"),
        ({"model_type": "granite"}, "no parts of the family granite"),
    ],
    ids=str,
)
def test_another_model_of_the_same_dimensions_is_refused_by_torchtitan(changes, message):
    model = load_model({**model_presets()["llama-3.1-8b"]["config"], **changes})
    with pytest.raises(ValueError, match=message):
        torchtitan_config(Layout(dp=8, zero_stage=3, global_batch=64, seq_len=2048), model)


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
    "intermediate_size": 96,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "attention_bias": True}, "biases in attention's output alone"),
        ({"model_type": "llama", "mlp_bias": True}, "biases in the feed-forward alone"),
        ({"model_type": "llama", "rope_theta": 10000.5}, "rotary base 10000.5"),
        ({"model_type": "starcoder2", "hidden_act": "relu"}, "activation 'relu'"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "kimi_k2"}, "latent attention"),
        ({"model_type": "glm4_moe", "norm_topk_prob": False}, "do not add up to 1"),
    ],
    ids=str,
)
def test_biases_activations_and_routing_without_a_counterpart_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        megatron_arguments(Layout(dp=8, global_batch=64, seq_len=1024), load_model({**SMALL, **config}))


def test_experts_are_chosen_as_the_model_chooses_them():
    layout = Layout(dp=8, global_batch=64, seq_len=1024)
    glm = {**SMALL, "model_type": "glm4_moe", "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2}
    words = megatron_arguments(layout, load_model(glm))
    pairs = dict(itertools.pairwise(words))
    assert pairs["--moe-router-score-function"] == "sigmoid"
    assert pairs["--moe-router-topk-scaling-factor"] == "2.5"
    assert (pairs["--moe-router-num-groups"], pairs["--moe-router-group-topk"]) == ("4", "2")
    assert "--moe-router-enable-expert-bias" in words
    for scaled in (True, False):
        qwen = load_model({**SMALL, "model_type": "qwen3_moe", "norm_topk_prob": scaled})
        assert ("--moe-router-pre-softmax" in megatron_arguments(layout, qwen)) is not scaled
