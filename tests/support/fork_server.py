"""Where the tests' processes come from: a server that has torch and transformers loaded, and forks.

Importing the two costs a process four seconds of a core. The server imports them once a session; its children are
processes like any other, and import fourfold themselves, from where the test that started them does.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

_LOADED = [
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
]


def fork_server() -> ForkServerContext:
    """The multiprocessing context of that server, which starts with the first process that is asked for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context
