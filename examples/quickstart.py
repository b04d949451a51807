"""Answers six prompts with and without drafters: the same text, in fewer passes of the target.

    python examples/quickstart.py

Shows which drafter each token came from, checks that the two answers are equal (float32), and
where they part in bfloat16. Times are of a single run, so rough: benchmarks/ gives medians.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _common import answer_tokens, argument_parser, encode, load_drafters, load_target, prompts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taps_hf import (
    DraftTrace,
    DynamicTree,
    EagleDrafter,
    SpeculativeDecoding,
    get_strategy,
    list_strategies,
)

KINDS = ("math", "chat")
COLOURS = (36, 35, 33, 34)  # ANSI, one for each drafter; several at once are green
SEVERAL = 32


@dataclass(frozen=True)
class Comparison:
    """One prompt, answered by plain `generate` and with drafters; times in seconds."""

    kind: str
    plain: list[int]
    drafted: list[int]
    plain_seconds: float
    drafted_seconds: float
    trace: DraftTrace


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if an answer differed in float32, else 0."""
    parser = argument_parser(__doc__, max_new_tokens=96)
    parser.add_argument("--strategy", default="auto", choices=list_strategies())
    parser.add_argument("--depth", type=int, metavar="N", help="levels of a tree, at most")
    parser.add_argument("--num-nodes", type=int, metavar="N", help="nodes of a tree, at most")
    options = parser.parse_args(argv)
    depth, top_k, num_nodes = get_strategy(options.strategy).tree_limits
    depth = depth if options.depth is None else options.depth
    num_nodes = num_nodes if options.num_nodes is None else options.num_nodes
    tree = DynamicTree(depth, min(top_k, num_nodes), num_nodes)
    settings = {"strategy": options.strategy, "tree": tree}
    questions = [(kind, prompt) for kind in KINDS for prompt in prompts(kind)]

    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_target(options.target, dtype)
        drafters = load_drafters(options.drafters, options.draft_vocab)
        name = str(dtype).removeprefix("torch.")
        say_heading(name, drafters, options.strategy, tree)
        generate = {"do_sample": False, "max_new_tokens": options.max_new_tokens}
        speculate = {**generate, **settings, "assistant_models": drafters}
        results[name] = []
        hello = encode(tokenizer, "Hello").to(model.device)
        compare("warm-up", model, hello, generate, {**speculate, "max_new_tokens": 8}, True)
        for number, (kind, prompt) in enumerate(questions):
            inputs = encode(tokenizer, prompt).to(model.device)
            found = compare(kind, model, inputs, generate, speculate, number % 2 == 0)
            results[name].append(found)
            print(f"\n[{kind}] {prompt}")
            if dtype == torch.float32:
                print(f"\n{paint(tokenizer, found.trace)}\n")
            print(f"  {equality(tokenizer, found)}; {figures(found)}", flush=True)

    say_summary(results)
    differing = sum(found.plain != found.drafted for found in results["float32"])
    if differing:
        print(f"\n{differing} answers differ in float32, where all must be equal.", file=sys.stderr)
    return int(differing > 0)


def compare(
    kind: str,
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    generate: dict[str, Any],
    speculate: dict[str, Any],
    plain_first: bool,
) -> Comparison:
    """Answer one prompt both ways, one after the other."""
    outputs, seconds = {}, {}
    for plain in (plain_first, not plain_first):
        start = time.perf_counter()
        outputs[plain] = model.generate(
            **inputs, **(generate if plain else speculate), return_dict_in_generate=True
        )
        seconds[plain] = time.perf_counter() - start
    plain, drafted = (answer_tokens(inputs, outputs[key].sequences) for key in (True, False))
    trace = outputs[False].draft_trace
    return Comparison(kind, plain, drafted, seconds[True], seconds[False], trace)


# --- what is shown --------------------------------------------------------------------------------


