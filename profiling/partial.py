"""What an interrupted profile leaves behind, so that the next one goes on from there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fourfold.profiling.cluster_file import write_atomically
from fourfold.profiling.session import Case, Timings
from fourfold.profiling.settings import ProfileSettings

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


class StaleProfileError(ValueError):
    """What an interrupted profile left does not fit this one."""


class PartialProfile:
    """The file OUT.partial beside OUT: all rounds so far, rewritten after each, removed at the end.

    Args:
        machine: what the timings hold for; another machine's are refused.
    """

    def __init__(self, settings: ProfileSettings, cases: Sequence[Case], machine: Mapping[str, Any]) -> None:
        self.path = settings.out.with_name(settings.out.name + ".partial")
        keys = "\n".join(sorted(case.key for case in cases))
        self._identity = {**machine, "cases": hashlib.sha256(keys.encode()).hexdigest()}

    def load(self) -> Timings:
        """The interrupted profile's timings; none where there is no such file.

        Raises:
            StaleProfileError: the file is of another machine or of other options, or broken.
        """
        if not self.path.exists():
            return Timings()
        try:
            table = json.loads(self.path.read_text())
            identity, timings = table["identity"], Timings(rounds=table["rounds"], elapsed_s=table["elapsed_s"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StaleProfileError(
                f"{self.path}: broken ({error!r}); remove it and profile without --resume"
            ) from None
        if identity != self._identity:
            differing = [name for name in self._identity if identity.get(name) != self._identity[name]]
            raise StaleProfileError(
                f"{self.path}: measured with other {', '.join(differing)}; profile without --resume"
            )
        return timings

    def save(self, timings: Timings) -> None:
        """Replace the file."""
        table = {"identity": self._identity, "rounds": timings.rounds, "elapsed_s": timings.elapsed_s}
        write_atomically(self.path, json.dumps(table))

    def remove(self) -> None:
        """The profile is whole; nothing to go on with."""
        self.path.unlink(missing_ok=True)
