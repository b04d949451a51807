"""Whose token is proposed: several drafters score, the surest one's best token is taken."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Best:
    """What drafters would propose after some tokens.

    Args:
        tokens: (K, n) int64: each drafter's likeliest token, as the target numbers them.
        confidences: (K, n) float32: log-probabilities of these.
    """

    tokens: torch.Tensor
    confidences: torch.Tensor


def best_tokens(logits: torch.Tensor, token_ids: torch.Tensor | None) -> Best:
    """The likeliest token of each drafter, after each row.

    Args:
        logits: (K, n, scored): -inf where a drafter scores fewer tokens than others.
        token_ids: (K, scored) int64: which tokens these are; None where all are scored.
    """
    scores, places = logits.float().max(dim=-1)
    confidences = scores - logits.float().logsumexp(dim=-1)
    tokens = places if token_ids is None else token_ids.gather(1, places)
    return Best(tokens, confidences)


def surest(best: Best) -> torch.Tensor:
    """(n,) int64: the drafter whose best token is likeliest; of equals the first."""
    return best.confidences.argmax(dim=0)


def chosen(each: torch.Tensor, drafters: torch.Tensor) -> torch.Tensor:
    """(n, ...) of (K, n, ...): row by row that of the chosen drafter.

    Args:
        each: what drafters have.
        drafters: (n,) int64.
    """
    index = drafters.view(1, -1, *[1] * (each.dim() - 2))
    return each.gather(0, index.expand(1, *each.shape[1:]))[0]


class Evidence:
    """How sure each drafter has been in each request so far: for routing per request.

    Args:
        count: K.
        slots: how many requests can be remembered at once.
        device: of the sums.
    """

    def __init__(self, count: int, slots: int, device: torch.device | str) -> None:
        self._sums = torch.zeros(slots, count, device=device)

    def forget(self, slots: torch.Tensor) -> None:
        """Begin new requests in these slots, (m,) int64."""
        self._sums[slots] = 0

    def surest(self, best: Best, slots: torch.Tensor) -> torch.Tensor:
        """Add what drafters say now; who has been surest on average since the request began.

        Args:
            best: after n rows.
            slots: (n,) int64: of the requests of these rows, all different.

        Returns:
            (n,) int64; of equals the first.
        """
        # All drafters are counted equally often, so that sums compare as means do.
        self._sums[slots] += best.confidences.t()
        return self._sums[slots].argmax(dim=1)


class Trust:
    """How often each drafter has been right in each request of late: for routing per draft.

    All drafters foresee the first token of a draft, whoever drafts the rest, and when it has been
    verified it is known who was right. So nothing has to be tried out. A drafter's confidence is
    multiplied by the square of the share of first tokens in which it was right, where the last
    twenty or so count, and eight before the first count as half right. In drafts of four tokens
    (docs/serving.md) that makes up most of what confidences alone lose to the specialist; between a
    factor and the cube, and for longer and shorter memories, it differs little.

    Args:
        count: K.
        slots: how many requests can be remembered at once.
        device: of the counts.
    """

    POWER, KEPT, BEFORE = 2, 0.95, 8.0

    def __init__(self, count: int, slots: int, device: torch.device | str) -> None:
        # How many there were is the same for all of a request, and nothing to compare them by.
        self._right = torch.full((slots, count), self.BEFORE / 2, device=device)

    def forget(self, slots: torch.Tensor) -> None:
        """Begin new requests in these slots, (m,) int64."""
        self._right[slots] = self.BEFORE / 2

    def hear(self, slots: torch.Tensor, foreseen: torch.Tensor, emitted: torch.Tensor) -> None:
        """Remember who was right.

        Args:
            slots: (n,) int64: of requests, all different.
            foreseen: (K, n) int64: what each drafter thought that the next token would be.
            emitted: (n,) integers: what it was.
        """
        right = (foreseen == emitted).t().to(self._right.dtype)
        self._right[slots] = self.KEPT * self._right[slots] + right

    def surest(self, best: Best, slots: torch.Tensor) -> torch.Tensor:
        """Whose first token is likeliest to be right.

        Args:
            best: after n rows.
            slots: (n,) int64: of the requests of these rows.

        Returns:
            (n,) int64; of equals the first.
        """
        scores = best.confidences.t() + self.POWER * self._right[slots].log()
        return scores.argmax(dim=1)


class Slots:
    """Which request is remembered where.

    Args:
        count: how many can be at once.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._of: dict[str, int] = {}

    def of(self, requests: Sequence[str], alive: Container[str]) -> tuple[list[int], list[int]]:
        """The slots of a batch of requests, and those of them that are new.

        Those of requests that have ended are given back. Those of requests that only wait (there
        may be more of them than slots) are given away when others need them.

        Args:
            requests: of the batch.
            alive: all that have not ended.

        Raises:
            ValueError: for more requests than there are slots.
        """
        self._give_back([request for request in self._of if request not in alive])
        new = [request for request in requests if request not in self._of]
        if len(new) > len(self._free):
            here = set(requests)
            self._give_back([request for request in self._of if request not in here])
        if len(new) > len(self._free):
            raise ValueError(
                f"{len(requests)} requests are in the batch, expected at most "
                f"{len(self._free) + len(self._of)}."
            )
        for request in new:
            self._of[request] = self._free.pop()
        return [self._of[request] for request in requests], [self._of[one] for one in new]

    def __iter__(self) -> Iterator[str]:
        """The requests that are remembered."""
        return iter(self._of)

    def _give_back(self, requests: list[str]) -> None:
        self._free += [self._of.pop(request) for request in requests]
