"""Run as `python -m failing_rank HOW`: rank 1 fails, rank 0 waits for it."""

import os
import signal
import sys

import torch.distributed as dist

from fourfold.launch.error_file import recorded


@recorded
def main() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if sys.argv[1] == "raise":
            raise ArithmeticError("deliberate failure of rank 1")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


if __name__ == "__main__":
    main()
