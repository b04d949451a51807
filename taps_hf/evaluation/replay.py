"""Replaying drafters against records: accepted lengths at the drafters' cost alone.

A drafter's tree at a position depends on the text before it only, not on the cycles that led
there. So all variants advance along a record together: at each position those that have their root
there ask for the trees of their drafters, and each tree is grown once however many ask. Several
records are replayed side by side, and what a feature drafter is asked for in all of them is grown
in one batch ([`forest`]). Strategies live in a replay as in a generation. One that decides while
trees grow shares none: its drafters grow them for it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from ..drafters.base import Drafter, DraftRequest
from ..drafters.ensemble import Ensemble, free_among, layers_read
from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..strategies import GenerationContext, Strategy
from ..strategies.checks import check_asked, checked_choice
from ..strategies.costs import LearntCosts
from ..trace import trace_cycle
from ..trees.shapes import TreeShape
from ..trees.tree import DraftTree
from ..verification import Walked
from .forest import Forest, Spot
from .measurements import CycleRecorder, Cycles
from .records import Record, states_of
from .variants import Variant

_TOGETHER = (EagleDrafter, Eagle3Drafter)  # of these kinds themselves trees grow in one batch


class _Reader:
    """Drafters that read a record as a generation would show it to them."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        target: PreTrainedModel,
        record: Record,
        states: Mapping[int, torch.Tensor],
    ) -> None:
        self._ensemble = Ensemble(drafters, target)
        self._record, self._states = record, states
        self._read = 0  # tokens

    def propose(self, asked: Sequence[int], spot: Spot, request: DraftRequest) -> dict:
        """Trees, by index, with the root at a position not before the last one's."""
        record, read, self._read = self._record, self._read, spot.root + 1
        before = slice(max(read - 1, 0), spot.root)  # each token but the first
        known = {layer: states[before] for layer, states in self._states.items()}
        self._ensemble.observe(record.tokens[read : self._read], known)
        return self._ensemble.propose(asked, request)


class _Grower(Protocol):
    """Grows trees of one drafter."""

    def grow(self, spots: Sequence[Spot]) -> list[DraftTree]:
        """A tree, on the CPU, at each of some positions: the root alone if it proposes nothing."""


class OneByOne:
    """As [`Forest`], for any kind of drafter: trees are grown one after the other.

    Args:
        drafter: the drafter.
        target: that it drafts for.
        shape: of the trees.
        records: of the target; in each, positions must grow.
        states: of each record, by layer, those of all tokens but the last that the drafter reads.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: PreTrainedModel,
        shape: TreeShape,
        records: Sequence[Record],
        states: Sequence[Mapping[int, torch.Tensor]],
    ) -> None:
        self._shape, self._records = shape, list(records)
        self._readers = [
            _Reader([drafter], target, record, found) for record, found in zip(records, states)
        ]

    def grow(self, spots: Sequence[Spot]) -> list[DraftTree]:
        """As [`Forest.grow`]."""
        return [self._grow(spot) for spot in spots]

    def _grow(self, spot: Spot) -> DraftTree:
        root = self._records[spot.record].tokens[spot.root : spot.root + 1]
        request = DraftRequest(root, self._shape, spot.max_depth, with_entropy=True)
        trees = self._readers[spot.record].propose((0,), spot, request)
        return trees.get(0, DraftTree.root(root, 1))


_Source = tuple[str, int]  # whose trees, of which of the replay's shapes


class _Decoding:
    """One variant on its way through a record.

    Args:
        variant: how it decodes.
        record: what is replayed.
        states: its states by layer.
        target: the record's.
        drafters: by name.
        shape: which of the replay's shapes the variant's is.
    """

    def __init__(
        self,
        variant: Variant,
        record: Record,
        states: Mapping[int, torch.Tensor],
        target: PreTrainedModel,
        drafters: Mapping[str, Drafter],
        shape: int,
    ) -> None:
        self.variant, self.record = variant, record
        self.root = record.answer_start - 1  # index of the last emitted token
        self.recorder = CycleRecorder(record.entropies)
        self._shape = shape
        self._vocab_size = target.config.get_text_config(decoder=True).vocab_size
        count = len(variant.drafters)
        self._everyone = tuple(range(count))
        free = free_among([drafters[name] for name in variant.drafters])
        context = GenerationContext(count, target.device, _no_costs, free)
        self._strategy = variant.strategy.begin(context)
        self._asked: tuple[int, ...] = ()
        self._reader: _Reader | None = None
        if (
            self._strategy.go_on is not None
            or type(self._strategy).ask_also is not Strategy.ask_also
        ):
            own = [drafters[name] for name in variant.drafters]
            self._reader = _Reader(own, target, record, states)

    def ask(self, max_depth: int) -> set[_Source]:
        """Whose trees are wanted of those that variants share."""
        self._asked = ()
        if max_depth >= 1:
            asked = self._strategy.ask(self._everyone)
            self._asked = check_asked(self._strategy, asked, len(self._everyone))
        return set() if self._reader else {self._source(index) for index in self._asked}

    def _source(self, index: int) -> _Source:
        return self.variant.drafters[index], self._shape

    def advance(self, spot: Spot, grown: Mapping[_Source, DraftTree]) -> None:
        """One cycle, with the trees of the drafters that were asked."""
        count, root = len(self._everyone), self.record.tokens[spot.root : spot.root + 1]
        if self._reader is None:
            trees = {index: grown[self._source(index)] for index in self._asked}
            trees = {i: tree.of_drafter(i, count) for i, tree in trees.items() if len(tree) > 1}
        else:
            shape, go_on = self.variant.tree, self._strategy.go_on
            request = DraftRequest(root, shape, spot.max_depth, go_on, with_entropy=True)
            trees = self._proposed(spot, request)
        tree, drafters = DraftTree.root(root, count), ()
        if trees:
            choice = self._strategy.compose(trees)
            given = (int(root), count, self._vocab_size, False, spot.max_depth)
            choice = checked_choice(self._strategy, choice, *given)
            tree, drafters = choice.tree, choice.drafters
        path = _walk(tree, self.record.tokens[spot.root + 1 :])
        self.recorder.add(tree, drafters, path)
        self._strategy.observe(trace_cycle(tree, drafters, path))
        self.root += len(path.tokens)

    def _proposed(self, spot: Spot, request: DraftRequest) -> dict[int, DraftTree]:
        """Trees that the variant's drafters grow for it alone."""
        trees = self._reader.propose(self._asked, spot, request) if self._asked else {}
        if spot.max_depth < 1:
            return trees
        also = self._strategy.ask_also(trees)
        also = check_asked(self._strategy, also, len(self._everyone), self._asked)
        return trees | (self._reader.propose(also, spot, request) if also else {})


