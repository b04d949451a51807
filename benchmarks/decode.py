"""Times generation with drafters against plain `generate` in the same run, prompt by prompt.

    python benchmarks/decode.py --prompts gsm8k.jsonl:20 mt_bench.jsonl:20 --out results.json

What is measured, and how: README.md beside this file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from contexts import filling, tokens_of
from models import (
    DTYPES,
    ROOT,
    add_compile_option,
    add_model_options,
    check_model_options,
    load_models,
    load_small_model,
)
from prompts import Prompt, read_prompts
from results import Results, Row, markdown, read_results
from settings import command, heading, settings_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from variants import ASSISTANT, STRATEGIES, Variant, variants

from taps_hf.checks import set_threads
from taps_hf.drafters.base import Drafter
from taps_hf.files import check_writable
from taps_hf.measuring import now
from taps_hf.trace import first_difference

_TRIES = 10  # widths are few

PROMPTS = [str(ROOT / "examples" / "prompts" / f"{kind}.jsonl") for kind in ("math", "chat")]


def measure(
    model: PreTrainedModel,
    drafters: Mapping[str, Drafter],
    pending: Sequence[Variant],
    prompt: Prompt,
    input_ids: torch.Tensor,
    generate: Mapping[str, Any],
    rotation: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Answer one prompt by plain `generate` and by every variant.

    Args:
        model: the target.
        drafters: by name.
        pending: the variants to measure.
        prompt: what `input_ids`, (1, T) int64 on the target's device, stand for.
        input_ids: the prompt's tokens.
        generate: arguments that all calls share.
        rotation: how far the order (plain, then the variants) is rotated.
        seed: of the random numbers, before every call.

    Returns:
        one row a variant, in the order of `pending`.
    """
    order: list[Variant | None] = [None, *pending]
    shift = rotation % len(order)
    outputs, seconds, passes = {}, {}, {}
    for variant in order[shift:] + order[:shift]:
        torch.manual_seed(seed)
        hooked = variant is not None and variant.strategy is None and variant.compile is None
        with _counted_passes(model) if hooked else nullcontext() as count:
            start = now(model.device)
            outputs[variant] = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                return_dict_in_generate=True,
                **generate,
                **({} if variant is None else variant.arguments(drafters)),
            )
            seconds[variant] = now(model.device) - start
        # Plain `generate` makes a token with each; it has no trace.
        length = input_ids.shape[1]
        passes[variant] = len(count) if hooked else outputs[variant].sequences.shape[1] - length

    answers = {variant: out.sequences[0, length:].tolist() for variant, out in outputs.items()}
    return [
        Row(
            prompt=prompt.key,
            group=prompt.group,
            variant=variant.name,
            tokens=len(answers[variant]),
            seconds=seconds[variant],
            plain_tokens=len(answers[None]),
            plain_seconds=seconds[None],
            differs_at=first_difference(answers[None], answers[variant]),
            **_cycles(outputs[variant], passes[variant]),
        )
        for variant in pending
    ]


def _cycles(output: Any, passes: int) -> dict[str, Any]:
    """What a generation's trace says of its cycles; of one without, how many passes there were."""
    trace = getattr(output, "draft_trace", None)
    if trace is None:
        return {"cycles": passes}
    return {
        "cycles": len(trace.cycles),
        "accepted": sum(cycle.accepted_length for cycle in trace.cycles),
        "nodes": sum(cycle.num_nodes for cycle in trace.cycles),
        "drafters": sum(len(cycle.drafters) for cycle in trace.cycles),
        **{f"seconds_{phase}": trace.seconds[phase] for phase in ("draft", "target", "rest")},
    }


@contextmanager
def _counted_passes(model: PreTrainedModel) -> Iterator[list[None]]:
    """A list that grows by one with every call of the model by transformers' own loops.

    Not of one that is compiled: graphs would be made again for each new hook, and each length.
    """
    passes: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()


