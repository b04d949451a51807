"""What asking a target many questions needs of whoever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...checks import COUNT, NOT_NEGATIVE, SEED, check_numbers


@dataclass(frozen=True)
class Answer:
    """What the target wrote.

    Args:
        tokens: ids, ending with an end-of-sequence token unless the answer was cut.
        features: (prompt + answer - 1, layers x hidden) or None: the target's states of every
            token but the last one, which was never read.
    """

    tokens: list[int]
    features: torch.Tensor | None


@dataclass(frozen=True)
class RegenerateOptions:
    """How prompts are drawn and answered.

    Args:
        max_prompt_tokens: longer prompts are left out, and counted.
        max_new_tokens: longest answer.
        temperature: 0 for greedy answers.
        batch_size: prompts answered together, at most.
        chunk_size: prompts between two writes to disk; within one, prompts of like length are
            batched together.
        seed: of the order of the rows, of which question of a conversation is asked, and of
            sampled answers.
    """

    max_prompt_tokens: int = 512
    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 64
    chunk_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_prompt_tokens", "max_new_tokens", "batch_size", "chunk_size")
        ranges = {**dict.fromkeys(counts, COUNT), "temperature": NOT_NEGATIVE, "seed": SEED}
        check_numbers(self, ranges)


class AnswerEngine(ABC):
    """Runs a target, greedily or sampling; of its generation config only the ends are used.

    What it answers follows from the prompts of a call, its `first` and the options, as far as
    rounding goes, and from nothing that was asked before: so a stopped run can go on.
    """

    name: str
    """As the command line knows it."""

    @property
    def asked(self) -> Mapping[str, Any]:
        """What of it decides the answers, beside the target and the options; becomes JSON."""
        return {"engine": self.name}

    def start(self) -> None:  # noqa: B027  (most have nothing to do)
        """Get ready to answer; called once, when it is known that there is something to answer.

        Raises:
            ValueError: if it cannot run this target here, saying why.
        """

    @abstractmethod
    def answer(self, prompts: Sequence[Sequence[int]], first: int) -> list[Answer]:
        """Answer prompts, in their order.

        Args:
            prompts: token ids of each prompt; none of them is empty.
            first: number of the first row among all, from which random numbers follow.

        Returns:
            an answer to each. All have features, or none: then they are still to be computed.
        """
