"""Averaged weights against drafters kept apart: tau (tokens per target pass) by kind of prompt.

    python examples/averaging.py

Averaging is the simplest way to compose specialists and tends to lose what made them special;
`taps-hf average` writes such a drafter to a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from _common import argument_parser, encode, load_drafters, load_target, prompts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taps_hf import EagleDrafter, average_drafters

KINDS = ("math", "chat")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of tau, drafters by kinds of prompt; returns the exit status."""
    options = argument_parser(__doc__, max_new_tokens=64).parse_args(argv)
    model, tokenizer = load_target(options.target)
    drafters = load_drafters(options.drafters, options.draft_vocab)
    ways = {name: [drafter] for name, drafter in drafters.items()}
    ways["average"] = [average_drafters(list(drafters.values()))]
    ways["merged"] = list(drafters.values())

    print(f"{'tau':9}" + "".join(f"{kind:>7}" for kind in KINDS))
    for name, assistants in ways.items():
        taus = [
            tau(model, tokenizer, assistants, prompts(kind)[:2], options.max_new_tokens)
            for kind in KINDS
        ]
        print(f"{name:9}" + "".join(f"{value:7.2f}" for value in taus), flush=True)
    return 0


def tau(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: list[EagleDrafter],
    texts: list[str],
    max_new_tokens: int,
) -> float:
    """Tokens emitted per target pass over all answers, greedily."""
    traces = [
        model.generate(
            **encode(tokenizer, text).to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            assistant_models=drafters,
            strategy="merged" if len(drafters) > 1 else "single",
            return_dict_in_generate=True,
        ).draft_trace
        for text in texts
    ]
    tokens = sum(len(trace.emitted) for trace in traces)
    return tokens / sum(trace.num_target_passes for trace in traces)


if __name__ == "__main__":
    sys.exit(main())
