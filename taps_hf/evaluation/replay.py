"""Replaying drafters against records: accepted lengths at the drafters' cost alone.

A drafter's tree at a position depends on the text before it only, not on the cycles that led
there. So all variants advance along a record together: at each position those that have their root
there ask for the trees of their drafters, and each tree is grown once however many ask. Several
records are replayed side by side, and what a drafter is asked for in all of them is grown in one
batch ([`forest`]).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.session import DrafterSession
from ..strategies import CycleOutcome
from ..trees.shapes import DynamicTree, TreeShape
from ..trees.tree import DraftTree
from .forest import Forest, Spot
from .measurements import CycleRecorder, Cycles
from .records import Record
from .variants import Variant


class OneByOne:
    """As [`Forest`], for any shape: trees are grown one after the other, at growing positions."""

    def __init__(
        self,
        drafter: EagleDrafter,
        target: PreTrainedModel,
        shape: TreeShape,
        records: Sequence[Record],
    ) -> None:
        self.shape, self.records = shape, list(records)
        self._sessions = [DrafterSession([drafter], target, with_entropy=True) for _ in records]
        self._fed = [0] * len(records)  # slots that each session has been given

    def grow(self, spots: Sequence[Spot]) -> list[DraftTree]:
        """As [`Forest.grow`]."""
        return [self._grow(spot) for spot in spots]

    def _grow(self, spot: Spot) -> DraftTree:
        record, session = self.records[spot.record], self._sessions[spot.record]
        fed, self._fed[spot.record] = self._fed[spot.record], spot.root
        session.observe(record.tokens[fed + 1 : spot.root + 1], record.features[fed : spot.root])
        token = record.tokens[spot.root : spot.root + 1].to(session.device)
        (tree,) = self.shape.grow(session, token, spot.max_depth)
        return tree.to(torch.device("cpu"))


_Source = tuple[str, TreeShape]  # whose trees, of which shape


@dataclass
class _Run:
    """One variant on its way through a record. `root` is the index of the last emitted token."""

    variant: Variant
    root: int
    recorder: CycleRecorder
    history: list[CycleOutcome] = field(default_factory=list)

    def drafters_to_run(self) -> tuple[int, ...]:
        return tuple(
            self.variant.strategy.drafters_to_run(len(self.variant.drafters), self.history)
        )


class _Walk:
    """A record and all variants on their way through it.

    Args:
        record: the record.
        variants: to replay.
        positions: how many the target has; None for no limit.
    """

    def __init__(self, record: Record, variants: Sequence[Variant], positions: int | None) -> None:
        self.record = record
        start = record.answer_start - 1
        self.runs = [_Run(variant, start, CycleRecorder(record.entropies)) for variant in variants]
        self._positions = record.max_length if positions is None else positions
        self._asked: list[tuple[_Run, tuple[int, ...]]] = []

    @property
    def root(self) -> int:
        """Where the variants that are furthest behind have their root."""
        return min(run.root for run in self.runs)

    @property
    def is_done(self) -> bool:
        """Whether all variants have reached the answer's end."""
        return self.root >= len(self.record.tokens) - 1

    @property
    def max_depth(self) -> int:
        """How deep nodes of a tree at `root` may lie: d of them emit d + 1 tokens at most."""
        return min(self.record.max_length - 1 - self.root, self._positions - self.root) - 1

    def ask(self) -> set[_Source]:
        """Whose trees the variants at `root` want."""
        root = self.root
        nobody = self.max_depth < 1 or root < 1  # without a token before it there is no feature
        self._asked = [
            (run, () if nobody else run.drafters_to_run()) for run in self.runs if run.root == root
        ]
        return {
            (run.variant.drafters[index], run.variant.tree)
            for run, indices in self._asked
            for index in indices
        }

    def advance(self, grown: Mapping[_Source, DraftTree]) -> None:
        """One cycle of the variants that asked."""
        for run, indices in self._asked:
            sources = {index: (run.variant.drafters[index], run.variant.tree) for index in indices}
            _cycle(run, self.record, {index: grown[source] for index, source in sources.items()})


