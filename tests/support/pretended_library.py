"""The functions by which torch's own C++ asks for the current device and stream, for a device that is pretended."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rank_pool import RankPool


def _why_not() -> str:
    if torch.cuda.is_available():
        return "there is a device: tests/gpu runs on it"
    if torch.version.cuda or torch.version.hip:
        return "torch is built for devices, and its own attention asks their driver"
    return "" if shutil.which("g++") else "no g++ here"


only_pretended = pytest.mark.skipif(_why_not() != "", reason=_why_not())
"""Of a module whose tests pretend devices: where that cannot be done, or one is there."""


def own_pool(world_size: int) -> Any:
    """A module's fixture: ranks that no other module has, for autograd counts the devices once a process."""

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        ranks = RankPool(world_size)
        yield ranks
        ranks.close()

    return pool


@cache
def library() -> ctypes.CDLL:
    """pretended_cuda.cpp, compiled. Cost: two seconds of a compiler, once a process."""
    compiler = shutil.which("g++")
    assert compiler is not None, "no g++ here"
    torch_folder, source = Path(torch.__file__).parent, Path(__file__).with_name("pretended_cuda.cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "pretended_cuda.so")
        given = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        subprocess.run([compiler, *given, str(source), "-lc10", "-ltorch_cpu", "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))
