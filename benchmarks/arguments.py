"""Argument types of the benchmarks' command lines: what cannot be measured is refused before anything is measured."""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def amount(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 0")
    return value


def table_file(text: str) -> Path:
    """A file that is there or can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: give a file in a folder that is there")
    return path


def stored_rows(parser: argparse.ArgumentParser, path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table of these columns, none where there is no file; ends the program where it is another table."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or fields) != tuple(fields) or any(None in row.values() or None in row for row in rows):
        parser.error(f"{path} has other columns than {', '.join(fields)}: give another file, or move it away")
    return rows
