"""The ways to decode that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taps_hf import Auto, Confidence, DynamicTree, EagleDrafter, Merged, Single, Strategy

STRATEGIES = (
    "auto",
    "auto-all",
    "prompt-lookup",
    "single",
    "confidence",
    "confidence-per-prompt",
    "merged",
    "merged-equal-budget",
    "concatenated",
)
PROMPT_LOOKUP = 10  # tokens that transformers' prompt lookup proposes, as its documentation does


@dataclass(frozen=True)
class Variant:
    """A way to decode.

    Args:
        name: as it is shown.
        strategy: how drafters are composed; None for transformers' own prompt lookup.
        tree: of each drafter; None for the strategy's own.
    """

    name: str
    strategy: Strategy | None
    tree: DynamicTree | None

    def arguments(self, drafters: Mapping[str, EagleDrafter]) -> dict[str, Any]:
        """What `generate` gets."""
        if self.strategy is None:
            return {"prompt_lookup_num_tokens": PROMPT_LOOKUP}
        tree = {} if self.tree is None else {"tree": self.tree}
        if isinstance(self.strategy, Single):  # others would not draft, but read along
            name = list(drafters)[self.strategy.index]
            return {"assistant_models": [drafters[name]], **tree}
        return {"assistant_models": drafters, "strategy": self.strategy, **tree}


def variants(
    drafters: Sequence[str],
    trees: Sequence[tuple[int, int, int]],
    strategies: Sequence[str] = STRATEGIES,
) -> list[Variant]:
    """Every strategy, with every tree where it has not its own; of one drafter only `single`.

    Args:
        drafters: their names, in the order in which `generate` gets them.
        trees: (depth, top_k, num_nodes) of each drafter's tree.
        strategies: some of `STRATEGIES`. "auto-all" is auto with all drafters in every cycle.
            "merged" verifies the union of all trees, up to num_nodes
            for each drafter; "merged-equal-budget" the num_nodes best of it.
    """
    found = []
    if "auto" in strategies:
        found.append(Variant("auto", Auto(), None))
    if "auto-all" in strategies and len(drafters) > 1:
        found.append(Variant("auto-all", Auto(explore=1), None))
    if "prompt-lookup" in strategies:
        found.append(Variant("prompt-lookup", None, None))
    for depth, top_k, num_nodes in trees:
        tree = DynamicTree(depth, top_k, num_nodes)
        ways: dict[str, Strategy] = {}
        if "single" in strategies:
            ways |= {f"single {name}": Single(i) for i, name in enumerate(drafters)}
        several: dict[str, Strategy] = {
            "confidence": Confidence(),
            "confidence-per-prompt": Confidence(per="prompt"),
            "merged": Merged(),
            "merged-equal-budget": Merged(num_nodes=num_nodes),
            "concatenated": Merged(packing="concatenate"),
        }
        if len(drafters) > 1:
            ways |= {name: way for name, way in several.items() if name in strategies}
        found += [
            Variant(f"{name} {depth},{top_k},{num_nodes}", s, tree) for name, s in ways.items()
        ]
    return found
