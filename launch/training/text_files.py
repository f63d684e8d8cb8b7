"""Documents of text files, JSON lines and Parquet, a piece at a time: no file is ever held whole.

A piece of a text file ends at a line's end, so that a tokenizer sees whole lines.
"""

import glob
import json
import logging
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

_PIECE_BYTES = 1 << 22
JSON_LINES, PARQUET, TOKENS = (".jsonl", ".ndjson", ".json"), (".parquet",), (".npy",)
BOUNDS = ".documents.npy"
"""How the name of a file ends that says where the documents of a file of tokens begin; it is no file of tokens."""


def found_files(words: Sequence[str], key: str) -> list[Path]:
    """The files that `words` (files, folders, patterns) mean, in a fixed order.

    Raises:
        ValueError: a word that means none.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(part for part in path.rglob("*") if part.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(part for part in Path(path.anchor or ".").glob(word.lstrip("/")) if part.is_file())
        found = [part for part in found if not part.name.endswith(BOUNDS)]
        if not found:
            raise ValueError(f"{key}={word!r}: no such file; give a file, a folder or a pattern")
        files += found
    return files


def documents(path: Path, column: str) -> Iterator[Iterator[bytes]]:
    """Each document of a file as pieces of UTF-8; a text file is one document.

    Args:
        column: that holds the text, in JSON lines and Parquet.
    Raises:
        ValueError: a line that is no JSON object, a row without the column, or Parquet without its library.
    """
    if path.suffix in JSON_LINES:
        yield from (iter([text]) for text in _json_lines(path, column))
    elif path.suffix in PARQUET:
        yield from (iter([text]) for text in _parquet(path, column))
    else:
        yield _pieces(path)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        start = file.read(len(BOM_UTF8))
        piece = b"" if start == BOM_UTF8 else start  # the mark of a text's encoding is not part of the text
        while more := piece + file.read(_PIECE_BYTES):
            piece = b""
            more += file.readline()
            if b"\0" in more:
                raise ValueError(
                    f"{path}: holds zero bytes, so it is no text: give UTF-8, or tokens as .npy; "
                    "what is not UTF-8 is not read"
                )
            yield more


def _json_lines(path: Path, column: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: line {number} is no JSON: give one object a line") from None
            yield _text_of(row, column, f"{path}: line {number}")


def _parquet(path: Path, column: str) -> Iterator[bytes]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ValueError(f"{path}: Parquet needs a library: pip install 'fourfold[data]'") from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it tells of a broken file first, in its own words
    try:
        rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
        columns = rows.features if rows.features is not None else {column: None}
        texts = iter(rows.select_columns(column) if column in columns else rows)
        first = next(texts, None)
    except Exception as error:  # of many kinds: pyarrow's own and the library's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a Parquet file ({reason})") from None
    for number, row in enumerate(chain([] if first is None else [first], texts)):
        yield _text_of(row, column, f"{path}: row {number}")


def _text_of(row: object, column: str, where: str) -> bytes:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text in {column!r}: give --text-column")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character: mend or drop it") from None
