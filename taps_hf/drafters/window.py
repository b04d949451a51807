"""How far back a feature drafter looks: its last slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Slots = tuple[torch.Tensor, torch.Tensor]
"""Tokens (n,) and the features before them, (n, hidden)."""


@dataclass(frozen=True)
class Window:
    """Which slots of its context a drafter sees.

    Drafters are trained on texts of some length. Beyond it they foresee less, and reading a long
    prompt takes them time. A one-layer drafter's keys and values depend on nothing but their own
    slot, so what lies outside of the window needs not be run, and when the rest is does not matter.

    Args:
        size: slots that are seen, the last ones; None for all.
    """

    size: int | None = None

    def outside(self, past: int) -> int:
        """How many of `past` slots, the first ones, are not seen from behind them."""
        return 0 if self.size is None else max(past - self.size, 0)

    def band(self, past: int, new: int, device: torch.device) -> torch.Tensor | None:
        """(new, past + new) bool: what new slots see; None if that is all that stands before."""
        if self.size is None or past + new <= self.size:
            return None
        keys = torch.arange(past + new, device=device)
        queries = keys[past:, None]
        return (keys <= queries) & (keys > queries - self.size)

    def needed(self, new: Sequence[Slots]) -> list[Slots]:
        """Of new slots those that the last of them sees."""
        total = sum(len(tokens) for tokens, _ in new)
        if self.size is None or total <= self.size:
            return list(new)
        tokens, features = (torch.cat(parts)[-self.size :] for parts in zip(*new))
        return [(tokens, features)]
