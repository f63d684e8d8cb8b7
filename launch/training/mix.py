"""Which source each row of a mix is drawn from: in exact proportion all along, and known from the row's number alone.

Draws by chance wander from their weights, and a resumed run would have to count how often each source came. Here the
first n rows hold floor(n w) of the first source, of the rest the same share of the second, and so on: after any number
of rows each source has come as often as its weight says, to within a row a source.

    weights 0.5, 0.25, 0.25     row 0 1 2 3 4 5 6 7 ...      source 2 0 1 0 2 0 1 0 ...
"""

from collections.abc import Sequence

_WHOLE = 1 << 32


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers, so that every machine counts alike: of 2^32 rows, how many are a source's."""
    total = sum(weights)
    return tuple(max(1, round(weight / total * _WHOLE)) for weight in weights)


def source_of_row(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """The source of row `row`, and how many rows of that source came before it."""
    rest = sum(shares)
    for source, share in enumerate(shares[:-1]):
        before = row * share // rest
        if (row + 1) * share // rest > before:
            return source, before
        row, rest = row - before, rest - share
    return len(shares) - 1, row
