"""What a checkpoint consists of: its files with their checksums, and the settings of the run that wrote it.

torch.distributed.checkpoint writes shards and reads them back without looking whether they are what was written: a
flipped byte becomes a wrong weight. Here a checksum is taken of the bytes as they are handed to the file system, not of
what it kept; a file that reads back otherwise is damaged, whoever did it.

    {"schema": 1, "step": 40, "settings": {"seed": 0, ...}, "files": {"__0_0.distcp": {"bytes": ..., "sha256": ...}},
     "sha256": of all the rest}
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Checksum:
    """Of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of one checkpoint.

    Attributes:
        settings: of the run that wrote it, flat: the model's config, seed, batch, rates.
        files: each file's checksum, the manifest's own left out.
    """

    step: int
    settings: Mapping[str, Any]
    files: Mapping[str, Checksum]

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`, on the disk on return."""
        table: dict[str, Any] = {
            "schema": 1,
            "step": self.step,
            "settings": dict(self.settings),
            "files": {name: asdict(checksum) for name, checksum in sorted(self.files.items())},
        }
        with (folder / MANIFEST).open("w") as file:
            json.dump(table | {"sha256": _checksum_of_table(table)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises ValueError, which says what is wrong with the manifest, where there is no whole one."""
        try:
            table = json.loads((folder / MANIFEST).read_text())
            stated = table.pop("sha256")
            if stated != _checksum_of_table(table):
                raise ValueError
            files = {name: Checksum(**checksum) for name, checksum in table["files"].items()}
            return Manifest(step=table["step"], settings=table["settings"], files=files)
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{MANIFEST} is damaged") from None


def damage(folder: Path, files: Mapping[str, Checksum], names: Sequence[str]) -> list[str]:
    """What is wrong with each of the files `names` of a checkpoint; empty where they are as they were written.

    Cost: each file is read once.
    """
    found = []
    for name in names:
        wanted = files[name]
        try:
            has = checksum_of_file(folder / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        else:
            if has.bytes != wanted.bytes:
                found.append(f"{name} has {has.bytes:,} bytes, but {wanted.bytes:,} were written")
            elif has.sha256 != wanted.sha256:
                found.append(f"{name} holds other bytes than were written")
    return found


def checksum_of_file(path: Path) -> Checksum:
    """Of what the disk has, where the system lets go of what it remembers of the file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return Checksum(size, digest.hexdigest())


class ChecksummingFileSystem(FileSystem):
    """torch's file system for checkpoints, which also takes the checksum of every file as it is written.

    Attributes:
        written: the checksums so far, by file name.
        failure: what the file system said when it would not take a byte; torch tells of its own writer instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, Checksum] = {}
        self.failure: str | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if "w" not in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        # torch writes its table of contents beside its place and renames it.
        name = Path(path).name.removesuffix(".tmp")
        try:
            with super().create_stream(path, mode) as stream:
                checked = _ChecksummingStream(stream, self._note_failure)
                yield cast(io.IOBase, checked)
        except OSError as error:
            self._note_failure(error)
            raise
        self.written[name] = checked.checksum()

    def _note_failure(self, error: OSError) -> None:
        self.failure = self.failure or error.strerror or str(error)


class _ChecksummingStream:
    """A binary stream that only goes forward."""

    def __init__(self, stream: Any, on_failure: Callable[[OSError], None]) -> None:
        self._stream, self._on_failure = stream, on_failure
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        try:
            return int(self._stream.write(data))
        except OSError as error:
            self._on_failure(error)
            raise

    def checksum(self) -> Checksum:
        return Checksum(self._bytes, self._digest.hexdigest())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _checksum_of_table(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
