"""Whose token is proposed: several drafters score, the surest one's best token is taken."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..formats.composition import Routing


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
    logits = logits.float()
    scores, places = logits.max(dim=-1)
    confidences = scores - logits.logsumexp(dim=-1)
    tokens = places if token_ids is None else token_ids.gather(1, places)
    return Best(tokens, confidences)


def surest(best: Best) -> torch.Tensor:
    """(n,) int64: the drafter whose best token is likeliest; of equals the first."""
    return best.confidences.argmax(dim=0)


def of_chosen(each: torch.Tensor, drafters: torch.Tensor) -> torch.Tensor:
    """(n, ...) of (K, n, ...): row by row that of the chosen drafter.

    Args:
        each: what drafters have; of one who drafts alone (1, n, ...).
        drafters: (n,) int64.
    """
    if len(each) == 1:  # of them all tokens are
        return each[0]
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

    Whoever drafts, the others have foreseen its first token, too, and when it has been verified it
    is known who was right. So nothing has to be tried out. A drafter's confidence is multiplied by
    the square of the share of first tokens in which it was right, where the last twenty or so
    count, and eight before the first count as half right. One that foresees nothing, as a lookup
    may, was wrong. What that brings: docs/serving.md.

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


class Router:
    """Who drafts in a batch: remembered from token to token of a draft, and from draft to draft.

    Args:
        routing: see [`formats.composition.Drafting`].
        count: K.
        most_requests: in a batch.
        device: of what is remembered.
        can_be_alone: whether a drafter can run without the others.
        lookup: whether there is one more, which is not asked but offers: its number is K.
    """

    def __init__(
        self,
        routing: Routing,
        count: int,
        most_requests: int,
        device: torch.device | str,
        can_be_alone: bool = False,
        lookup: bool = False,
    ) -> None:
        kind = {"request": Evidence, "draft": Trust}.get(routing)
        self._evidence = None if kind is None else kind(count + lookup, most_requests, device)
        self.per_draft, self._can_be_alone = routing == "draft", can_be_alone
        self._lookup = count if lookup else None
        self._slots: torch.Tensor | None = None
        self._foreseen: torch.Tensor | None = None
        self._held: torch.Tensor | None = None  # (n,) int64: whose the drafts of a batch are
        self._offered: Best | None = None  # (n, L) each
        self._at = 0
        self.alone: int | None = None
        """Whose all drafts of a batch are, until they end; None if it is the lookup."""
        self.picks: torch.Tensor | None = None
        """(n,) int64: whose the tokens are that were last chosen."""
        self.chosen: Best | None = None
        """(n,) each: those tokens, and their log-probabilities."""

    @property
    def remembers(self) -> bool:
        """Whether requests are told apart: then [`follow`] is to be called before every draft."""
        return self._evidence is not None

    def follow(self, slots: torch.Tensor, new: torch.Tensor) -> None:
        """Say whose the next rows are.

        Args:
            slots: (n,) int64: where each row's request is remembered.
            new: (m,) int64: slots of requests that begin.
        """
        self._evidence.forget(new)
        self._slots = slots

    def hear(self, rows: torch.Tensor, slots: torch.Tensor, emitted: torch.Tensor) -> None:
        """For routing per draft: say what the first tokens of the last drafts were to be.

        Args:
            rows: (m,) int64: of these drafts in their batch.
            slots: (m,) int64: of their requests.
            emitted: (m,) integers: the tokens that were emitted there.
        """
        self._evidence.hear(slots, self._foreseen[:, rows], emitted)

    def begin(self, offered: Best | None = None) -> None:
        """Begin a draft, in which nobody drafts yet, or end it.

        Of a draft that is one drafter's, whoever is chosen by the first token drafts the others.
        Where that is the same drafter in all of a batch, it runs alone until the draft ends, on a
        CPU: there what does not run is time saved, and asking who it is costs none. What the others
        have not read of the draft they read with everybody else, when it has been verified.

        Args:
            offered: (n, L) each: the lookup's drafts, with -1 where there is no token.
        """
        self._held = self.alone = None
        self._offered, self._at = offered, 0

    def choose(self, best: Best) -> None:
        """Choose whose tokens are proposed next: `picks`, `chosen`.

        Args:
            best: of all drafters, (K, n) each, or of the one who drafts alone, (1, n).
        """
        every = best if self._offered is None or self.alone is not None else self._with_offer(best)
        if self._held is None:
            # vLLM also tries out how much it can hold, with rows that are nobody's.
            known = self._slots is not None and len(self._slots) == best.tokens.shape[1]
            ask = self._evidence is not None and known
            self.picks = self._evidence.surest(every, self._slots) if ask else surest(best)
            if self.per_draft:
                self._hold(every)
        elif self._offered is not None and self.alone is None:
            # Where what was offered has come to its end, whoever is surest then goes on with it.
            ended = (self._held == self._lookup) & (every.tokens[self._lookup] < 0)
            self.picks = self._held = torch.where(ended, surest(best), self._held)
        self.chosen = Best(*(of_chosen(x, self.picks) for x in (every.tokens, every.confidences)))
        self._at += 1

    def _hold(self, every: Best) -> None:
        self._held, self._foreseen = self.picks, every.tokens
        if self._can_be_alone:
            first = int(self.picks[0])
            if first != self._lookup and bool((self.picks == first).all()):
                self.alone = first

    def _with_offer(self, best: Best) -> Best:
        offered = Best(self._offered.tokens[:, self._at], self._offered.confidences[:, self._at])
        return Best(
            torch.cat([best.tokens, offered.tokens[None]]),
            torch.cat([best.confidences, offered.confidences[None]]),
        )

    def rest(self) -> Best | None:
        """If all drafts of the batch are the lookup's, how they go on: (n, m) each.

        As long as all of them do.
        """
        if self._offered is None or bool((self._held != self._lookup).any()):
            return None
        tokens = self._offered.tokens
        length = int((tokens >= 0).all(dim=0).long().cumprod(dim=0).sum())
        return Best(tokens[:, self._at : length], self._offered.confidences[:, self._at : length])
