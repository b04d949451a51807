"""What a visitor asks for, checked; and the limits that let a small machine survive a crowd."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..strategies import get_strategy, list_strategies
from ..trees.shapes import DynamicTree
from .models import Models, ModelSpec, load_models


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        prompt_tokens: of the prompt in its chat template.
        new_tokens: of an answer.
        depth: levels of a drafter's tree.
        num_nodes: nodes of a drafter's tree.
        seconds: an answer that takes longer ends there.
        comparison_seconds: of a comparison, in equal parts for its answers.
    """

    prompt_tokens: int = 512
    new_tokens: int = 256
    depth: int = 8
    num_nodes: int = 60
    seconds: float = 120.0
    comparison_seconds: float = 240.0

    @property
    def prompt_characters(self) -> int:
        """Longer prompts are refused unread: a token of plain text is some four characters."""
        return 16 * self.prompt_tokens


@dataclass(frozen=True)
class Variant:
    """One way to answer.

    Args:
        name: what the page calls it.
        drafters: names of the drafters used; none for plain `generate`.
        strategy: a registered name; unused without drafters.
    """

    name: str
    drafters: tuple[str, ...] = ()
    strategy: str = "single"


PLAIN = Variant("plain generate")


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it, by whatever variant.

    Args:
        models: what answers.
        prompt: the visitor's text.
        temperature: 0 is greedy.
        seed: of sampling.
        max_new_tokens: of the answer.
        tree: of each drafter.
        seconds: the answer ends there.
    """

    models: ModelSpec
    prompt: str
    temperature: float
    seed: int
    max_new_tokens: int
    tree: DynamicTree
    seconds: float


def check_request(
    spec: ModelSpec,
    limits: Limits,
    prompt: str,
    temperature: float | None,
    seed: float | None,
    max_new_tokens: float | None,
    depth: float | None,
    num_nodes: float | None,
) -> Request:
    """What a visitor asked for, with every value in its limits.

    Raises:
        ValueError: saying which value to change, and how.
    """
    if not prompt or not prompt.strip():
        raise ValueError("The prompt is empty. Write one, or choose an example.")
    if len(prompt) > limits.prompt_characters:
        raise ValueError(
            f"The prompt has {len(prompt):,} characters. Shorten it to {limits.prompt_tokens} "
            f"tokens, some {4 * limits.prompt_tokens:,} characters."
        )
    if temperature is None or not math.isfinite(temperature) or not 0 <= temperature <= 2:
        raise ValueError(f"Temperature is {temperature}. Choose a number from 0 (greedy) to 2.")
    max_new_tokens = _whole("Length", max_new_tokens, 1, limits.new_tokens)
    depth = _whole("Tree depth", depth, 1, limits.depth)
    num_nodes = _whole("Tree nodes", num_nodes, 1, limits.num_nodes)
    seed = _whole("Seed", seed, 0, 2**32 - 1)
    models = load_models(spec)
    _check_length(models, limits, prompt, max_new_tokens)
    tree = DynamicTree(depth, top_k=min(8, num_nodes), num_nodes=num_nodes)
    return Request(spec, prompt, temperature, seed, max_new_tokens, tree, limits.seconds)


def check_variant(spec: ModelSpec, drafters: list[str] | None, strategy: str | None) -> Variant:
    """The variant that a visitor ticked.

    Raises:
        ValueError: for no drafters, or names that are not there, or a strategy that refuses them.
    """
    chosen = tuple(name for name, _ in spec.drafters if name in (drafters or ()))
    if not chosen or len(chosen) < len(drafters):
        known = ", ".join(name for name, _ in spec.drafters)
        raise ValueError(f"Drafters are {drafters or 'not chosen'}. Tick at least one of: {known}.")
    if strategy not in list_strategies():
        known = ", ".join(list_strategies())
        raise ValueError(f"Strategy is {strategy or 'not chosen'}. Choose one of: {known}.")
    get_strategy(strategy).check(len(chosen))
    return Variant(strategy, chosen, strategy)


def compared_variants(chosen: Variant) -> list[Variant]:
    """Plain `generate`, each of the drafters alone, and all of them by every other strategy."""
    alone = [Variant(f"{name} alone", (name,)) for name in chosen.drafters]
    if len(alone) == 1:  # every strategy would do the same
        return [PLAIN, *alone]
    together = [Variant(name, chosen.drafters, name) for name in list_strategies()]
    return [PLAIN, *alone, *(v for v in together if v.strategy != "single")]


def _whole(name: str, value: float | None, lowest: int, highest: int) -> int:
    if value is None or not lowest <= value <= highest or value != int(value):
        raise ValueError(f"{name} is {value}. Choose a whole number from {lowest} to {highest}.")
    return int(value)


def _check_length(models: Models, limits: Limits, prompt: str, max_new_tokens: int) -> None:
    length = models.encode(prompt)["input_ids"].shape[1]
    room = limits.prompt_tokens
    if (positions := models.max_positions) is not None:
        room = min(room, positions - max_new_tokens)
    if room < 1:
        raise ValueError(
            f"The target has room for {positions} tokens in all. Choose a length below that."
        )
    if length > room:
        raise ValueError(
            f"The prompt has {length} tokens (with its chat template). Shorten it to {room}."
        )
