"""TRL's SFT, packed, around a streaming mixture of experts.

    python examples/trl_sft.py

DPO, GRPO and reward trainers take a streaming model the same way.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fourfold.parallel.stream import stream_backprop, streamed_layers

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
streaming, plain = MixtralForCausalLM(config), MixtralForCausalLM(config)
plain.load_state_dict(streaming.state_dict())
words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
rows = [{"input_ids": torch.randint(2, 64, (length,)).tolist()} for length in range(40, 160, 10)]


def train(model):
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(folder, packing=True, max_length=200, max_steps=3, logging_steps=1, report_to=[],
                             per_device_train_batch_size=1, save_strategy="no", bf16=False, use_cpu=True)  # fmt: skip
        trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


losses, expected = train(stream_backprop(streaming)), train(plain)
worst = max(abs(mine - its) for mine, its in zip(losses, expected, strict=True))
print(f"loss {losses[-1]:.4f}  layers streamed {streamed_layers(streaming)}  largest difference of a loss {worst:.1e}")
