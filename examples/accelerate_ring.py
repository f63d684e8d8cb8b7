"""StreamBP and ring attention in a model that Accelerate prepares.

    accelerate launch --multi_gpu --num_machines 1 --num_processes 2 examples/accelerate_ring.py

Two ranks share one sequence; on a CPU, too.
"""

import copy

import torch
from accelerate import Accelerator, ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.stream import streamed_layers

torch.manual_seed(0)  # the same weights and the same batch on every rank
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model, input_ids = LlamaForCausalLM(config), torch.randint(64, (1, 1021))
batch = {"input_ids": input_ids, "labels": input_ids}
whole = copy.deepcopy(model)
(expected := whole(**batch).loss).backward()

accelerator = Accelerator(cpu=True)
mesh = ParallelismConfig(cp_size=accelerator.num_processes).build_device_mesh("cpu")
group = mesh["cp"].get_group()
use_ring_attention(stream_backprop(model), group)
model = accelerator.prepare(model)
part = model(**shard_batch(batch, group)).loss  # this rank's part of the mean over all labels
accelerator.backward(part * group.size())  # DDP takes the mean over ranks of what is to be summed
loss = accelerator.reduce(part.detach(), "sum")

pairs = zip(model.parameters(), whole.parameters(), strict=True)
worst = max(float((mine.grad - one.grad).norm() / one.grad.norm()) for mine, one in pairs)
layers = streamed_layers(accelerator.unwrap_model(model))
accelerator.print(f"loss {loss:.4f}  largest difference of a loss {abs(loss - expected):.1e}")
accelerator.print(f"layers streamed {layers}  largest relative error of a gradient {worst:.1e}")
accelerator.wait_for_everyone()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
