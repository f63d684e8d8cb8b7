"""A training loop of one's own: any layout, and a loader whose order no layout changes.

    torchrun --nproc-per-node 2 examples/loop.py
    python examples/loop.py

Both print the same losses.
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.training.data import read_standard_library
from fourfold.launch.training.loader import TokenBatches
from fourfold.parallel import init_mesh, parallelize

GLOBAL_BATCH, SEQ_LEN, STEPS = 4, 64, 4
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    tie_word_embeddings=False,
)  # fmt: skip
with torch.device("meta"):
    model = LlamaForCausalLM(config)

dist.init_process_group() if dist.is_torchelastic_launched() else None
mesh = init_mesh(dp=dist.get_world_size() if dist.is_initialized() else 1)
model = parallelize(model, mesh, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text, _ = read_standard_library()  # one row of tokens: bytes here
batches = TokenBatches(text, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, rows=model.batch_rows(GLOBAL_BATCH))
for step, ids in zip(range(STEPS), batches, strict=False):
    loss = model.forward_backward(ids)
    model.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}  loss {loss.item():.4f}")
dist.destroy_process_group()
