"""What is compared: drafters and strategies under names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..strategies import Confidence, Entropy, Merged, Single, Strategy
from ..trees.shapes import DynamicTree, TreeShape


@dataclass(frozen=True)
class Variant:
    """A way to decode.

    Args:
        name: the one it is reported under.
        drafters: names of its drafters, in the order the strategy knows them by.
        strategy: how their trees are composed.
        tree: the shape of each drafter's tree.
    """

    name: str
    drafters: tuple[str, ...]
    strategy: Strategy
    tree: TreeShape

    def key(self, weights: Mapping[str, str]) -> str:
        """Tells it from every variant that may give other figures.

        Args:
            weights: a digest of each drafter's weights, by name.
        """
        drafters = [weights[name] for name in self.drafters]
        text = json.dumps([drafters, repr(self.strategy), repr(self.tree)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def oracle_variant(name: str, tree: TreeShape) -> Variant:
    """That of the oracle ([`oracle.Oracle`]), with the tree that drafters have alone."""
    return Variant(name, (name,), Single(0), tree)


def standard_variants(
    alone: Sequence[str], composed: Sequence[str], tree: DynamicTree, lookup: str | None = None
) -> list[Variant]:
    """Every drafter alone, and every composition of those in `composed`.

    The compositions are routing by confidence (TAPS, equation 13) and by entropy, per cycle and
    once a prompt; and merged trees: concatenated at the sum of the budgets (the paper's, appendix
    A.4), their union at that budget, and their union pruned to the budget of one tree. With a
    lookup, which is also measured alone, both unions are measured with it as well.

    Args:
        alone: names of drafters.
        composed: names of those that are composed.
        tree: of each drafter.
        lookup: name of a drafter that looks up.

    Raises:
        ValueError: if fewer than two drafters are to be composed, or names repeat.
    """
    looked_up = [] if lookup is None else [lookup]
    found = [Variant(name, (name,), Single(0), tree) for name in (*alone, *looked_up)]
    if composed:
        if len(set(composed)) < max(2, len(composed)):
            raise ValueError(
                f"{composed} were given to compose, expected two different ones or more."
            )
        ways: Mapping[str, Strategy] = {
            "confidence": Confidence(),
            "confidence-per-prompt": Confidence(per="prompt"),
            "entropy": Entropy(),
            "entropy-per-prompt": Entropy(per="prompt"),
            "concatenated": Merged(packing="concatenate"),
            "merged": Merged(),
            "merged-equal-budget": Merged(num_nodes=tree.num_nodes),
        }
        found += [Variant(name, tuple(composed), way, tree) for name, way in ways.items()]
        for name in ("merged", "merged-equal-budget"):
            drafters = (*composed, *looked_up)
            found += [Variant(f"{name}-with-{x}", drafters, ways[name], tree) for x in looked_up]
    names = [variant.name for variant in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} names two variants; expected distinct names.")
    return found