def say_heading(
    dtype: str, drafters: Mapping[str, EagleDrafter], strategy: str, tree: DynamicTree
) -> None:
    names = list(SpeculativeDecoding(drafters, strategy).drafters)  # with a lookup, if that is used
    scoring = ", ".join(
        f"{name} (scoring {drafter.config.draft_vocab_size or drafter.config.vocab_size:,} tokens)"
        for name, drafter in drafters.items()
    )
    print(f"\n=== {dtype}: drafters {scoring}; strategy {strategy!r}; {tree}")
    if dtype == "float32":
        ways = [((i,), f"drafted by {name}") for i, name in enumerate(names)]
        ways += [((0, 1), "by several drafters")] if len(names) > 1 else []
        legend = "  ".join(coloured(label, origin, names) for origin, label in ways)
        print(f"Tokens: {legend}  the target's own")
    else:
        print("Lower precision: a pass over a tree and a pass over one token round differently, so")
        print("where two tokens are nearly tied the answers may part; both are the target's own.")


def paint(tokenizer: PreTrainedTokenizerBase, trace: DraftTrace) -> str:
    """The answer, its tokens coloured (or bracketed) by the drafters that proposed them."""
    tokens = trace.emitted
    pieces = text_pieces(tokenizer, [token.token for token in tokens])
    runs = itertools.groupby(zip(tokens, pieces), key=lambda pair: pair[0].drafters)
    return "".join(
        coloured("".join(piece for _, piece in run), origin, trace.drafters) for origin, run in runs
    )


def coloured(text: str, origin: Sequence[int], names: Sequence[str]) -> str:
    """Text in its origin's colour; as [name:text] where there are no colours."""
    if not origin or not text:
        return text
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        colour = COLOURS[origin[0] % len(COLOURS)] if len(origin) == 1 else SEVERAL
        return f"\033[{colour}m{text}\033[0m"
    return f"[{names[origin[0]] if len(origin) == 1 else 'several'}:{text}]"


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Iterator[str]:
    """The text that each token adds; a character of several tokens comes with its last."""
    shown = 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if text.endswith("\ufffd") and end < len(tokens):
            yield ""
            continue
        yield text[shown:]
        shown = len(text)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if they are equal."""
    pairs = enumerate(itertools.zip_longest(a, b))
    return next((i for i, (x, y) in pairs if x != y), None)


def equality(tokenizer: PreTrainedTokenizerBase, found: Comparison) -> str:
    """Says that the answers are equal, or where they part, in context."""
    at = first_difference(found.plain, found.drafted)
    if at is None:
        return "equal to plain generate"
    before = tokenizer.decode(found.plain[max(0, at - 10) : at])
    plain, drafted = (
        repr(tokenizer.decode(side[at : at + 1]) if at < len(side) else "(nothing)")
        for side in (found.plain, found.drafted)
    )
    return f"DIFFERS from token {at + 1} on: after {before!r} plain {plain}, drafted {drafted}"


def tally(found: Sequence[Comparison]) -> tuple[float, int, int, float]:
    """tau, target passes with drafters and without, and the ratio of tokens per second.

    Passes count the prompt's own. Plain generate makes one pass a token: the first token comes out
    of the prompt's pass.
    """
    tokens = sum(len(one.drafted) for one in found)
    cycles = sum(one.trace.num_target_passes for one in found)
    plain_tokens = sum(len(one.plain) for one in found)
    rate = tokens / sum(one.drafted_seconds for one in found)
    plain_rate = plain_tokens / sum(one.plain_seconds for one in found)
    return tokens / cycles, cycles + len(found), plain_tokens, rate / plain_rate


def figures(found: Comparison) -> str:
    tau, passes, plain_passes, ratio = tally([found])
    saved = plain_passes - passes
    return f"tau {tau:.2f}; {passes} target passes, {saved} saved; {ratio:.2f} x plain's speed"


def say_summary(results: dict[str, list[Comparison]]) -> None:
    print("\n=== Summary (tau: tokens per target pass; speed: against plain, one run, so rough)\n")
    print(
        f"{'dtype':9} {'prompts':7} {'equal':>6} {'tau':>5} {'passes':>7} {'saved':>6} {'speed':>6}"
    )
    for dtype, all_found in results.items():
        for kind in (*KINDS, "all"):
            found = [one for one in all_found if kind in (one.kind, "all")]
            tau, passes, plain_passes, ratio = tally(found)
            equal = f"{sum(one.plain == one.drafted for one in found)}/{len(found)}"
            saved = f"{1 - passes / plain_passes:.0%}"
            print(f"{dtype:9} {kind:7} {equal:>6} {tau:5.2f} {passes:7} {saved:>6} {ratio:5.2f}x")


if __name__ == "__main__":
    sys.exit(main())
