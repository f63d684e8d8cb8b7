"""Train a plain model as a pipeline that never drains: every rank holds one stage and updates at each micro-batch.

    torchrun --nproc-per-node 2 examples/pipeline.py

The emulator trains all stages in one process.
"""

import torch
import torch.distributed as dist
from torch import nn

from fourfold.launch.refusal import leave
from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator

dist.init_process_group("gloo")
rank, num_stages = dist.get_rank(), dist.get_world_size()


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    middle = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(num_stages - 2)]
    return [nn.Sequential(nn.Linear(8, 32), nn.Tanh()), *middle, nn.Linear(32, 4)]


def optimizer(parameters):  # NamedParameters: weight decay for matrices only
    named = {end: [p for n, p in parameters.named() if n.endswith(end)] for end in ("weight", "bias")}
    return torch.optim.AdamW([{"params": named["weight"]}, {"params": named["bias"], "weight_decay": 0.0}], lr=3e-3)


x = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(1))  # 64 micro-batches of 4 samples
stream = [(inputs, inputs[:, :4].argmax(1)) for inputs in x] * 4
options = {"optimizer": optimizer, "loss_fn": nn.functional.cross_entropy, "clip": 1.0, "observe": True}
pipeline = PipelinedBackprop(own := stages(), group=None, **options)
losses = pipeline.run(stream)
PipelinedBackpropEmulator(emulated := stages(), **options).run(stream)
same = all(map(torch.equal, own[rank].parameters(), emulated[rank].parameters()))
if rank == 0:
    print(f"loss {sum(losses[:32]) / 32:.3f} -> loss {sum(losses[-32:]) / 32:.3f}; the emulator's weights: {same}")
dist.barrier()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
