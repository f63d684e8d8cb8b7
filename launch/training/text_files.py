"""Documents of text files, JSON lines and Parquet, a piece at a time: no file is ever held whole.

A piece of a text file ends at a line's end, so that a tokenizer sees whole lines.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

_PIECE_BYTES = 1 << 22
JSON_LINES, PARQUET, TOKENS = (".jsonl", ".ndjson", ".json"), (".parquet",), (".npy",)


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
        yield from (iter([text.encode()]) for text in _json_lines(path, column))
    elif path.suffix in PARQUET:
        yield from (iter([text.encode()]) for text in _parquet(path, column))
    else:
        yield _pieces(path)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece + file.readline()


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: line {number} is no JSON: give one object a line") from None
            yield _text_of(row, column, f"{path}: line {number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(f"{path}: Parquet needs a library: pip install 'fourfold[data]'") from None
    rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    for number, row in enumerate(rows):
        yield _text_of(row, column, f"{path}: row {number}")


def _text_of(row: object, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text in {column!r}: give --text-column")
    return text