def _no_costs() -> LearntCosts:
    raise ValueError("A replay takes no time that could be measured: give the strategy its costs.")


class _Walk:
    """A record and all variants on their way through it.

    Args:
        record: the record.
        runs: of the variants.
        positions: how many the target has; None for no limit.
    """

    def __init__(self, record: Record, runs: Sequence[_Decoding], positions: int | None) -> None:
        self.record, self.runs = record, list(runs)
        self._positions = record.max_length if positions is None else positions
        self._here: list[_Decoding] = []

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
        self._here = [run for run in self.runs if run.root == self.root]
        depth = self.max_depth
        return set().union(*(run.ask(depth) for run in self._here))

    def advance(self, spot: Spot, grown: Mapping[_Source, DraftTree]) -> None:
        """One cycle of the variants at `root`."""
        for run in self._here:
            run.advance(spot, grown)


@torch.no_grad()
def replay(
    records: Sequence[Record],
    target: PreTrainedModel,
    drafters: Mapping[str, Drafter],
    variants: Sequence[Variant],
    weights: Mapping[str, str],
) -> Iterator[list[Cycles]]:
    """What each variant would have done on the way to the recorded answers.

    Args:
        records: of the target.
        target: for its embedding and head; it is run once over each record that lacks states that
            drafters read.
        drafters: by name.
        variants: what to replay, for deterministic trees (the walk).
        weights: a digest of each drafter, for the variants' keys.

    Yields:
        the cycles of each variant, in their order, for one record after the other, as they end.

    Raises:
        ValueError: for strategies that would measure costs.
    """
    shapes: list[TreeShape] = []
    for variant in variants:
        if variant.tree not in shapes:
            shapes.append(variant.tree)
    config = target.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    used = {name for variant in variants for name in variant.drafters}
    layers = layers_read(drafters[name] for name in sorted(used))
    states = [states_of(record, target, layers) for record in records]
    walks = []
    for record, known in zip(records, states):
        runs = [
            _Decoding(v, record, known, target, drafters, shapes.index(v.tree)) for v in variants
        ]
        walks.append(_Walk(record, runs, positions))
    growers: dict[_Source, _Grower] = {}
    while pending := {i: walk for i, walk in enumerate(walks) if not walk.is_done}:
        here = {i: Spot(i, walk.root, walk.max_depth) for i, walk in pending.items()}
        wanted: dict[_Source, list[Spot]] = {}
        for i, walk in pending.items():
            for source in walk.ask():
                wanted.setdefault(source, []).append(here[i])
        grown: dict[int, dict[_Source, DraftTree]] = {i: {} for i in pending}
        for source, spots in wanted.items():
            if source not in growers:
                drafter, shape = drafters[source[0]], shapes[source[1]]
                grower = Forest if type(drafter) in _TOGETHER else OneByOne
                growers[source] = grower(drafter, target, shape, records, states)
            for spot, tree in zip(spots, growers[source].grow(spots)):
                grown[spot.record][source] = tree
        for i, walk in pending.items():
            walk.advance(here[i], grown[i])
            if walk.is_done:
                yield [_cycles(run, weights) for run in walk.runs]


def _cycles(run: _Decoding, weights: Mapping[str, str]) -> Cycles:
    record = run.record
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


def _walk(tree: DraftTree, tokens: torch.Tensor) -> Walked:
    """The way of the recorded tokens (n,) through a tree: at most one more than it holds."""
    children = tree.children()
    nodes, accepted = [0], []
    for token in tokens.tolist():
        node = children.get((nodes[-1], token))
        if node is None:
            return Walked(nodes, accepted, tokens[: len(nodes)])
        accepted.append(node)
        nodes.append(node)
    return Walked(nodes[:-1], accepted, tokens)  # the answer ended inside of the tree
