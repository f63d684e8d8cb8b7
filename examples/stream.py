"""Backpropagate through a long sequence in chunks: the gradients of plain backpropagation, and less memory.

    python examples/stream.py

One process; under torchrun it goes with DDP, FSDP2, DeepSpeed and ring attention.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.parallel import stream_backprop, token_logprobs

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config).train()
input_ids = torch.randint(256, (1, 1500))
plain = copy.deepcopy(model)
plain(input_ids, labels=input_ids).loss.backward()

stream_backprop(model)  # before DDP, FSDP2, DeepSpeed or a Trainer takes the model
loss = model(input_ids, labels=input_ids).loss
loss.backward()
pairs = zip(model.parameters(), plain.parameters(), strict=True)
worst = max(float((mine.grad - one.grad).norm() / one.grad.norm()) for mine, one in pairs)
print(f"loss {loss.item():.4f}  largest relative error of a gradient {worst:.1e}")

# Any loss of the tokens' log-probabilities streams as well; here the second half counts twice.
logprobs = token_logprobs(model, input_ids, input_ids)
weights = torch.ones_like(logprobs)
weights[:, 750:] = 2.0
(-(weights * logprobs).sum() / weights.sum()).backward()
