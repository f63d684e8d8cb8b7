"""Where the tests' processes come from: a server that has torch, transformers and fourfold loaded, and forks.

Importing them costs a process five seconds of a core. The server imports them once a session; its children are
processes like any other. Not loaded is what a child runs as its main module: that shall run from its first line.
"""

import gc
import multiprocessing
from multiprocessing.context import ForkServerContext

_LOADED = [
    "pytest",
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "fourfold.launch.train_layout",
    "fourfold.launch.train_options",
    "fourfold.launch.training.async_loop",
    "fourfold.launch.training.run",
    "fourfold.launch.training.undrained",
    "fourfold.parallel.decoder.async_pipeline",
    "fourfold.parallel.decoder.parallel_model",
    "fourfold.parallel.decoder.parallelize",
    "fourfold.parallel.testing.reference",
    "fourfold.parallel.testing.tiny_models",
]


def keep_what_was_loaded() -> None:
    """Called first in a child: the garbage collector leaves the server's objects alone, and so shared with it.

    Going through all of them takes most of a second, and copies the pages they lie in.
    """
    gc.freeze()


def fork_server() -> ForkServerContext:
    """The multiprocessing context of that server, which starts with the first process that is asked for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context