def _graphs_made() -> int:
    """So far, by torch.compile in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(
    model: PreTrainedModel,
    drafters: Mapping[str, Drafter],
    ways: Sequence[Variant],
    prompts: Sequence[Prompt],
    encode: Callable[[str], torch.Tensor],
    generate: Mapping[str, Any],
    results: Results,
    seed: int = 0,
) -> None:
    """Measure what `results` lacks, and keep it there prompt by prompt.

    Args:
        model: the target.
        drafters: by name.
        ways: the variants.
        prompts: in the order in which they are asked.
        encode: the (1, T) int64 tokens of a text, on the target's device.
        generate: arguments that all calls share.
        results: where rows go.
        seed: of the first prompt's random numbers; later prompts count on from it.
    """
    warm = False
    for i, prompt in enumerate(prompts):
        pending = [way for way in ways if not results.has(prompt.key, way.name)]
        if not pending:
            continue
        input_ids = encode(prompt.text)
        if any(way.compile for way in pending):
            # Graphs are made for lengths: on another text as long, of which nothing can be learnt.
            measure(model, drafters, pending, prompt, input_ids.flip(1), generate)
        elif not warm:  # first passes cost more than later ones
            measure(model, drafters, pending, prompt, input_ids, {**generate, "max_new_tokens": 4})
        warm = True
        for _ in range(_TRIES):
            made = _graphs_made()
            rows = measure(model, drafters, pending, prompt, input_ids, generate, i, seed + i)
            if _graphs_made() == made:  # not timed with what is done once for all texts
                break
        else:
            raise ValueError(
                f"Graphs were made in each of {_TRIES} measurements of {prompt.key}, expected them "
                "to be kept."
            )
        results.add(rows)
        best = max(rows, key=lambda row: row.ratio)
        print(
            f"[{i + 1}/{len(prompts)}] {prompt.key}: plain {rows[0].plain_tokens} tokens in "
            f"{rows[0].plain_seconds:.1f} s; best {best.variant}, {best.ratio:.2f} x plain",
            file=sys.stderr,
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if an answer differed from plain's in float32, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parse(argv)
    prompts = [prompt for spec in options.prompts for prompt in read_prompts(spec)]
    set_threads(options.threads)
    if options.out is not None:  # before models are loaded
        check_writable(options.out)
        if options.out.exists():
            read_results(options.out)
    if options.small_model is not None:
        target, tokenizer, drafters = load_small_model(options, options.small_model)
    else:
        target, tokenizer, drafters = load_models(options, options.drafter_dtype)
    if options.draft_vocab is not None:
        for drafter in drafters.values():
            drafter.score_only(options.draft_vocab)
    if options.context_window is not None:
        for drafter in drafters.values():
            drafter.config.context_window = options.context_window
    generate: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    if options.temperature:
        generate |= {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    settings = settings_of(options, target, drafters)
    results = Results(options.out, settings)
    ways = variants(list(drafters), options.trees, options.strategies, options.compile)
    filler = [prompt for spec in options.filler for prompt in read_prompts(spec)] or prompts
    encode = _encoder(tokenizer, filler, options.context, target.device)
    run(target, drafters, ways, prompts, encode, generate, results, options.seed)

    keys, names = {prompt.key for prompt in prompts}, {way.name for way in ways}
    rows = [row for row in results.rows if row.prompt in keys and row.variant in names]
    print(f"{heading(settings)}  \n`{command(argv)}`\n\n{markdown(rows)}")
    differing = [row for row in rows if row.differs_at is not None]
    print(
        f"\n{len(differing)} of {len(rows)} answers differ from plain generate's "
        f"({settings['dtype']})."
    )
    ours = [row for row in differing if row.accepted is not None]  # not transformers' own ways
    return int(bool(ours) and target.dtype == torch.float32)


def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[Prompt],
    context: int,
    device: torch.device,
) -> Callable[[str], torch.Tensor]:
    """Encodes questions: (1, T) int64, T at least `context`, filled up with the filler's texts."""
    fill = filling(tokenizer, filler, context)
    return lambda text: tokens_of(tokenizer, fill(text)).to(device)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=PROMPTS,
        metavar="FILE[:COUNT]",
        help="JSON lines with `turns` or `instruction` (default: the examples' own)",
    )
    add_model_options(parser)
    add_compile_option(parser)
    parser.add_argument(
        "--small-model",
        metavar="PATH",
        help="a language model with the target's tokenizer, to draft in place of the drafters",
    )
    parser.add_argument(
        "--strategies", nargs="+", default=STRATEGIES, choices=(*STRATEGIES, ASSISTANT)
    )
    parser.add_argument(
        "--trees",
        nargs="+",
        type=_tree,
        default=[(3, 8, 15), (5, 8, 24)],
        metavar="DEPTH,TOP_K,NUM_NODES",
        help="of each drafter's tree (default: 3,8,15 5,8,24)",
    )
    parser.add_argument(
        "--drafter-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="default: as saved",
    )
    parser.add_argument(
        "--draft-vocab", type=int, help="tokens that drafters score (default: as saved)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of each prompt at least, filled up with text"
    )
    parser.add_argument(
        "--filler",
        nargs="+",
        default=[],
        metavar="FILE[:COUNT]",
        help="prompts whose texts fill contexts (default: the other prompts, which repeat if few)",
    )
    parser.add_argument(
        "--context-window",
        type=int,
        help="slots of their context that drafters see (default: as saved)",
    )
    parser.add_argument("--out", type=Path, help="file of results to write or to go on with")
    options = parser.parse_args(argv)
    check_model_options(parser, options)
    if ASSISTANT in options.strategies and options.small_model is None:
        parser.error(f"--strategies {ASSISTANT} needs --small-model")
    of_trained = {"--draft-vocab": options.draft_vocab, "--context-window": options.context_window}
    for name, value in of_trained.items():
        if value is not None and options.small_model is not None:
            parser.error(f"{name} is {value}, which a small language model does not have")
    if options.filler and not options.context:
        parser.error("--filler is given, but no --context to fill")
    if options.context_window is not None and options.context_window < 1:
        parser.error(f"--context-window is {options.context_window}, expected a positive number")
    return options


def _tree(text: str) -> tuple[int, int, int]:
    """For argparse, which says what was wrong with which argument."""
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not DEPTH,TOP_K,NUM_NODES, all positive")
    depth, top_k, num_nodes = map(int, text.split(","))
    return depth, top_k, num_nodes


if __name__ == "__main__":
    sys.exit(main())
