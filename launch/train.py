"""Train under a layout: `torchrun --nproc-per-node N -m fourfold.launch.train --layout layout.toml --steps 100`.

Every rank runs this file, started by torchrun, mpiexec or srun; the number of ranks must be the layout's. Rank 0,
or the last stage's first rank where the pipeline never drains, shows progress, and with --out writes `metrics.csv` (a
row a step) and `result.json`. `--config train.toml` holds any of the options. `layout-advisor launch` starts the same
through torch's elastic agent.
"""

import sys
import traceback

from fourfold.launch.parent import parent_at_start  # isort: skip  (before torch: a launcher may go while it is imported)

from fourfold.launch.error_file import recorded
from fourfold.launch.refusal import EXIT_STOPPED, leave, lost_neighbour, refuse, tell_lost_neighbour, tell_stopped
from fourfold.launch.train_options import read_options
from fourfold.launch.training.run import adopt_ranks, run_training
from fourfold.launch.training.watch import Activity


@recorded
def main() -> None:
    """Train on this rank as the command line says. Exit code 2 and one line for what a user got wrong."""
    activity = Activity()
    try:
        adopt_ranks(parent_at_start())
        run_training(read_options(sys.argv[1:]), activity)
    except ValueError as error:
        refuse(error)
    except FloatingPointError as error:  # of a pipeline that never drains only the last stage knows it
        refuse(error, patience_s=2.0)
    except (RuntimeError, ConnectionError) as error:
        if not lost_neighbour(error):
            raise
        tell_lost_neighbour(error, activity.words)
    except OSError as error:  # a file or folder that the system does not give; the rank that wanted it says so
        if error.filename is None:
            raise
        refuse(ValueError(f"{error.filename}: {error.strerror}, in {activity.words}"), patience_s=2.0)


def _end() -> None:
    """Run `main` and leave with its exit code, on every path in the same order: results, messages, end."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        tell_stopped()
        code = EXIT_STOPPED
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    _end()
