"""TRL's trainers on a few rows of words, for one process and for ranks; they import TRL when they are called."""

from typing import Any

import torch

from fourfold.parallel.testing.tiny_models import batch, tiny

STEPS = 3


def word_tokenizer() -> Any:
    """Of 94 words, with a chat template that marks what an assistant says."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(94))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    found.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' w1 ' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + ' w2 ' }}{% endif %}{% endfor %}"
    )
    return found


def text(ids: Any) -> str:
    """Words by their numbers."""
    return " ".join(f"w{int(index) % 94}" for index in ids)


def common(folder: Any, **changes: Any) -> dict[str, Any]:
    """Arguments that every trainer's settings have."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, "disable_tqdm": True, **changes,
    }  # fmt: skip


def sft(model, tokenizer, folder, rows=None, peft_config=None, **changes):
    import datasets
    import trl

    rows = rows or [{"text": text(row[: 9 + 2 * index])} for index, row in enumerate(batch(6, 24))]
    settings = trl.SFTConfig(**common(folder, **{"max_length": 24, **changes}))
    return trl.SFTTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


def completion_only(model, tokenizer, folder):
    rows = [{"prompt": text(row[:7]), "completion": text(row[7:])} for row in batch(6, 21)]
    return sft(model, tokenizer, folder, rows)


def dpo(model, tokenizer, folder):
    import datasets
    import trl

    rows = [
        {"prompt": text(row[:7]), "chosen": text(row[7:15]), "rejected": text(row[15:])} for row in batch(6, 24)
    ]  # fmt: skip
    settings = trl.DPOConfig(**common(folder))
    return trl.DPOTrainer(
        model,
        ref_model=tiny("llama"),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def grpo(model, tokenizer, folder):
    import datasets
    import trl

    rows = [{"prompt": text(row)} for row in batch(6, 7)]
    settings = trl.GRPOConfig(**common(folder, num_generations=2, max_completion_length=9))
    return trl.GRPOTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [float(len(set(each))) for each in completions],
    )  # fmt: skip


def run(trainer: Any) -> list[float]:
    """The losses of a training."""
    torch.manual_seed(0)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
