"""K heads as one: what each drafter scores, which need not be the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .stacks import Place, StackedLinear


class StackedHead(nn.Module):
    """Scores of K drafters' states.

    Args:
        hidden: width of the states.
        sizes: how many tokens each drafter scores.
        vocabularies: whether these are tokens of its own choice; otherwise they are all.
        own: whether the rows are the drafters' own and are loaded with them; otherwise they are
            the target's: see [`copy_rows`].
    """

    def __init__(self, hidden: int, sizes: Sequence[int], vocabularies: bool, own: bool) -> None:
        super().__init__()
        count, most = len(sizes), max(sizes)
        self.sizes, self.own = tuple(sizes), own
        self.rows = StackedLinear(count, hidden, most)
        self.rows.weight.zero_()  # of a shorter vocabulary the last ones are never loaded
        # (K, scored) int64; None where all tokens are scored.
        ids = torch.zeros(count, most, dtype=torch.int64) if vocabularies else None
        self.register_buffer("token_ids", ids)
        # (K, 1, scored) bool, where sizes differ.
        unscored = torch.arange(most) >= torch.tensor(self.sizes)[:, None, None]
        self.register_buffer("unscored", unscored if len(set(sizes)) > 1 else None)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(K, n, scored) from (K, n, hidden); -inf where a drafter scores fewer tokens."""
        logits = self.rows(states)
        return logits if self.unscored is None else logits.masked_fill(self.unscored, -torch.inf)

    def copy_rows(self, rows: torch.Tensor) -> None:
        """Take the target's rows of the tokens that are scored, (K, scored, hidden)."""
        self.rows.weight.copy_(rows)

    def places(self, drafter: int) -> dict[str, Place]:
        """See [`HasPlaces`]."""
        rows = self.rows.weight[drafter]
        size, hidden = self.sizes[drafter], rows.shape[1]
        found = {}
        if self.token_ids is not None:
            found["draft_token_ids"] = Place((size,), self.token_ids[drafter, :size])
        if self.own:
            found["lm_head.weight"] = Place((size, hidden), rows[:size])
        return found
