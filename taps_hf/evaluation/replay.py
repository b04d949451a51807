"""Replaying drafters against a record: accepted lengths at the drafters' cost alone.

All variants advance in step: at each position of the answer, those that have their root there ask
for the trees of their drafters. A drafter's tree at a position depends on the text before it only,
not on the cycles that led there, so each is grown once however many variants ask; dynamic trees are
grown many positions at a time ([`forest`]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from ..drafting import DrafterSession
from ..modeling_eagle import EagleDrafter
from ..shapes import DynamicTree, TreeShape
from ..strategies import CycleOutcome
from ..tree import DraftTree
from .forest import Forest
from .measurements import CycleRecorder, Cycles
from .records import Record
from .variants import Variant


class _Grower:
    """One drafter's trees of any shape, grown one after the other, at growing positions."""

    def __init__(
        self, drafter: EagleDrafter, target: PreTrainedModel, shape: TreeShape, record: Record
    ) -> None:
        self.session = DrafterSession([drafter], target, with_entropy=True)
        self.shape = shape
        self.record = record
        self.fed = 0  # slots the session has been given
        self.position = -1
        self.tree: DraftTree | None = None

    def at(self, root: int, max_depth: int) -> DraftTree:
        """The tree whose root is the token at index `root`."""
        if root != self.position:
            tokens = self.record.tokens[self.fed + 1 : root + 1]
            self.session.observe(tokens, self.record.features[self.fed : root])
            self.fed, self.position = root, root
            token = self.record.tokens[root : root + 1].to(self.session.device)
            (tree,) = self.shape.grow(self.session, token, max_depth)
            self.tree = tree.to(torch.device("cpu"))
        return self.tree


@dataclass
class _Run:
    """One variant on its way through a record. `root` is the index of the last emitted token."""

    variant: Variant
    root: int
    recorder: CycleRecorder
    history: list[CycleOutcome] = field(default_factory=list)


@torch.no_grad()
def replay(
    record: Record,
    target: PreTrainedModel,
    drafters: Mapping[str, EagleDrafter],
    variants: Sequence[Variant],
    weights: Mapping[str, str],
) -> list[Cycles]:
    """What each variant would have done on the way to the recorded answer.

    Args:
        record: of the target.
        target: for its embedding and head; it is not run.
        drafters: by name.
        variants: what to replay, for deterministic trees (the walk).
        weights: a digest of each drafter, for the variants' keys.

    Returns:
        the cycles of each variant, in their order.
    """
    growers: dict[tuple[str, TreeShape], Forest | _Grower] = {}
    for variant in variants:
        for name in variant.drafters:
            key = (name, variant.tree)
            if key not in growers:
                kind = Forest if type(variant.tree) is DynamicTree else _Grower
                growers[key] = kind(drafters[name], target, variant.tree, record)
    start, end = record.answer_start - 1, len(record.tokens) - 1
    runs = [_Run(variant, start, CycleRecorder(record.entropies)) for variant in variants]
    positions = getattr(
        target.config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    for root in range(start, end):
        # Of a path of d nodes at most d + 1 tokens are emitted.
        room = record.max_length - 1 - root
        room = room if positions is None else min(room, positions - root)
        for run in runs:
            if run.root == root:
                _cycle(run, record, growers, room - 1)
    return [
        Cycles(
            record=record.key,
            variant=run.variant.name,
            variant_key=run.variant.key(weights),
            benchmark=record.benchmark,
            category=record.category,
            temperature=record.temperature,
            tokens=record.num_answer_tokens,
            **run.recorder.columns,
        )
        for run in runs
    ]


def _cycle(
    run: _Run,
    record: Record,
    growers: Mapping[tuple[str, TreeShape], Forest | _Grower],
    max_depth: int,
) -> None:
    variant, root = run.variant, run.root
    count = len(variant.drafters)
    trees: dict[int, DraftTree] = {}
    if max_depth >= 1 and root >= 1:  # without a token before it there is no feature to draft from
        for index in variant.strategy.drafters_to_run(count, run.history):
            grown = growers[variant.drafters[index], variant.tree].at(root, max_depth)
            trees[index] = _as_drafter(grown, index, count)
    if trees:
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
