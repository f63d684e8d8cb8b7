"""Batches of tokens in an order that is the same under every layout and goes on where it was left.

    batches = TokenBatches(tokens, seq_len=1024, global_batch=16, rows=model.batch_rows(16))
    for ids in batches:
        ...
    torch.save(batches.state_dict(), path)

A batch depends on the seed, the step and the row alone, so the state is one number, whatever the layout. The names are
those that torchdata's StatefulDataLoader looks for; workers have nothing to do here, because a row is a slice of
memory-mapped tokens.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.utils.data import IterableDataset

from fourfold.launch.training.data import training_rows


class TokenBatches(IterableDataset[Tensor]):
    """Endless batches: [rows, seq_len] int64 each.

    Args:
        tokens: one-dimensional, of any integer dtype; memory-mapped ones are read row by row.
        seq_len: tokens a row.
        global_batch: rows a step over all dp ranks.
        rows: those of this dp rank, as ParallelModel.batch_rows gives them; None for all.
    Raises:
        ValueError: fewer tokens than a row, no row, or a row of one token, which has nothing to predict.
    """

    def __init__(
        self, tokens: Tensor, *, seq_len: int, global_batch: int, rows: slice | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}: give one row of whole numbers")
        if seq_len < 2 or global_batch < 1:
            raise ValueError(f"seq_len={seq_len}, global_batch={global_batch}: at least 2 tokens and one row")
        if len(tokens) < seq_len:
            raise ValueError(f"seq_len={seq_len}, but there are {len(tokens)} tokens: use a shorter one")
        self._tokens, self._seq_len, self._global_batch = tokens, seq_len, global_batch
        self._rows = slice(0, global_batch) if rows is None else rows
        self._seed = seed
        self.step = 0
        """Of the batch that comes next."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            step, self.step = self.step, self.step + 1
            yield training_rows(
                self._tokens, seq_len=self._seq_len, global_batch=self._global_batch, step=step, seed=self._seed,
                rows=self._rows,
            )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, and what makes it."""
        return {
            "step": self.step, "seed": self._seed, "seq_len": self._seq_len, "global_batch": self._global_batch,
            "num_tokens": len(self._tokens),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there, under any layout. Raises ValueError where the order would be another."""
        for name, value in self.state_dict().items():
            if name != "step" and state[name] != value:
                raise ValueError(f"the batches were of {name}={state[name]}, these are of {value}: give the same")
        self.step = state["step"]
