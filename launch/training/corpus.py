"""The text that is trained on and the text that is held out, as memory-mapped tokens.

Rank 0 tokenizes a file once and leaves the tokens in the run's folder; every rank maps them and reads the rows it needs
(data.py says which). A token is a byte where no tokenizer is given.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.agreement import on_rank_0
from fourfold.launch.training.data import Text, standard_library
from fourfold.launch.training.places import check_data, outside
from fourfold.launch.training.text_files import BOUNDS, TOKENS, documents, found_files
from fourfold.launch.training.watch import Activity

HELD_OUT_SHARE = 10
"""Without a validation file, one token in so many is held out: the last ones of each source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The texts of a training.

    Attributes:
        train_texts: one, or one a source where sources have weights.
        held_out_texts: likewise, or the validation files' one.
        identity: of what they were made from; a resumed run must have the same.
        unit: what a token is, for whoever reads a loss in nats: "byte" or "token".
        without_bounds: a file that does not say where its documents begin, if there is one.
    """

    train_texts: tuple[Text, ...]
    held_out_texts: tuple[Text, ...]
    identity: str
    unit: str
    without_bounds: str | None = None

    @property
    def train(self) -> Tensor:
        """The tokens of the first source, which is all where sources have no weights."""
        return self.train_texts[0].tokens

    @property
    def held_out(self) -> Tensor:
        """What is held out of it."""
        return self.held_out_texts[0].tokens


_TOKENIZER_FILE = re.compile(
    r"^(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|config\.json)|\.(model|tiktoken|bpe)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The files of a corpus; none where the demo's text is meant.

    Attributes:
        num_files: how many of `train` are each source's, where sources have weights; empty where they are one text.
    """

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    tokenizer: Path | None
    text_column: str
    num_files: tuple[int, ...] = ()

    def identity(self) -> str:
        """A checksum of the files' names, sizes and times, and of what makes tokens of them."""
        # Of the tokenizer's folder its own files alone: a run that is kept there, too, has others that come and go.
        found = sorted(self.tokenizer.iterdir()) if self.tokenizer is not None else []
        tokenizer = [path for path in found if _TOKENIZER_FILE.search(path.name)]
        told = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for path in (*self.train, *self.held_out, *self._bounds(), *tokenizer)
        ]
        described = [told, len(self.train), self.text_column, str(self.tokenizer and self.tokenizer.resolve())]
        described += [self.num_files] if self.num_files else []
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def _bounds(self) -> list[Path]:
        """The files that say where the documents of token files begin."""
        found = [bounds_of(path) for path in (*self.train, *self.held_out) if path.suffix in TOKENS]
        return [path for path in found if path.exists()]


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
    files = [outside(found_files([word], "data"), options.out, word, "data") for word in options.data]
    rest = [outside(found_files([word], "validation"), options.out, word, "validation") for word in options.validation]
    train, held_out = (tuple(path for source in each for path in source) for each in (files, rest))
    check_data(train, held_out)
    return Sources(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        text_column=options.text_column,
        num_files=tuple(map(len, files)) if options.data_weights else (),
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
        library, rest = standard_library()
        _check_vocabulary(255, vocab_size, "the text is bytes")
        return Corpus(train_texts=(library,), held_out_texts=(rest,), identity="standard library", unit="byte")
    assert out is not None
    folder = out / "tokens"
    told: dict[str, Any] = on_rank_0(lambda: _tokenized(sources, folder, sources.identity(), activity), long=True)
    _check_vocabulary(told["largest"], vocab_size, f"the tokens are those of {sources.tokenizer or 'bytes'}")
    train = _texts(folder, "train", told["train"])
    if sources.held_out:
        held_out = _texts(folder, "held_out", told["held_out"])
    else:
        train, held_out = zip(*map(_cut, train), strict=True)
    return Corpus(
        train_texts=train, held_out_texts=held_out, identity=told["identity"],
        unit="token" if sources.tokenizer else "byte", without_bounds=told["without_bounds"],
    )  # fmt: skip


def _texts(folder: Path, name: str, ends: Sequence[int]) -> tuple[Text, ...]:
    """The sources in one file of tokens, which end at `ends`."""
    tokens, documents = _mapped(folder / f"{name}.npy"), np.load(folder / f"{name}.documents.npy")
    parts = zip((0, *ends[:-1]), ends, strict=True)
    return tuple(
        Text(tokens[start:end], documents[(documents >= start) & (documents < end)] - start) for start, end in parts
    )


def _cut(text: Text) -> tuple[Text, Text]:
    """What is trained on, and the last tenth, which is held out; a document that lies across is two."""
    cut = len(text.tokens) - len(text.tokens) // HELD_OUT_SHARE
    assert text.documents is not None
    rest = text.documents[text.documents > cut] - cut
    return (
        Text(text.tokens[:cut], text.documents[text.documents < cut]),
        Text(text.tokens[cut:], np.concatenate([[0], rest])),
    )


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
        # An older version wrote no bounds of documents.
        if told["identity"] == identity and "train" in told and told["bytes"] == _sizes(folder):
            return told
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    encode = _encoder(sources.tokenizer)
    told = {"identity": identity, "largest": 0, "without_bounds": None, "held_out": []}
    for name, groups in (("train", _grouped(sources)), ("held_out", [sources.held_out] if sources.held_out else [])):
        if groups:
            pieces = (_pieces(files, sources, encode, activity) for files in groups)
            largest, told[name] = _write_tokens(partial / f"{name}.npy", pieces)
            told["largest"] = max(told["largest"], largest)
    unsaid = [path for path in (*sources.train, *sources.held_out) if path.suffix in TOKENS]
    told["without_bounds"] = next((str(path) for path in unsaid if not bounds_of(path).exists()), None)
    told["bytes"] = _sizes(partial)
    (partial / "tokens.json").write_text(json.dumps(told))
    for path in partial.iterdir():  # a power cut must not leave the note of files that it has emptied
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return told


def _sizes(folder: Path) -> dict[str, int]:
    """Of the token files, in bytes: one that was cut off is made again."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}


def _grouped(sources: Sources) -> list[tuple[Path, ...]]:
    """The files of each source; all of them where they are one text."""
    if not sources.num_files:
        return [sources.train]
    ends = np.cumsum(sources.num_files).tolist()
    return [sources.train[end - count : end] for end, count in zip(ends, sources.num_files, strict=True)]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some tokens, and which of them begin a document."""

    tokens: np.ndarray
    starts: Sequence[int] | NDArray[np.int64]


def _pieces(files: Sequence[Path], sources: Sources, encode: "Encoder", activity: Activity) -> Iterator[_Piece]:
    """The tokens of the files, piece by piece."""
    for path in files:
        if path.suffix in TOKENS:
            tokens = _token_file(path)
            yield _Piece(tokens, _document_starts(path, len(tokens)))
            continue
        num_bytes = 0
        for document in documents(path, sources.text_column):
            begun = False
            for piece in chain(document, [None]):
                if piece is not None:
                    activity.now(f"tokenizing {path.name} ({num_bytes >> 20} MiB)")
                    num_bytes += len(piece)
                tokens = encode(piece, path)
                if len(tokens):
                    yield _Piece(tokens, () if begun else (0,))
                    begun = True


def bounds_of(path: Path) -> Path:
    """Where the documents of a file of tokens are told: `web.npy` has its own in `web.documents.npy`."""
    return path.with_name(path.stem + BOUNDS)


def _document_starts(path: Path, num_tokens: int) -> NDArray[np.int64]:
    """The places of documents' first tokens in a file of tokens: one document where nothing is told."""
    told = bounds_of(path)
    if not told.exists():
        return np.zeros(min(1, num_tokens), dtype=np.int64)
    starts = _loaded(told)
    whole = starts.ndim == 1 and starts.dtype.kind in "iu" and len(starts) > 0
    if not whole or (np.diff(starts.astype(np.int64)) <= 0).any() or starts[0] != 0 or starts[-1] >= num_tokens:
        raise ValueError(
            f"{told}: gives the place of each document's first token in {path.name}: one row of whole numbers that "
            f"rise from 0 and stay below its {num_tokens} tokens"
        )
    return starts.astype(np.int64)


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


def _loaded(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a NumPy file of tokens ({str(error).splitlines()[0]})") from None


def _token_file(path: Path) -> np.ndarray:
    tokens = _loaded(path)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (len(tokens) and tokens.min() < 0):
        raise ValueError(f"{path}: {tokens.dtype}{tokens.shape}, but tokens are one row of whole numbers from 0 on")
    return tokens


def _write_tokens(path: Path, sources: Iterable[Iterable[_Piece]]) -> tuple[int, list[int]]:
    """Write the pieces of all sources as one array of the dtype of the first, and where documents begin.

    Returns:
        The largest token, and where each source ends.
    """
    count, largest, dtype = 0, 0, None
    starts: list[NDArray[np.int64]] = []
    ends: list[int] = []
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        for source in sources:
            for piece in source:
                tokens = piece.tokens
                if not len(tokens):
                    continue
                largest = max(largest, int(tokens.max()))
                dtype = dtype or (np.dtype(np.uint8) if tokens.dtype == np.uint8 else np.dtype(np.int32))
                if largest > np.iinfo(dtype).max:
                    raise ValueError(f"a token of {largest}, beyond {dtype}: give token files of one kind")
                file.write(tokens.astype(dtype).tobytes())
                starts.append(np.asarray(piece.starts, dtype=np.int64) + count)
                count += len(tokens)
            if count == (ends[-1] if ends else 0):
                raise ValueError("the data holds no token: give files with text")
            ends.append(count)
    assert dtype is not None
    whole = np.memmap(raw, dtype=dtype, mode="r", shape=(count,))
    np.save(path, whole, allow_pickle=False)
    np.save(path.with_suffix(".documents.npy"), np.concatenate(starts), allow_pickle=False)
    raw.unlink()
    return largest, ends
