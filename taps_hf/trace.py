"""What happened in a generation: per cycle, and in sum.

Two numbers are easily confused: the *accepted length* counts draft tokens, *tau* counts the tokens
emitted per target pass (usually one more, the bonus token). Always say which one a number is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .trees.tree import DraftTree


@dataclass(frozen=True)
class EmittedToken:
    """One emitted token.

    Args:
        token: its id.
        depth: depth of the tree node that carried it, from 1; None for the target's own token (the
            bonus token, or the correction of what the tree had).
        drafters: indices of the drafters that proposed it; empty for the target's own.
        confidence: c(v) by each of those drafters.
        entropy: nats, of each of those drafters' distributions there; empty unless recorded.
    """

    token: int
    depth: int | None
    drafters: tuple[int, ...]
    confidence: tuple[float, ...]
    entropy: tuple[float, ...]


@dataclass(frozen=True)
class CycleTrace:
    """One cycle: one draft and one pass of the target.

    Args:
        drafters: indices of the drafters whose proposals were verified; empty if none drafted.
        num_nodes: nodes verified, not counting the root.
        path: nodes of the tree that were accepted, from depth 1 on.
        emitted: the tokens emitted, in order.
        seconds_draft: in the drafters and in composing their trees.
        seconds_target: in the target's pass.
        seconds_rest: in everything else (walk, processors, stopping criteria, cache).
        tree: the verified tree, on the CPU; None unless `output_draft_trees` was asked for.
    """

    drafters: tuple[int, ...]
    num_nodes: int
    path: tuple[int, ...]
    emitted: tuple[EmittedToken, ...]
    seconds_draft: float
    seconds_target: float
    seconds_rest: float
    tree: DraftTree | None = None

    @property
    def accepted_length(self) -> int:
        """Draft tokens accepted."""
        return len(self.path)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What became of each node of `tree`: "accepted", "rejected" or "unreached".

        The root counts as accepted. A node is unreached if its parent was not accepted, or if the
        generation ended there. Where a packing holds a path several times, the first is meant.

        Raises:
            ValueError: if the tree was not kept.
        """
        if self.tree is None:
            raise ValueError("The cycle was traced without `output_draft_trees`.")
        accepted = {0, *self.path}
        walked = set(accepted)
        if len(self.emitted) == len(self.path):  # ended by an accepted token: nobody looked below
            walked.discard(self.path[-1] if self.path else 0)
        return tuple(
            "accepted" if node in accepted else "rejected" if parent in walked else "unreached"
            for node, parent in enumerate(self.tree.parents.tolist())
        )


@dataclass
class DraftTrace:
    """The record of one generation.

    Args:
        drafters: names of the drafters; the indices everywhere else refer to them.
        cycles: oldest first.
        seconds_prefill: in the target's pass over the prompt.
    """

    drafters: tuple[str, ...]
    cycles: list[CycleTrace] = field(default_factory=list)
    seconds_prefill: float = 0.0

    @property
    def emitted(self) -> list[EmittedToken]:
        """All emitted tokens in order."""
        return [token for cycle in self.cycles for token in cycle.emitted]

    @property
    def num_target_passes(self) -> int:
        """Passes of the target after the prompt's."""
        return len(self.cycles)

    @property
    def tau(self) -> float:
        """Tokens emitted per target pass."""
        return len(self.emitted) / len(self.cycles) if self.cycles else float("nan")

    @property
    def accepted_length(self) -> float:
        """Mean number of draft tokens accepted per cycle."""
        if not self.cycles:
            return float("nan")
        return sum(cycle.accepted_length for cycle in self.cycles) / len(self.cycles)

    @property
    def acceptance_by_depth(self) -> dict[int, float]:
        """For each depth d: of the cycles that accepted depth d - 1, the share that accepted d.

        Cycles count only where the generation went on past depth d - 1, so that a stop in the
        middle of a path is not taken for a rejection; a path that ends in a leaf of the tree is.
        Depths below 1 at which nothing was ever accepted are left out.
        """
        reached: Counter[int] = Counter()
        accepted: Counter[int] = Counter()
        for cycle in self.cycles:
            if not cycle.drafters:
                continue
            for token_index in range(len(cycle.emitted)):
                reached[token_index + 1] += 1
                accepted[token_index + 1] += token_index < cycle.accepted_length
        return {d: accepted[d] / reached[d] for d in sorted(reached) if accepted[d] or d == 1}

    @property
    def origin_share(self) -> dict[tuple[int, ...], float]:
        """Share of the emitted tokens by who proposed them; `()` is the target's own."""
        emitted = self.emitted
        counts = Counter(token.drafters for token in emitted)
        return {origin: n / len(emitted) for origin, n in sorted(counts.items())}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase: prefill, draft, target, rest."""
        phases = {"prefill": self.seconds_prefill}
        for phase in ("draft", "target", "rest"):
            phases[phase] = sum(getattr(cycle, f"seconds_{phase}") for cycle in self.cycles)
        return phases

    def summary(self) -> dict[str, object]:
        """The figures above as one dictionary, drafters by name."""
        return {
            "tokens": len(self.emitted),
            "target_passes": self.num_target_passes,
            "tau": self.tau,
            "accepted_length": self.accepted_length,
            "acceptance_by_depth": self.acceptance_by_depth,
            "origin_share": {
                " + ".join(self.drafters[i] for i in origin) or "target": share
                for origin, share in self.origin_share.items()
            },
            "seconds": self.seconds,
        }


@dataclass
class SpeculativeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns with `assistant_models`.

    Args:
        draft_trace ([`DraftTrace`]): what was drafted, accepted and whose it was. The other fields
            are those of transformers' `GenerateDecoderOnlyOutput`.
    """

    draft_trace: DraftTrace | None = None


class Stopwatch:
    """Splits the time of a cycle into phases.

    On CUDA it records events, so that a phase is timed where its work is done and not where it was
    asked for. Reading the seconds waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """End one phase and begin the next."""
        if self._on_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between consecutive marks."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if self._on_device:
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def trace_cycle(
    tree: DraftTree,
    drafters: tuple[int, ...],
    tokens: list[int],
    accepted: list[list[int]],
    seconds: tuple[float, float, float],
    keep_tree: bool,
) -> CycleTrace:
    """The record of one cycle.

    Args:
        tree: the verified tree, on the CPU.
        drafters: whose proposals it holds.
        tokens: the emitted tokens.
        accepted: the node of each accepted token, the root not counted; all its copies where a
            packing holds it several times.
        seconds: draft, target, rest.
        keep_tree: whether to keep the tree itself.
    """

    def of_drafters(values: torch.Tensor, copies: list[int], by: tuple[int, ...]) -> tuple:
        return tuple(values[list(by)][:, copies].nan_to_num(nan=-torch.inf).amax(dim=1).tolist())

    emitted = []
    for depth, (token, copies) in enumerate(zip(tokens, accepted), start=1):
        by = tree.proposers(copies)
        confidence = of_drafters(tree.confidence, copies, by)
        entropy = () if tree.entropy is None else of_drafters(tree.entropy, copies, by)
        emitted.append(EmittedToken(token, depth, by, confidence, entropy))
    emitted += [EmittedToken(token, None, (), (), ()) for token in tokens[len(accepted) :]]
    return CycleTrace(
        drafters,
        len(tree) - 1,
        tuple(copies[0] for copies in accepted),
        tuple(emitted),
        *seconds,
        # Without the distributions behind sampled trees: a row of the vocabulary for each node.
        tree=replace(tree, proposals=None) if keep_tree else None,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if they are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
