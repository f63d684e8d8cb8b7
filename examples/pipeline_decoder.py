"""Train a Hugging Face decoder as a pipeline that never drains, on packed rows of any length.

    torchrun --nproc-per-node 2 examples/pipeline_decoder.py

As many stages as ranks, at most one a layer.
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.refusal import leave
from fourfold.parallel import init_mesh
from fourfold.parallel.decoder import pipeline_decoder

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
dist.init_process_group("gloo")
mesh = init_mesh(pp=dist.get_world_size(), device_type="cpu")
with torch.device("meta"):  # each rank makes the weights of its own stage
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
pipeline = pipeline_decoder(
    model, mesh, seq_len=32, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), schedule="1f1b-async"
)


def rows():  # two documents a row; a target of -100 counts for nothing
    for number in range(60):
        length = 24 + 8 * (number % 2)
        ids = (torch.arange(2 * length).view(2, length) * (1 + number % 3)) % 61
        documents = (torch.arange(length) >= length // 3).long().expand(2, length)
        targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
        targets[:, length // 3 - 1] = -100  # the next token is another document's
        yield {"input_ids": ids, "document_ids": documents}, targets


losses = pipeline.run(rows())
if pipeline.is_first:
    print(f"loss {losses[0]:.3f} -> loss {losses[-1]:.3f}")
dist.barrier()
leave(0)  # at the interpreter's end a thread of gloo's, which destroy_process_group does not stop, can abort it
