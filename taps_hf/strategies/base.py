"""The interface of a strategy, and the registry of names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from ..trace import CycleTrace
from ..trees.growth import GoOn
from ..trees.tree import DraftTree
from .costs import LearntCosts
from .experience import Experience

CycleOutcome = CycleTrace
"""What a strategy hears of a cycle that is over."""


@dataclass(frozen=True)
class Choice:
    """What a strategy decided in one cycle: the tree to verify and the drafters it comes from."""

    tree: DraftTree
    drafters: tuple[int, ...]


@dataclass(frozen=True)
class GenerationContext:
    """What a strategy may know of the generation that begins.

    Args:
        num_drafters: how many there are.
        device: of the target.
        costs: measures, or recalls, what passes and drafts cost here, and learns more of it.
        free: indices of the drafters that cost next to nothing.
        experience: recalls what was learnt of these drafters in earlier answers; None where
            nothing may depend on those.
    """

    num_drafters: int
    device: torch.device
    costs: Callable[[], LearntCosts]
    free: tuple[int, ...] = ()
    experience: Callable[[], Experience] | None = None


class Strategy(ABC):
    """Composes the proposals of several drafters.

    The life of a strategy in one generation: [`begin`], then in every cycle [`ask`], [`ask_also`],
    [`go_on`] while trees grow, [`compose`], [`observe`]. In a cycle in which nothing can be drafted
    it only observes; where nobody was asked, or had something to propose, it does not compose.

    Strategies hold settings only, so that one object can serve many generations at once. One whose
    decisions depend on earlier cycles returns, from [`begin`], an object that remembers them.
    """

    needs_entropy: ClassVar[bool] = False
    """Whether trees must carry draft entropies."""

    tree_limits: ClassVar[tuple[int, int, int]] = (5, 8, 24)
    """Depth, top_k and num_nodes of each drafter's `DynamicTree` unless a `tree` is given."""

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

    def begin(self, context: GenerationContext) -> Strategy:
        """The strategy to ask in one generation: itself, unless it keeps a state."""
        return self

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        """Which of the drafters draft in this cycle: all, unless overridden."""
        return everyone

    def ask_also(self, trees: Mapping[int, DraftTree]) -> tuple[int, ...]:
        """Which others draft as well, now that those asked first have proposed: none by default.

        Args:
            trees: by the drafter's index, of those that had something to propose: possibly none.
        """
        return ()

    go_on: GoOn | None = None
    """Asked while trees grow, after each level: whether another one is worth its time."""

    @abstractmethod
    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        """Decide what is verified.

        Args:
            trees: by the drafter's index the tree of each one that was asked and had something to
                propose: at least one.
        """

    def observe(self, outcome: CycleOutcome) -> None:  # noqa: B027 (most strategies keep no state)
        """Hear what a cycle came to, also one in which nobody drafted."""


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
