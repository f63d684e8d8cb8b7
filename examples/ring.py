"""Share one long sequence among all ranks: ring attention in a Hugging Face model, checked against one process.

    torchrun --nproc-per-node 2 examples/ring.py

Any number of ranks prints the same loss.
"""

import copy

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel import shard_batch, use_ring_attention

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and the same batch on every rank
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
input_ids = torch.randint(64, (1, 1021))  # no length has to divide
batch = {"input_ids": input_ids, "labels": input_ids}
whole = copy.deepcopy(model)
whole(**batch).loss.backward()

group = dist.group.WORLD
use_ring_attention(model, group)
loss = model(**shard_batch(batch, group)).loss  # this rank's part of the mean over all labels
loss.backward()
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)
dist.all_reduce(total := loss.detach().clone())

pairs = zip(model.parameters(), whole.parameters(), strict=True)
worst = max(float((mine.grad - one.grad).norm() / one.grad.norm()) for mine, one in pairs)
if dist.get_rank() == 0:
    print(f"loss {total.item():.4f}  largest relative error of a gradient {worst:.1e}")
dist.barrier()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
