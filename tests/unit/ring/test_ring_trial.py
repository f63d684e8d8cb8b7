"""What mixes tokens outside of attention is refused by name; what does not is taken."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from support.ring_models import EXPERTS, complaint, tiny_model
from torch import Tensor, nn

from fourfold.parallel import use_ring_attention
from fourfold.parallel.ring import stop_ring_attention

LAYERS = {"layer_types": ["full_attention", "full_attention"]}
HYBRID = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16, "shared_intermediate_size": 48,
    "position_embedding_type": "rope", **EXPERTS,
}  # fmt: skip
MIXING: list[tuple[str, dict[str, Any], str]] = [
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "model.layers.0.conv (Lfm2ShortConv)"),
    (
        "GraniteMoeHybrid",
        {"layer_types": ["mamba", "attention"], **HYBRID},
        "model.layers.0.mamba (GraniteMoeHybridMambaLayer)",
    ),
    (
        "MiniMax",
        {"layer_types": ["linear_attention", "full_attention"], "block_size": 16, **EXPERTS},
        "model.layers.0.self_attn (MiniMaxLightningAttention)",
    ),
    ("RecurrentGemma", {"lru_width": 32}, "RecurrentGemma"),
    ("Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16}, "Bamba"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options", "named"), MIXING, ids=[family for family, *_ in MIXING])
def test_hybrids_are_refused_by_the_layer_that_mixes(family, options, named):
    model = tiny_model(family, **options)
    answer = complaint(use_ring_attention, model, None)
    assert named in answer
    assert "mixes tokens outside of attention" in answer or "does not call transformers' attention" in answer
    assert model.config._attn_implementation == "eager"


class Around(nn.Module):
    """An MLP with something of a user's around it."""

    def __init__(self, inner: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.inner, self.added = inner, added

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.added(x)


class CausalConvolution(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x.mT, (2, 0))).mT


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Scan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x.cumsum(1)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


class Pooled(nn.Module):
    """Means of blocks of 100 tokens: the first tokens show nothing of them."""

    def forward(self, x: Tensor) -> Tensor:
        added = torch.zeros_like(x)
        for start in range(100, x.shape[1], 100):
            added[:, start:] += x[:, start - 100 : start].mean(1, keepdim=True)
        return added


class Counting(nn.Module):
    """A token's place, counted by the module itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], dtype=x.dtype).expand(1, -1).unsqueeze(-1) * 0.1


class NGrams(nn.Module):
    """Token embeddings, and those of pairs of tokens, as yet zero."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.inner, self.pairs = inner, nn.Embedding(101, 32)
        self.weight = inner.weight
        nn.init.zeros_(self.pairs.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) + self.pairs((ids + 7 * ids.roll(1, 1)) % 101)


class Load(nn.Module):
    """Counts what it sees while it trains, as routers do that balance themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.mean((0, 1))
        return torch.zeros_like(x)


class Capacity(nn.Module):
    """While it trains, an expert drops the tokens that come after so many."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        chosen = self.gate(x).argmax(-1, keepdim=True)
        place = nn.functional.one_hot(chosen[..., 0], 2).cumsum(1).gather(2, chosen)
        return x * (place <= x.shape[1] // 3)


def zero_convolution() -> nn.Module:
    convolution = CausalConvolution(32, 32, 3)
    nn.init.zeros_(convolution.weight)
    return convolution


@pytest.mark.parametrize("added", [zero_convolution(), Centred(), Scan(), Shifted(), Pooled()])
def test_a_users_own_module_that_mixes_is_refused(added):
    """Also where its weights are zero as yet."""
    model = tiny_model("Llama")
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, added)
    answer = complaint(use_ring_attention, model, None)
    kind = type(added).__name__
    assert f"mixes tokens outside of attention, in model.layers.1.mlp.added ({kind})" in answer


def test_what_no_nan_passes_is_refused():
    """Indices, counts, and what only training does."""
    hashing = tiny_model("Llama")
    hashing.model.embed_tokens = NGrams(hashing.model.embed_tokens)
    assert "in model.embed_tokens.pairs (nn.Embedding), whose index" in complaint(use_ring_attention, hashing, None)
    for added, words in ((Load(), "layers.1.mlp.added.seen changes with"), (Capacity(), "attention while it trains")):
        model = tiny_model("Llama").eval()
        model.model.layers[1].mlp = Around(model.model.layers[1].mlp, added)
        assert words in complaint(use_ring_attention, model, None)
        assert not model.training


