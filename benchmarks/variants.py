"""The ways to decode that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models import plain_compiled
from transformers import CompileConfig

from taps_hf import Auto, Confidence, DynamicTree, Merged, Single, Strategy
from taps_hf.drafters.base import Drafter
from taps_hf.drafters.causal import CausalDrafter

STRATEGIES = (
    "auto",
    "auto-all",
    "auto-learned",
    "lookup",
    "prompt-lookup",
    "single",
    "confidence",
    "confidence-per-prompt",
    "merged",
    "merged-equal-budget",
    "merged-with-lookup",
    "concatenated",
)
ASSISTANT = "assistant-model"  # only with a small language model
PLAIN_COMPILED = "plain, compiled"
PROMPT_LOOKUP = 10  # tokens that transformers' prompt lookup proposes, as its documentation does


@dataclass(frozen=True)
class Variant:
    """A way to decode.

    Args:
        name: as it is shown.
        strategy: how drafters are composed; None for transformers' own prompt lookup and, with a
            small model, its own assisted decoding.
        tree: of each drafter; None for the strategy's own.
        lookup: whether a lookup is added to the drafters.
        learned: whether drafters that were trained are used at all.
        compile: how its passes are compiled; None if they are not.
    """

    name: str
    strategy: Strategy | None
    tree: DynamicTree | None
    lookup: bool = False
    learned: bool = True
    compile: CompileConfig | None = field(default=None, hash=False)

    def arguments(self, drafters: Mapping[str, Drafter]) -> dict[str, Any]:
        """What `generate` gets."""
        if self.name == PLAIN_COMPILED:
            return plain_compiled(self.compile)
        if self.name == ASSISTANT:
            (small,) = (x for x in drafters.values() if isinstance(x, CausalDrafter))
            return {"assistant_model": small.model}
        if self.strategy is None:
            return {"prompt_lookup_num_tokens": PROMPT_LOOKUP}
        more: dict[str, Any] = {} if self.tree is None else {"tree": self.tree}
        if self.compile is not None:
            more["compile"] = self.compile
        if isinstance(self.strategy, Single):  # others would not draft, but read along
            name = list(drafters)[self.strategy.index]
            return {"assistant_models": [drafters[name]], **more}
        return {
            "assistant_models": drafters if self.learned else [],
            "strategy": self.strategy,
            "lookup": self.lookup,
            **more,
        }


def variants(
    drafters: Sequence[str],
    trees: Sequence[tuple[int, int, int]],
    strategies: Sequence[str] = STRATEGIES,
    compile: CompileConfig | None = None,
) -> list[Variant]:
    """Every strategy, with every tree where it has not its own; of one drafter only `single`.

    Args:
        drafters: their names, in the order in which `generate` gets them.
        trees: (depth, top_k, num_nodes) of each drafter's tree.
        strategies: some of `STRATEGIES` and `ASSISTANT`, transformers' own decoding with a small
            model. "auto-all" is auto with all drafters in every cycle, "auto-learned" auto without
            lookups, "lookup" auto with nothing else. "merged" verifies the union of all trees, up
            to num_nodes for each drafter; "merged-equal-budget" the num_nodes best of it, and
            "merged-with-lookup" those of a lookup's tree as well.
        compile: if given, every way that is ours once more with it, and plain `generate`.
    """
    found = []
    if "auto" in strategies:
        found.append(Variant("auto", Auto(), None, lookup=True))
    if "auto-all" in strategies and len(drafters) > 1:
        found.append(Variant("auto-all", Auto(explore=1), None, lookup=True))
    if "auto-learned" in strategies:
        found.append(Variant("auto-learned", Auto(), None))
    if "lookup" in strategies:
        found.append(Variant("lookup", Auto(), None, lookup=True, learned=False))
    if "prompt-lookup" in strategies:
        found.append(Variant("prompt-lookup", None, None))
    if ASSISTANT in strategies:
        found.append(Variant(ASSISTANT, None, None))
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
        label = f"{depth},{top_k},{num_nodes}"
        found += [Variant(f"{name} {label}", way, tree) for name, way in ways.items()]
        if "merged-with-lookup" in strategies:
            way = Merged(num_nodes=num_nodes)
            found.append(Variant(f"merged-with-lookup {label}", way, tree, lookup=True))
    if compile is not None:
        ours = [way for way in found if way.strategy is not None]
        found += [replace(way, name=f"{way.name}, compiled", compile=compile) for way in ours]
        found.append(Variant(PLAIN_COMPILED, None, None, compile=compile))
    return found
