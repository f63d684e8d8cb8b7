"""A Megatron-Core GPTModel around the ring: a transformers Llama's loss and gradients, through converted weights."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from fourfold.parallel.decoder.megatron_weights import to_megatron
from fourfold.parallel.ring.megatron import MegatronRingAttention
from fourfold.parallel.sequence import shard_sequence
from fourfold.parallel.testing.compare import assert_ranks, gradient_errors, gradients, relative_error
from fourfold.parallel.testing.tiny_models import batch, tiny

TOLERANCE = 2e-6  # fp32 rounding, as of the ring's own tests


def ring_in_megatron() -> dict[str, float]:
    """Relative errors of the loss and of each gradient, summed over the ring."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    llama, tokens, size = tiny("llama"), batch(2, 33), dist.get_world_size()
    config = TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", layernorm_epsilon=llama.config.rms_norm_eps, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        context_parallel_size=size, use_cpu_initialization=True,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = MegatronRingAttention
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Megatron's rotary embedding goes to a CUDA device.
            patch.setattr(torch.cuda, "current_device", lambda: "cpu")
            patch.setattr(
                rotary_pos_embedding, "get_pos_emb_on_this_cp_rank",
                lambda angles, dim, group: shard_sequence(angles, group, dim=dim),
            )  # fmt: skip
            model = GPTModel(
                config, spec, 97, 64, position_embedding_type="rope", share_embeddings_and_output_weights=False
            )
            model.load_state_dict(to_megatron(llama.state_dict(), llama.config), strict=False)
            group = parallel_state.get_context_parallel_group()
            ids, labels = (shard_sequence(part, group, dim=1) for part in (tokens[:, :-1], tokens[:, 1:]))
            loss = model(ids, None, None, labels=labels).sum() / labels.numel() / size
            found = gradients(model, loss)
    finally:
        parallel_state.destroy_model_parallel()
    for gradient in found.values():
        dist.all_reduce(gradient)
    dist.all_reduce(total := loss.detach().clone())
    truth = llama(tokens, labels=tokens).loss
    expected = to_megatron(gradients(llama, truth), llama.config)
    return {"loss": relative_error(total, truth.detach()), **gradient_errors(found, expected)}


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_two_ranks_share_a_sequence(ranks):
    assert_ranks(ranks(2)(ring_in_megatron), TOLERANCE, "Megatron-Core")
