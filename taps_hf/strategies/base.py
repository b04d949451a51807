"""The interface of a strategy, and the registry of names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from ..trees.growth import GoOn
from ..trees.tree import DraftTree

if TYPE_CHECKING:
    from .costs import LearntCosts


@dataclass(frozen=True)
class Choice:
    """What a strategy decided in one cycle: the tree to verify and the drafters it comes from."""

    tree: DraftTree
    drafters: tuple[int, ...]


@dataclass(frozen=True)
class CycleOutcome:
    """What an earlier cycle came to.

    Args:
        drafters: the drafters whose proposals were verified; none if none drafted.
        accepted: for each accepted draft token, in order, the drafters that had proposed it.
        tokens: the tokens emitted.
        seconds: that drafting and the target's pass took; None on devices where to know it the host
            would have to wait.
    """

    drafters: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...] = ()
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class GenerationContext:
    """What a strategy may know of the generation that begins.

    Args:
        num_drafters: how many there are.
        device: of the target.
        costs: measures, or recalls, what passes and drafts cost here, and learns more of it.
    """

    num_drafters: int
    device: torch.device
    costs: Callable[[], LearntCosts]


class Strategy(ABC):
    """Composes the proposals of several drafters.

    Strategies hold settings only, so that one object can serve many generations at once. What a
    decision needs to remember about the running generation it reads from `history`; a strategy that
    learns returns, from [`begin`], an object that does.
    """

    needs_entropy: ClassVar[bool] = False
    """Whether trees must carry draft entropies."""

    tree_limits: ClassVar[tuple[int, int, int]] = (5, 8, 24)
    """Depth, top_k and num_nodes of each drafter's `DynamicTree` unless a `tree` is given."""

    def begin(self, context: GenerationContext) -> Strategy:
        """The strategy to ask in one generation: itself, unless it keeps a state."""
        return self

    def observe(self, outcome: CycleOutcome) -> None:  # noqa: B027 (most strategies keep no state)
        """Hear what a cycle came to, also one in which nobody drafted."""

    go_on: GoOn | None = None
    """Asked while trees grow, after each level: whether another one is worth its time."""

    @property
    def supports_sampled_proposals(self) -> bool:
        """Whether decisions are independent of which tokens were sampled.

        Only such strategies may be used with `verification="rejection"`: choosing between sampled
        trees by what was sampled changes the distribution of the proposals, and the rejection rule
        would no longer be exact.
        """
        return False

    def check(self, num_drafters: int) -> None:  # noqa: B027 (most strategies take any number)
        """Raise `ValueError` if the strategy cannot work with this many drafters."""

    def drafters_to_run(
        self, num_drafters: int, history: Sequence[CycleOutcome]
    ) -> tuple[int, ...]:
        """Which drafters draft in this cycle: all, unless overridden."""
        return tuple(range(num_drafters))

    @abstractmethod
    def compose(self, trees: Mapping[int, DraftTree], history: Sequence[CycleOutcome]) -> Choice:
        """Decide what is verified.

        Args:
            trees: the tree of each drafter that ran, by the drafter's index.
            history: the cycles so far, oldest first.
        """


_REGISTRY: dict[str, type[Strategy]] = {}
_Class = TypeVar("_Class", bound=type[Strategy])


def register_strategy(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make a strategy available as `strategy="name"`, with its default settings.

    Raises:
        ValueError: if the name is taken by another class.
    """

    def register(cls: _Class) -> _Class:
        taken = _REGISTRY.get(name, cls)
        # Running a notebook's cell again defines the same class anew.
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"A strategy named {name!r} is registered already: {taken}.")
        _REGISTRY[name] = cls
        return cls

    return register


def list_strategies() -> tuple[str, ...]:
    """The registered names."""
    return tuple(sorted(_REGISTRY))


def get_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy from its name, or the object itself.

    Raises:
        ValueError: for an unknown name or another kind of object.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str) and strategy in _REGISTRY:
        return _REGISTRY[strategy]()
    raise ValueError(
        f"`strategy` is {strategy!r}, expected one of {', '.join(list_strategies())}, or a "
        "taps_hf.Strategy object."
    )
