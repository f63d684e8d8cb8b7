"""One mesh of a shape for all bodies that a rank runs: groups are made once, and their threads do not gather.

For bodies that end well, or not at all: what a body left underway in a group would reach the next one.
"""

from functools import cache

from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel import init_mesh


@cache
def shared_mesh(**shape: int) -> DeviceMesh:
    return init_mesh(**shape, device_type="cpu")
