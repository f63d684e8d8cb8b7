"""transformers' Trainer around a streaming model: one line more than without, and the same losses.

    python examples/trainer.py

The plain model is trained beside it.
"""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fourfold.parallel.stream import stream_backprop, streamed_layers

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
streaming, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
plain.load_state_dict(streaming.state_dict())
rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 300))]


def train(model):
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=copy.deepcopy(rows))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


stream_backprop(streaming)
losses, expected = train(streaming), train(plain)
worst = max(abs(mine - its) for mine, its in zip(losses, expected, strict=True))
print(f"loss {losses[-1]:.4f}  layers streamed {streamed_layers(streaming)}  largest difference of a loss {worst:.1e}")
