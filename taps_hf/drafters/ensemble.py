"""All drafters of a generation: who runs with whom, who is asked, and where a text goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, PreTrainedModel

from ..trees.tree import DraftTree, move
from .base import Drafter, DrafterSession, DraftRequest


def groups_of(drafters: Sequence[Drafter]) -> list[tuple[int, ...]]:
    """Indices of the drafters that run as one, group by group."""
    groups: dict[object, list[int]] = {}
    for index, drafter in enumerate(drafters):
        groups.setdefault((type(drafter), drafter.run_key()), []).append(index)
    found: list[tuple[int, ...]] = []
    for group in groups.values():
        members = [drafters[index] for index in group]
        as_one = len(group) == 1 or type(members[0]).runs_as_one(members)
        found += [tuple(group)] if as_one else [(index,) for index in group]
    return found


def layers_read(drafters: Iterable[Drafter]) -> tuple[int, ...]:
    """The layers of a target whose states any of the drafters reads."""
    return tuple(sorted({layer for drafter in drafters for layer in drafter.reads_layers}))


def free_among(drafters: Sequence[Drafter]) -> tuple[int, ...]:
    """Indices of the drafters that cost next to nothing."""
    return tuple(index for index, drafter in enumerate(drafters) if drafter.is_free)


def _same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return [id(one) for one in some] == [id(one) for one in others]


class Ensemble:
    """The drafters' side of one generation.

    Args:
        drafters: at least one; their order gives the indices of rows in a tree's `confidence`.
        target: the model that is accelerated.
    """

    def __init__(self, drafters: Sequence[Drafter], target: PreTrainedModel) -> None:
        self.drafters = tuple(drafters)
        self.groups = groups_of(drafters)
        self._target = target
        self._sessions: list[DrafterSession] | None = None
        self._tokens: list[torch.Tensor] = []  # all that was observed

    @property
    def members(self) -> list[tuple[Drafter, ...]]:
        """The drafters of each group."""
        return [tuple(self.drafters[index] for index in group) for group in self.groups]

    @property
    def sessions(self) -> list[DrafterSession]:
        """Those of the groups, in their order."""
        if self._sessions is None:
            started = [type(some[0]).start(some, self._target) for some in self.members]
            self._sessions = started
        return self._sessions

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        """Tell all drafters of new tokens; see [`DrafterSession.observe`]."""
        if len(tokens):
            tokens = tokens.cpu()
            self._tokens.append(tokens)
            for session in self.sessions:
                session.observe(tokens, states)

    def propose(self, asked: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        """The trees of those drafters that were asked and have something to propose.

        Returns:
            by index, in the order asked, trees on the CPU: tiny, and the walk reads them there.
        """
        grown: dict[int, DraftTree] = {}
        for group, session in zip(self.groups, self.sessions):
            rows = [row for row, index in enumerate(group) if index in asked]
            trees = session.propose(rows, request) if rows else {}
            if trees:
                moved = move(list(trees.values()), torch.device("cpu"))
                grown |= {group[row]: tree for row, tree in zip(trees, moved)}
        found = {}
        for index in asked:
            if index in grown and len(grown[index]) > 1:
                tree = grown[index].of_drafter(index, len(self.drafters))
                # Trees are merged with others: alike in what they know.
                if not request.with_entropy:
                    tree = replace(tree, entropy=None)
                elif tree.entropy is None:
                    tree = replace(tree, entropy=torch.full_like(tree.confidence, torch.nan))
                found[index] = tree
        return found

    def finish(self) -> None:
        """Tell all drafters that the generation has ended as it should."""
        for session in self.sessions:
            session.finish()

    def go_on_from(self, earlier: Ensemble, surplus: int) -> None:
        """Take over what drafters of an earlier generation know.

        Args:
            earlier: not used any more from now on.
            surplus: tokens at the end of what it observed that are to be taken back.
        """
        if earlier._target is not self._target:
            return
        known = list(zip(earlier.members, earlier.sessions))
        sessions = []
        for members in self.members:
            same = [i for i, (others, _) in enumerate(known) if _same_objects(members, others)]
            session = known.pop(same[0])[1] if same else None
            if session is None or not session.is_current() or not session.forget(surplus):
                return  # all of them, or none: they hear the same
            sessions.append(session)
        tokens = torch.cat(earlier._tokens)
        self._sessions, self._tokens = sessions, [tokens[: max(len(tokens) - surplus, 0)]]

    def read_prompt(
        self, earlier: torch.Tensor, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]
    ) -> None:
        """Observe what a generation begins with: once, before anything is proposed.

        Args:
            earlier: (k,) int64: what a cache covers of the text, as far as it is known.
            tokens: (n,) int64: the rest of the text.
            states: of all of the rest but its last token: n - 1 positions.
        """
        if self._tokens:
            known = torch.cat(self._tokens)
            if not len(earlier) or torch.equal(known[:-1], earlier.cpu()):
                # What was emitted last is not in the cache: now it may be another token.
                if torch.equal(known[-1:], tokens[:1].cpu()):
                    self.observe(tokens[1:], states)
                    return
                if all(session.forget(1) for session in self.sessions):
                    self._tokens = [known[:-1]]
                    self.observe(tokens, states)
                    return
            self._sessions, self._tokens = None, []
        self.observe(torch.cat([earlier.to(tokens.device), tokens]), states)


_laid_by: WeakKeyDictionary[Cache, tuple[Ensemble, int]] = WeakKeyDictionary()
_lock = threading.Lock()


def lay_by(ensemble: Ensemble, cache: Cache) -> None:
    """Keep what drafters know of the text in a cache, for as long as somebody holds the cache."""
    with _lock:
        _laid_by[cache] = (ensemble, cache.get_seq_length())


def ensemble_for(drafters: Sequence[Drafter], target: PreTrainedModel, cache: Cache) -> Ensemble:
    """The drafters' side of a generation that extends a cache.

    Drafters that drafted when the cache was filled go on with what they know, if they are the same
    objects with the same weights, for the same target. What was cropped from the cache they forget.
    Otherwise, and after a generation that an exception ended, they begin without knowing the
    earlier text: fewer of their tokens are accepted at first.
    """
    ensemble = Ensemble(drafters, target)
    with _lock:
        earlier, length = _laid_by.pop(cache, (None, 0))
    surplus = length - cache.get_seq_length()
    if earlier is not None and surplus >= 0 and length > surplus:
        ensemble.go_on_from(earlier, surplus)
    return ensemble
