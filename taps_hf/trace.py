"""What happened in a generation: per cycle, and in sum; and the recorder that writes it down.

Two numbers are easily confused: the *accepted length* counts draft tokens, *tau* counts the tokens
emitted per target pass (usually one more, the bonus token). Always say which one a number is.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .trees.tree import DraftTree
from .verification import Walked


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
        seconds_draft: in the drafters and in composing their trees. Like the others None where
            nobody asked for a record and to know the time the host would have to wait (on a GPU).
        seconds_target: in the target's pass.
        seconds_rest: in the walk, with processors and stopping criteria, and in keeping states.
        tree: the verified tree, on the CPU; None unless `output_draft_trees` was asked for.
    """

    drafters: tuple[int, ...]
    num_nodes: int
    path: tuple[int, ...]
    emitted: tuple[EmittedToken, ...]
    seconds_draft: float | None = None
    seconds_target: float | None = None
    seconds_rest: float | None = None
    tree: DraftTree | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens emitted."""
        return tuple(token.token for token in self.emitted)

    @property
    def accepted(self) -> tuple[tuple[int, ...], ...]:
        """For each accepted draft token, in order, the drafters that had proposed it."""
        return tuple(token.drafters for token in self.emitted[: len(self.path)])

    @property
    def accepted_length(self) -> int:
        """Draft tokens accepted."""
        return len(self.path)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What became of each node of `tree`: "accepted", "rejected" or "unreached".

        The root counts as accepted. A node is unreached if its parent was not accepted, or if the
        generation ended there.

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


class Recorder:
    """Times one generation and records its cycles.

    Args:
        drafters: their names.
        device: of the target.
        wanted: whether anybody asked for the record. Cycles are recorded either way, for the
            strategy, but without it none is kept, and on a GPU none is timed.
        keep_trees: whether to keep each cycle's tree.
        on_cycle: called with each cycle that was recorded.
    """

    def __init__(
        self,
        drafters: Iterable[str],
        device: torch.device,
        wanted: bool,
        keep_trees: bool = False,
        on_cycle: Callable[[CycleTrace], None] | None = None,
    ) -> None:
        self.trace = DraftTrace(tuple(drafters)) if wanted else None
        self._device, self._keep_trees, self._on_cycle = device, keep_trees, on_cycle
        self._timed = wanted or device.type == "cpu"
        self.start()

    def start(self) -> None:
        """A phase begins, and what was timed is over."""
        self._clock = Stopwatch(self._device) if self._timed else None

    def lap(self) -> None:
        """A phase ends, and the next one begins."""
        if self._clock is not None:
            self._clock.lap()

    def prefilled(self) -> None:
        """The prompt has been run."""
        self.lap()
        if self.trace is not None:
            (self.trace.seconds_prefill,) = self._clock.seconds()

    def cycle(self, tree: DraftTree, drafters: tuple[int, ...], path: Walked) -> CycleTrace:
        """A cycle is over: of three phases the third one ends here.

        Args:
            tree: what was verified, on the CPU.
            drafters: whose proposals it holds.
            path: what was emitted along it.
        """
        self.lap()
        seconds = (None,) * 3 if self._clock is None else self._clock.seconds()
        cycle = trace_cycle(tree, drafters, path, seconds, self._keep_trees)
        if self.trace is not None:
            self.trace.cycles.append(cycle)
        return cycle

    def tell(self, cycle: CycleTrace) -> None:
        """Show a cycle to whoever wanted to see it while the generation runs."""
        if self._on_cycle is not None:
            self._on_cycle(cycle)


def trace_cycle(
    tree: DraftTree,
    drafters: tuple[int, ...],
    path: Walked,
    seconds: Sequence[float | None] = (None,) * 3,
    keep_tree: bool = False,
) -> CycleTrace:
    """The record of one cycle.

    Args:
        tree: the verified tree, on the CPU.
        drafters: whose proposals it holds.
        path: what was emitted along it.
        seconds: draft, target, rest.
        keep_tree: whether to keep the tree itself.
    """
    tokens = path.tokens.tolist()
    confidence = tree.confidence[:, path.accepted].T.tolist()
    entropy = confidence if tree.entropy is None else tree.entropy[:, path.accepted].T.tolist()
    emitted = []
    for depth, (token, sure, unsure) in enumerate(zip(tokens, confidence, entropy), start=1):
        by = tuple(index for index, value in enumerate(sure) if not math.isnan(value))
        nats = () if tree.entropy is None else tuple(unsure[index] for index in by)
        emitted.append(EmittedToken(token, depth, by, tuple(sure[index] for index in by), nats))
    emitted += [EmittedToken(token, None, (), (), ()) for token in tokens[len(path.accepted) :]]
    return CycleTrace(
        drafters,
        len(tree) - 1,
        tuple(path.accepted),
        tuple(emitted),
        *seconds,
        # Without the distributions behind sampled trees: a row of the vocabulary for each node.
        tree=replace(tree, proposals=None) if keep_tree else None,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if they are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
