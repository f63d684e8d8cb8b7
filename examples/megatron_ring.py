"""Ring attention in Megatron-Core: a Llama's weights in a GPTModel.

    torchrun --nproc-per-node 2 examples/megatron_ring.py

Two ranks share its sequence.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel.decoder.megatron_weights import to_megatron
from fourfold.parallel.ring.megatron import MegatronRingAttention
from fourfold.parallel.sequence import shard_sequence

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
torch.cuda.current_device = lambda: "cpu"  # this line and the next put Megatron's rotary embedding on a CPU
rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda angles, dim, group: shard_sequence(angles, group, dim=dim)
sizes = {"hidden_size": 64, "num_attention_heads": 4}
torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, intermediate_size=128, num_hidden_layers=2))
config = TransformerConfig(**sizes, num_layers=2, ffn_hidden_size=128, normalization="RMSNorm", layernorm_epsilon=1e-6,
    gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
    add_bias_linear=False, context_parallel_size=dist.get_world_size(), use_cpu_initialization=True)  # fmt: skip
spec = get_gpt_layer_local_spec(normalization="RMSNorm")
spec.submodules.self_attention.submodules.core_attention = MegatronRingAttention
model = GPTModel(config, spec, 64, 1024, position_embedding_type="rope", share_embeddings_and_output_weights=False)
model.load_state_dict(to_megatron(llama.state_dict(), llama.config), strict=False)  # there are _extra_states
tokens, group = torch.randint(64, (1, 1025)), parallel_state.get_context_parallel_group()
ids, labels = (shard_sequence(part, group, dim=1) for part in (tokens[:, :-1], tokens[:, 1:]))
dist.all_reduce(loss := model(ids, None, None, labels=labels).sum().detach() / 1024)
print(f"loss {loss:.4f}  largest difference of a loss {abs(loss - llama(tokens, labels=tokens).loss).item():.1e}")
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
