"""`torchrun ... -m fourfold.profiling.run --out cluster.toml`: a profile's rank entry, under the name users know.

On one machine `layout-advisor profile` starts the ranks by itself; on several hosts start this module with torchrun on
each of them. The entry itself is launch's, because it hands parallel's functions to profiling, which knows no sibling;
this is the one line that looks upward (an exception named in import contract 1).
"""

from fourfold.launch.profile_ranks import main

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

if __name__ == "__main__":
    main()