def test_counting_tokens_and_statistics_of_batches_are_refused():
    counting = tiny_model("Llama")
    counting.model.layers[0].mlp = Around(counting.model.layers[0].mlp, Counting())
    assert "other outputs for a shard than for the whole" in complaint(use_ring_attention, counting, None)
    normed = tiny_model("Llama")
    normed.model.layers[0].mlp.batch = nn.BatchNorm1d(32)
    assert "model.layers.0.mlp.batch is a BatchNorm1d" in complaint(use_ring_attention, normed, None)


def test_attention_that_counts_its_tokens_is_refused_where_it_does_not_show():
    """Llama 4's temperature changes after 8192 tokens, counted from the shard's first."""
    model = tiny_model("Llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def counting(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        late = torch.arange(hidden_states.shape[1]) >= 8192
        return forward(hidden_states * (1 + late[:, None].float()), *args, **kwargs)

    attention.forward = counting
    assert "LlamaAttention counts its tokens from 0" in complaint(use_ring_attention, model, None)


TAKEN = [
    ("Llama", {}), ("Qwen3", {}), ("SmolLM3", {}), ("Olmo2", {}), ("Glm4", {}), ("Mixtral", EXPERTS),
    ("Qwen3Moe", {**EXPERTS, "output_router_logits": True}), ("Lfm2", LAYERS),
    ("GraniteMoeHybrid", {"layer_types": ["attention"] * 2, **HYBRID}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), TAKEN)
def test_what_acts_token_by_token_is_taken_and_left_as_it_was(family, options):
    model = tiny_model(family, **options).train()
    before, seed = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    use_ring_attention(model, None)
    assert all(module.training for module in model.modules())
    assert torch.equal(seed, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


LEARNED = [
    transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64),
    transformers.OPTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32, vocab_size=64
    ),
]


@pytest.mark.parametrize("config", LEARNED)
def test_learned_positions_are_refused(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    answer = complaint(use_ring_attention, model, None)
    assert f"{type(model).__name__} has no rotary embedding: learned positions end with their table" in answer


def test_weights_on_the_meta_device_need_a_known_type():
    with torch.device("meta"):
        known, unknown = tiny_model("Llama"), tiny_model("SmolLM3")
    use_ring_attention(known, None)
    assert "model type 'smollm3' is not among the known gemma" in complaint(use_ring_attention, unknown, None)


def test_a_model_takes_whole_batches_again_after_the_ring():
    model = tiny_model("Llama")
    ids = torch.arange(9)[None]
    before = model(ids).logits
    use_ring_attention(model, None)
    use_ring_attention(model, None, sharding="striped")
    stop_ring_attention(model)
    stop_ring_attention(model)
    assert model.config._attn_implementation == "eager"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(hasattr(module, "ring_settings") for module in model.modules())
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_generating_around_a_ring_names_the_cache_and_the_mend():
    model = tiny_model("Llama")
    use_ring_attention(model, None)
    answer = complaint(model.generate, torch.arange(9)[None], max_new_tokens=2)
    assert "a cache of keys" in answer
    assert "call stop_ring_attention(model) before generating" in answer


def test_wrappers_are_looked_into():
    """peft's model takes any arguments by position; the ring knows them by the names of the model inside."""
    peft = pytest.importorskip("peft")
    inner = tiny_model("Llama")
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    ids = torch.arange(9)[None]
    before = wrapped(ids, labels=ids).loss
    use_ring_attention(wrapped, None)
    assert inner.config._attn_implementation == "fourfold_ring"
    assert torch.allclose(wrapped(ids, labels=ids).loss, before, rtol=1e-5)
    stop_ring_attention(wrapped)
    assert inner.config._attn_implementation == "eager"


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_losses_of_something_else_than_next_tokens_are_refused(task):
    """The last token's label is another token's on every rank, and a span's ends lie on two; their bases are taken."""
    model = getattr(transformers, f"LlamaFor{task}")(tiny_model("Llama").config)
    answer = complaint(use_ring_attention, model, None)
    assert f"LlamaFor{task} makes its loss of something else than next tokens" in answer
    use_ring_attention(model.base_model, None)


def test_losses_of_labels_that_are_not_shifted_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(**sizes, vocab_size=64, pad_token_id=None))
    answer = complaint(use_ring_attention, model, None)
    assert "the loss of EuroBertForMaskedLM is not the sum over its shift_labels" in answer


def test_a_model_around_a_ring_is_copied_and_not_pickled():
    model = tiny_model("Llama")
    before = model(torch.arange(9)[None]).logits
    use_ring_attention(model, None)
    twin = copy.deepcopy(model)
    assert "cannot be pickled (torch.save(model))" in complaint(pickle.dumps, model)
    stop_ring_attention(twin)
    assert not twin._forward_pre_hooks
    assert torch.equal(twin(torch.arange(9)[None]).logits, before)
    assert model.config._attn_implementation == "fourfold_ring"
    pickle.dumps(twin)