@torch.no_grad()
def replay(
    records: Sequence[Record],
    target: PreTrainedModel,
    drafters: Mapping[str, EagleDrafter],
    variants: Sequence[Variant],
    weights: Mapping[str, str],
) -> Iterator[list[Cycles]]:
    """What each variant would have done on the way to the recorded answers.

    Args:
        records: of the target.
        target: for its embedding and head; it is not run.
        drafters: by name.
        variants: what to replay, for deterministic trees (the walk).
        weights: a digest of each drafter, for the variants' keys.

    Yields:
        the cycles of each variant, in their order, for one record after the other, as they end.
    """
    growers: dict[_Source, Forest | OneByOne] = {}
    for variant in variants:
        for name in variant.drafters:
            if (name, variant.tree) not in growers:
                kind = Forest if type(variant.tree) is DynamicTree else OneByOne
                grower = kind(drafters[name], target, variant.tree, records)
                growers[name, variant.tree] = grower
    config = target.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    walks = [_Walk(record, variants, positions) for record in records]
    while pending := {i: walk for i, walk in enumerate(walks) if not walk.is_done}:
        spots: dict[_Source, list[Spot]] = {}
        for i, walk in pending.items():
            for source in walk.ask():
                spots.setdefault(source, []).append(Spot(i, walk.root, walk.max_depth))
        grown: dict[int, dict[_Source, DraftTree]] = {i: {} for i in pending}
        for source, wanted in spots.items():
            for spot, tree in zip(wanted, growers[source].grow(wanted)):
                grown[spot.record][source] = tree
        for i, walk in pending.items():
            walk.advance(grown[i])
            if walk.is_done:
                yield [_cycles(run, walk.record, weights) for run in walk.runs]


def _cycles(run: _Run, record: Record, weights: Mapping[str, str]) -> Cycles:
    return Cycles(
        record=record.key,
        variant=run.variant.name,
        variant_key=run.variant.key(weights),
        benchmark=record.benchmark,
        category=record.category,
        temperature=record.temperature,
        tokens=record.num_answer_tokens,
        **run.recorder.columns,
    )


def _cycle(run: _Run, record: Record, grown: Mapping[int, DraftTree]) -> None:
    """One cycle of a variant, with the trees of the drafters that it asked."""
    variant, root = run.variant, run.root
    count = len(variant.drafters)
    if grown:
        trees = {index: _as_drafter(tree, index, count) for index, tree in grown.items()}
        choice = variant.strategy.compose(trees, run.history)
        tree, chosen = choice.tree, choice.drafters
    else:
        tree, chosen = DraftTree.root(record.tokens[root : root + 1], count), ()
    copies = _walk(tree, record.tokens[root + 1 :].tolist())
    emitted = min(len(copies) + 1, len(record.tokens) - 1 - root)
    run.recorder.add(tree, chosen, copies, emitted)
    if chosen:
        origins = tuple(tree.proposers(nodes) for nodes in copies)
        run.history.append(CycleOutcome(chosen, origins))
    run.root = root + emitted


def _as_drafter(tree: DraftTree, index: int, count: int) -> DraftTree:
    """A tree grown by the only drafter, as the tree of one of several."""

    def spread(values: torch.Tensor, at_root: float) -> torch.Tensor:
        rows = values.new_full((count, values.shape[1]), torch.nan)
        rows[index] = values[0]
        rows[:, 0] = at_root
        return rows

    return replace(
        tree,
        confidence=spread(tree.confidence, 1.0),
        path_confidence=spread(tree.path_confidence, 1.0),
        entropy=spread(tree.entropy, torch.nan),
    )


def _walk(tree: DraftTree, tokens: Sequence[int]) -> list[list[int]]:
    """The nodes that carry `tokens` from the root on, each with all its copies.

    A tree that holds a path several times (concatenated trees) is walked along all copies at once.
    """
    children: dict[tuple[int, int], list[int]] = {}
    for node, key in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist())):
        children.setdefault(key, []).append(node)
    copies: list[list[int]] = []
    here = [0]
    for token in tokens:
        here = [child for node in here for child in children.get((node, token), ())]
        if not here:
            break
        copies.append(here)
    return copies
