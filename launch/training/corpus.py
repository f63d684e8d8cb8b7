"""The text that is trained on and the text that is held out, as memory-mapped tokens.

Rank 0 tokenizes a file once and leaves the tokens in the run's folder; every rank maps them and reads the rows it needs
(data.py says which). A token is a byte where no tokenizer is given.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.agreement import on_rank_0
from fourfold.launch.training.data import read_standard_library
from fourfold.launch.training.text_files import TOKENS, documents, found_files
from fourfold.launch.training.watch import Activity

HELD_OUT_SHARE = 10
"""Without a validation file, one token in so many is held out: the last ones of the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Tokens, one-dimensional, of any integer dtype.

    Attributes:
        identity: of what they were made from; a resumed run must have the same.
        unit: what a token is, for whoever reads a loss in nats: "byte" or "token".
    """

    train: Tensor
    held_out: Tensor
    identity: str
    unit: str


_TOKENIZER_FILE = re.compile(
    r"^(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|config\.json)|\.(model|tiktoken|bpe)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The files of a corpus; none where the demo's text is meant."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    tokenizer: Path | None
    text_column: str

    def identity(self) -> str:
        """A checksum of the files' names, sizes and times, and of what makes tokens of them."""
        # Of the tokenizer's folder its own files alone: a run that is kept there, too, has others that come and go.
        found = sorted(self.tokenizer.iterdir()) if self.tokenizer is not None else []
        tokenizer = [path for path in found if _TOKENIZER_FILE.search(path.name)]
        told = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for path in (*self.train, *self.held_out, *tokenizer)
        ]
        described = [told, len(self.train), self.text_column, str(self.tokenizer and self.tokenizer.resolve())]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def found_sources(options: TrainOptions) -> Sources:
    """The files that `options` mean. Raises ValueError for one that is none, or no folder to keep tokens in."""
    tokenizer = Path(options.tokenizer) if options.tokenizer is not None else None
    if tokenizer is not None and not tokenizer.is_dir():
        raise ValueError(f"tokenizer={options.tokenizer!r}: no such folder; give that of a transformers tokenizer")
    if options.validation and not options.data:
        raise ValueError("validation without data: give --data, or leave both out for the demo's text")
    if tokenizer is not None and not options.data:
        raise ValueError("tokenizer without data: give --data, or leave both out for the demo's text")
    if options.data and options.out is None:
        raise ValueError("data needs a folder for its tokens: give --out DIR")
    return Sources(
        train=tuple(found_files(options.data, "data")),
        held_out=tuple(found_files(options.validation, "validation")),
        tokenizer=tokenizer,
        text_column=options.text_column,
    )


def read_corpus(sources: Sources, out: Path | None, vocab_size: int, activity: Activity) -> Corpus:
    """The corpus of `sources`; every rank calls.

    Args:
        out: the run's folder, on a file system that all ranks see.
    Raises:
        ValueError: on every rank: a file that cannot be read, no tokens, or one that the model has no embedding for.
    Cost: tokenizing once, on rank 0; afterwards no memory but what is read.
    """
    if not sources.train:
        train, held_out = read_standard_library()
        _check_vocabulary(255, vocab_size, "the text is bytes")
        return Corpus(train=train, held_out=held_out, identity="standard library", unit="byte")
    assert out is not None
    folder, identity = out / "tokens", sources.identity()
    told: dict[str, Any] = on_rank_0(lambda: _tokenized(sources, folder, identity, activity))
    _check_vocabulary(told["largest"], vocab_size, f"the tokens are those of {sources.tokenizer or 'bytes'}")
    train = _mapped(folder / "train.npy")
    if sources.held_out:
        held_out = _mapped(folder / "held_out.npy")
    else:
        cut = len(train) - len(train) // HELD_OUT_SHARE
        train, held_out = train[:cut], train[cut:]
    return Corpus(train=train, held_out=held_out, identity=identity, unit="token" if sources.tokenizer else "byte")


def _check_vocabulary(largest: int, vocab_size: int, what: str) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}, but {what}, up to {largest}: the model needs at least {largest + 1}"
        )


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))  # "c": a tensor wants to be writable


def _tokenized(sources: Sources, folder: Path, identity: str, activity: Activity) -> dict[str, Any]:
    """Make the token files of `folder`, unless they are those of `identity`; what was found about them."""
    try:
        told: dict[str, Any] = json.loads((folder / "tokens.json").read_text())
        if told["identity"] == identity:
            return told
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    encode = _encoder(sources.tokenizer)
    largest = 0
    for name, files in (("train", sources.train), ("held_out", sources.held_out)):
        if files:
            largest = max(largest, _write_tokens(partial / f"{name}.npy", _pieces(files, sources, encode, activity)))
    told = {"identity": identity, "largest": largest}
    (partial / "tokens.json").write_text(json.dumps(told))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return told


def _pieces(files: Sequence[Path], sources: Sources, encode: "Encoder", activity: Activity) -> Iterator[np.ndarray]:
    """The tokens of the files, piece by piece."""
    for path in files:
        if path.suffix in TOKENS:
            yield _token_file(path)
            continue
        num_bytes = 0
        for document in documents(path, sources.text_column):
            for piece in document:
                activity.now(f"tokenizing {path.name} ({num_bytes >> 20} MiB)")
                num_bytes += len(piece)
                yield encode(piece, path)
            yield encode(None, path)


Encoder = Callable[[bytes | None, Path], np.ndarray]
"""Tokens of a piece of a document; of a document's end for None."""


def _encoder(tokenizer: Path | None) -> Encoder:
    if tokenizer is None:
        return lambda piece, path: np.frombuffer(b"\n" if piece is None else piece, dtype=np.uint8)
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{tokenizer}: no tokenizer that transformers reads ({reason})") from None
    end = np.array([made.eos_token_id] if made.eos_token_id is not None else [], dtype=np.int32)

    def encode(piece: bytes | None, path: Path) -> np.ndarray:
        if piece is None:
            return end
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason}): a tokenizer needs text") from None
        return np.array(made(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    return encode


def _token_file(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a NumPy file of tokens ({str(error).splitlines()[0]})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (len(tokens) and tokens.min() < 0):
        raise ValueError(f"{path}: {tokens.dtype}{tokens.shape}, but tokens are one row of whole numbers from 0 on")
    return np.asarray(tokens)


def _write_tokens(path: Path, pieces: Iterator[np.ndarray]) -> int:
    """Write the pieces as one array of the dtype of the first; the largest token."""
    count, largest, dtype = 0, 0, None
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        for piece in pieces:
            if not len(piece):
                continue
            largest = max(largest, int(piece.max()))
            dtype = dtype or (np.dtype(np.uint8) if piece.dtype == np.uint8 else np.dtype(np.int32))
            if largest > np.iinfo(dtype).max:
                raise ValueError(f"a token of {largest}, beyond {dtype}: give token files of one kind")
            file.write(piece.astype(dtype).tobytes())
            count += len(piece)
    if dtype is None:
        raise ValueError("the data holds no token: give files with text")
    whole = np.memmap(raw, dtype=dtype, mode="r", shape=(count,))
    np.save(path, whole, allow_pickle=False)
    raw.unlink()
    return largest
