"""DeepSpeed ZeRO 3 over two ranks around a streaming model.

    torchrun --nproc-per-node 2 examples/deepspeed_stream.py

Its three steps are those of one process.
"""

import copy

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel.decoder.deepspeed_model import skip_shared_memory_operator
from fourfold.parallel.stream import stream_backprop, streamed_layers

skip_shared_memory_operator()  # on a CPU it would be compiled first
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
plain, rows = LlamaForCausalLM(config), torch.randint(64, (dist.get_world_size(), 300))
model, mine = stream_backprop(copy.deepcopy(plain)), rows[dist.get_rank() :][:1]
optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
    config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3}})  # fmt: skip
for _ in range(3):
    engine.backward(loss := engine(mine, labels=mine).loss)
    engine.step()
    optimizer.zero_grad()
    (expected := plain(rows, labels=rows).loss).backward()
    optimizer.step()
dist.all_reduce(mean := loss.detach() / dist.get_world_size())
layers = streamed_layers(model)
print(f"loss {mean:.4f}  layers streamed {layers}  largest difference of a loss {abs(mean - expected).item():.1e}")
dist.barrier()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
