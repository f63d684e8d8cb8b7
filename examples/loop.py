"""A training loop of one's own.

    torchrun --nproc-per-node 2 examples/loop.py

Its losses are the same under every layout.
"""

import os
from itertools import islice

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.launch.training.data import read_standard_library
from fourfold.launch.training.loader import TokenBatches
from fourfold.parallel import init_mesh, parallelize

mesh = init_mesh(dp=int(os.environ.get("WORLD_SIZE", "1")))
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = parallelize(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)), mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text, _ = read_standard_library()  # one row of tokens: bytes here
for ids in islice(TokenBatches(text, seq_len=64, global_batch=4, rows=model.batch_rows(4)), 4):
    loss = model.forward_backward(ids)
    model.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss:.4f}") if dist.get_rank() == 0 else None
leave(0)
