"""Train a decoder on a mesh: two ranks cut its matrices between them (tp), and the pairs are replicas (dp).

    torchrun --nproc-per-node 2 examples/parallelize.py

It prints the same losses for any number of ranks, also for one (`python examples/parallelize.py`).
"""

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel import init_mesh, parallelize

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
world_size = int(os.environ.get("WORLD_SIZE", "1"))
tp = 2 if world_size % 2 == 0 else 1
mesh = init_mesh(dp=world_size // tp, tp=tp)
with torch.device("meta"):  # no rank ever holds the whole model: each makes the weights it keeps
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
model = parallelize(model, mesh, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

batch = torch.arange(8 * 32).view(8, 32) % 61  # the global batch: 8 sequences of 32 tokens
rows = model.batch_rows(len(batch))  # which of them this rank's replica takes
for step in range(20):
    loss = model.forward_backward(batch[rows])  # the mean over the global batch, on every rank
    model.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4 and dist.get_rank() == 0:
        print(f"step {step + 1}  loss {loss.item():.4f}")
dist.barrier()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
