"""The peak resident memory of a real training step in a fresh process, for run.py to compare with the dry run.

Kernel counters, not torch's: VmHWM is reset before the second step, and what the process held before the model was
built is taken off.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fourfold.profiling.decoder import local_model, summed_loss


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(
    config: dict[str, Any], micro_batch: int, seq_len: int, num_micro_batches: int, options: Any
) -> dict[str, float]:
    """Bytes above the process's own at the peak of a steady-state step, and that step's CPU seconds."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    # Kernels allocate their own work space on first use: let a small model make them do so.
    small = local_model({**config, "num_hidden_layers": 1}, num_layers=1)
    summed_loss(small, torch.zeros(1, 64, dtype=torch.int64)).backward()
    del small
    before = _status("VmRSS")
    model = local_model(config, num_layers=config["num_hidden_layers"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config["vocab_size"], (micro_batch, seq_len))
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        start = time.process_time()
        for _ in range(num_micro_batches):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = summed_loss(model, tokens, checkpointing=options.checkpointing)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()
    return {"peak_bytes": _status("VmHWM") - before, "cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=json.loads)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--num-micro-batches", type=int)
    parser.add_argument("--checkpointing")
    parser.add_argument("--dtype")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answer = measure(options.config, options.micro_batch, options.seq_len, options.num_micro_batches, options)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
