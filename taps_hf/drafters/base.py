"""The protocol of a drafter: what decoding needs of anything that proposes tokens.

A new kind of drafter is a [`Drafter`] and a [`DrafterSession`] in one file. Loop, strategies and
verification know no kind. Feature drafters (EAGLE-2, HASS, EAGLE-3) are in `modeling_feature`, and
the kinds beside it.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..trees.growth import GoOn
from ..trees.shapes import TreeShape
from ..trees.tree import DraftTree

_SERIAL_NUMBERS = itertools.count()


class Drafter(ABC):
    """Something that proposes continuations of a text: a model, or no model at all.

    A drafter holds no state of a generation: that is the [`DrafterSession`]'s, so that one object
    can serve many generations at once.

    The numbers that a drafter's trees carry as confidence are its own estimates of being right.
    Those of different kinds of drafters need not mean the same. Merging within a budget and routing
    by confidence compare them as they are, "auto" after calibration by what was accepted.
    """

    reads_layers: tuple[int, ...] = ()
    """Whose hidden states it wants: indices of the target's decoder layers, or
    [`target.LAST`]; none for drafters that read tokens only."""

    samples: bool = False
    """Whether it can sample proposals, with their distributions, for `verification="rejection"`."""

    num_scored_tokens: int | None = None
    """Among how many tokens it chooses; None where that is no limit to a node's children."""

    tokenizer_fingerprint: str | None = None
    """Of the tokenizer it was made for, see [`configuration_eagle.tokenizer_fingerprint`]."""

    is_free: bool = False
    """Whether proposing costs next to nothing beside a pass of any model."""

    name_or_path: str = ""
    """Where it came from: its last part names a drafter whose user gave it no name."""

    def check_target(self, name: str, target: PreTrainedModel) -> None:  # noqa: B027 (none needed)
        """Raise `ValueError`, with the drafter's `name` in it, unless it fits the target."""

    def run_key(self) -> Hashable:
        """Drafters of one class with equal keys may share a session (see [`runs_as_one`])."""
        return self.serial_number

    @property
    def serial_number(self) -> int:
        """Of this object among all drafters."""
        return vars(self).setdefault("_serial_number", next(_SERIAL_NUMBERS))

    @classmethod
    def runs_as_one(cls, drafters: Sequence[Drafter]) -> bool:
        """Whether one session can run these, which have equal keys."""
        return len(drafters) == 1

    @classmethod
    @abstractmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> DrafterSession:
        """The session of a generation that begins.

        Args:
            drafters: one, or several that run as one; nothing is stored on them.
            target: the model that is accelerated.
        """

    def digest(self) -> str:
        """Tells it from drafters that may propose other things, in results that are kept.

        Raises:
            ValueError: unless it has a `digest`, or a `repr` that says what it is, of its own.
        """
        if type(self).__repr__ is object.__repr__:
            raise ValueError(
                f"{type(self).__name__} has neither a `digest` nor a `__repr__` of its own, by one "
                "of which its results would be told from others'."
            )
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DraftRequest:
    """What is wanted in one cycle.

    Args:
        root: (1,) int64, on the CPU: the last emitted token.
        shape: how trees grow, and how large they may be at most.
        max_depth: at least 1: no node may lie deeper.
        go_on: asked after each level of growing trees whether another one is worth its time.
        sample_temperature: None for deterministic trees. With a number children are sampled without
            replacement from softmax(logits / temperature), and come with their distributions.
        with_entropy: whether the entropy of the distributions that nodes come from is wanted.
    """

    root: torch.Tensor
    shape: TreeShape
    max_depth: int
    go_on: GoOn | None = None
    sample_temperature: float | None = None
    with_entropy: bool = False


class DrafterSession(ABC):
    """The state of one drafter, or of several that run as one, during one generation or several.

    A session hears of all tokens in order. A *row* is the place of a drafter among those it runs.
    """

    @abstractmethod
    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        """Hear of the text's next tokens. Cheap: work waits until somebody is asked.

        Args:
            tokens: (n,) int64, n at least 1.
            states: by layer, those that the drafters read: (m, hidden), m at most n: what the
                target computed at the positions *before* each of the last m tokens. Before the
                first token of a text there is none, and none is known of what a cache covers that
                the session has not seen.
        """

    @abstractmethod
    def propose(self, rows: Sequence[int], request: DraftRequest) -> Mapping[int, DraftTree]:
        """Continue the text.

        Args:
            rows: the drafters that are asked.
            request: for what.

        Returns:
            by row a tree of that drafter alone, (1, N) confidences, on whatever device. Who has
            nothing to propose may be left out; rows that were not asked are ignored.
        """

    @abstractmethod
    def forget(self, count: int) -> bool:
        """Take the last `count` tokens back, for a conversation that goes on from further up.

        Returns:
            whether that was possible. If not, the session is not used any more.
        """

    def finish(self) -> None:  # noqa: B027 (most know what they have heard)
        """Hear that a generation has ended as it should. Another one may go on from there."""

    def is_current(self) -> bool:
        """Whether its drafters are still what they were when it began."""
        return True
