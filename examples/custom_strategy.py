"""A strategy of one's own: go on with the drafter that was right last.

    python examples/custom_strategy.py

Every strategy gives the same answer; what differs is how many passes and how much drafting it
takes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from _common import answer_tokens, argument_parser, encode, load_drafters, load_target, prompts

from taps_hf import (
    Choice,
    CycleOutcome,
    DraftTree,
    GenerationContext,
    Strategy,
    merge,
    register_strategy,
)


@register_strategy("stay")
@dataclass(frozen=True)
class Stay(Strategy):
    """Ask only the drafter accepted most in the last cycle; all of them where none was.

    Drafters that sit out are not run, so this drafts less than "merged" does.
    """

    def begin(self, context: GenerationContext) -> Strategy:
        return Staying()

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        return Choice(merge(list(trees.values())), tuple(trees))


class Staying(Stay):
    """[`Stay`] in one generation: what it remembers, the settings do not."""

    def __init__(self) -> None:
        self._votes: Counter[int] = Counter()

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        if not self._votes:
            return everyone
        return (max(sorted(self._votes), key=self._votes.__getitem__),)

    def observe(self, outcome: CycleOutcome) -> None:
        self._votes = Counter(drafter for by in outcome.accepted for drafter in by)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare it with "merged"; returns 1 if an answer differs from plain generate's, else 0."""
    options = argument_parser(__doc__, max_new_tokens=64).parse_args(argv)
    model, tokenizer = load_target(options.target)
    drafters = load_drafters(options.drafters, options.draft_vocab)
    settings = {"do_sample": False, "max_new_tokens": options.max_new_tokens}

    status = 0
    for kind in ("math", "chat"):
        inputs = encode(tokenizer, prompts(kind)[0]).to(model.device)
        plain = answer_tokens(inputs, model.generate(**inputs, **settings))
        for strategy in ("merged", "stay"):
            output = model.generate(
                **inputs,
                **settings,
                assistant_models=drafters,
                strategy=strategy,
                return_dict_in_generate=True,
            )
            trace = output.draft_trace
            drafted = Counter(i for cycle in trace.cycles for i in cycle.drafters)
            asked = ", ".join(f"{name} {drafted[i]}" for i, name in enumerate(drafters))
            equal = answer_tokens(inputs, output.sequences) == plain
            print(
                f"{kind}: {strategy:6} tau {trace.tau:.2f} in {trace.num_target_passes} cycles, of "
                f"which drafted {asked}; {'equal to' if equal else 'DIFFERS from'} plain generate"
            )
            status |= not equal
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
