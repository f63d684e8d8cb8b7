"""The command `layout-advisor`: a function a command, each in its own file; what a user got wrong, in one line."""

import signal
import sys

import typer

from fourfold.launch.commands.calibrate import calibrate
from fourfold.launch.commands.demo import demo
from fourfold.launch.commands.explain import compare, explain
from fourfold.launch.commands.export import export
from fourfold.launch.commands.inverse import cheapest, largest, longest
from fourfold.launch.commands.launch import ResumingCommand, launch
from fourfold.launch.commands.plan import plan
from fourfold.launch.commands.profile import profile
from fourfold.launch.commands.train import train
from fourfold.launch.commands.validate import validate
from fourfold.launch.processes import RankFailure
from fourfold.launch.refusal import EXIT_REFUSED, EXIT_TOLD

app = typer.Typer(
    help="Measure a cluster, rank the ways to lay a model's training out on it, launch the best, and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, profile, plan, explain, compare, longest, largest, cheapest, export, validate, calibrate):
    app.command()(command)
app.command(cls=ResumingCommand)(launch)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)


def main() -> None:
    """Run the command line. Exit code 2 with one line for what a user got wrong, 1 for a rank that failed."""
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _stopped(signal.SIGINT)
    except RankFailure as failure:
        if failure.exit_code not in (EXIT_REFUSED, EXIT_TOLD):  # with these the rank has said why itself
            print(failure, file=sys.stderr)
        sys.exit(EXIT_REFUSED if failure.exit_code == EXIT_REFUSED else 1)
    except Exception as error:
        # torch's elastic agent turns a signal into an exception of its own, once it has ended the ranks.
        if type(error).__name__ != "SignalException":
            raise
        _stopped(int(error.sigval))  # type: ignore[attr-defined]


def _stopped(by: int) -> None:
    print("stopped; all ranks have ended (a training with checkpoints goes on with --resume)", file=sys.stderr)
    sys.exit(128 + by)


if __name__ == "__main__":
    main()
