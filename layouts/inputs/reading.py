"""The one reader of files and values that a user gives: what comes out is text, tables, and finite, bounded numbers.

The standard library's parsers let through what no price can be made of (nan, infinity, whole numbers beyond 64 bits, a
byte order mark), and end in a RecursionError on brackets without end. Here each of these is a ValueError of one line
that names the file, the field, the value and the mend.
"""

import csv
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST = 1 << 31
"""Of a batch in sequences, a length in tokens, a width: products of two of them still fit 64 bits."""
MOST_DEVICES = 1 << 20
"""Ranks; ten times the largest cluster that has trained one model."""
MOST_NUMBER = 1e30
"""Of any figure with a unit: beyond peaks, bandwidths and memory of any machine."""
MOST_BYTES_OF_FILE = 1 << 28
BEYOND = "cells beyond the columns"
"""Under this name a row of `read_csv` has what stands behind its last column."""


def read_text(path: str | Path, mend: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        mend: what to do instead, for the error ("give a CSV of runs").
    Raises:
        ValueError: the file is missing, too large, or not text.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES_OF_FILE:
            raise ValueError(f"{path}: more than {MOST_BYTES_OF_FILE >> 20} MiB: {mend}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): {mend}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start}): {mend}") from None


def read_toml(path: str | Path, mend: str) -> dict[str, Any]:
    """A TOML file's table. Raises ValueError as `read_text`, and where it is not TOML."""
    text = read_text(path, mend)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError
        raise ValueError(f"{path}: not a TOML file ({_one_line(error)}): {mend}") from None


def read_json_object(path: str | Path, mend: str) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError as `read_text`, and where it is not an object of JSON."""
    text = read_text(path, mend)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({_one_line(error)}): {mend}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, but an object is needed: {mend}")
    return value


def read_csv(path: str | Path, mend: str) -> tuple[list[str], list[dict[str, str]]]:
    """A CSV file's column names, and its rows with every cell stripped.

    A row that goes on beyond the columns has the rest of it under BEYOND, for the reader to refuse: a cell too many in
    its middle has moved all that follow under wrong names. Blank cells at the end are no such thing.

    Raises:
        ValueError: as `read_text`, and where it is not a CSV or names a column twice.
    """
    text = read_text(path, mend)
    try:
        reader = csv.DictReader(text.splitlines(keepends=True))
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        rows = [_stripped(row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV ({error}): {mend}") from None
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: has two columns {twice!r}: {mend}")
    return header, rows


def _stripped(row: dict[str | Any, str | Any]) -> dict[str, str]:
    cells = {key: (value or "").strip() for key, value in row.items() if key}
    beyond = [cell.strip() for cell in row.get(None) or ()]
    return {**cells, BEYOND: ", ".join(beyond)} if any(beyond) else cells


def whole(value: object, name: str, *, least: int = 1, most: int = MOST) -> int:
    """A whole number within bounds. Raises ValueError with the name, the value and the bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={shown(value)}, but it is a whole number of at least {least}")
    if value > most:
        raise ValueError(f"{name}={shown(value)}, but it is at most {most}")
    return value


def number(value: object, name: str, *, zero: bool = False, most: float = MOST_NUMBER) -> float:
    """A finite number above 0 (or from 0 on). Raises ValueError with the name and the value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name}={shown(value)}, but it is a number {'of at least' if zero else 'above'} 0")
    if not value <= most:
        raise ValueError(f"{name}={shown(value)}, but it is a finite number of at most {most:g}")
    return float(value)


def whole_text(text: str, name: str, *, least: int = 1, most: int = MOST) -> int:
    """`whole` of a cell of a CSV: "16" and "16.0" are 16."""
    value = _parsed(text, name)
    if value != int(value) or value < least:
        raise ValueError(f"{name}={shortened(text)}: not a whole number of at least {least}")
    return whole(int(value), name, least=least, most=most)


def number_text(text: str, name: str, *, most: float = MOST_NUMBER) -> float:
    """`number` of a cell of a CSV."""
    value = _parsed(text, name)
    if not 0 < value <= most:
        raise ValueError(
            f"{name}={shortened(text)}: not a number above 0" + (f" and up to {most:g}" if value > 0 else "")
        )
    return value


def _parsed(text: str, name: str) -> float:
    try:
        value = float("" if "_" in text else text)  # Python reads "1_000" as a number, no other program does
    except ValueError:
        raise ValueError(f"{name}={shown(text)} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}={shortened(text)}: not a finite number")
    return value


def shown(value: object) -> str:
    """A value as an error prints it: on one line, and not longer than a line."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4,300 digits
        return f"a {type(value).__name__} too large to print"


def shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def finite(table: Mapping[str, Any], where: str) -> None:
    """Refuse a table that holds nan or infinity, however deep."""
    waiting: list[tuple[str, Any]] = [(where, table)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value!r}, but it is a finite number")
        if isinstance(value, Mapping):
            waiting += [(f"{name}: {key}", entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{name}: {index}", entry) for index, entry in enumerate(value)]


def _one_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "brackets nested too deep"
    return shortened(str(error).replace("\n", " "), 120)
