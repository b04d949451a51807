r"""What drafters accept by the context's length and by how much of it they see (`context_window`).

    python benchmarks/windows.py --prompts gsm8k.jsonl:4 mt_bench.jsonl:4 --filler context.jsonl \
        --context 512 2048 --windows 128 512 --records FOLDER

The target answers each question once, behind so many tokens; every drafter is then replayed alone
against its answers, which takes no target. Nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from contexts import filling
from models import add_model_options, check_model_options, load_models
from prompts import Prompt, read_prompts
from settings import command, hardware
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taps_hf import DynamicTree
from taps_hf.checks import set_threads
from taps_hf.drafters.base import Drafter
from taps_hf.evaluation.benchmarks import Question
from taps_hf.evaluation.measurements import Cycles
from taps_hf.evaluation.metrics import tau
from taps_hf.evaluation.records import Record, RecordOptions, RecordStore, record
from taps_hf.evaluation.replay import replay
from taps_hf.evaluation.variants import Variant
from taps_hf.strategies import Single


def answered(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: argparse.Namespace,
    context: int,
) -> list[Record]:
    """The target's greedy answers to prompts that have `context` tokens or more."""
    filler = [prompt for spec in options.filler for prompt in read_prompts(spec)]
    fill = filling(tokenizer, filler or prompts, context)
    questions = [Question(one.group, one.key, (fill(one.text),)) for one in prompts]
    given = RecordOptions(max_new_tokens=options.max_new_tokens, feature_dtype=target.dtype)
    settings = {
        "target": str(target.config.name_or_path),
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
    }
    store = RecordStore(options.records, settings)
    return [store.load(file) for file in record(target, tokenizer, questions, given, store)]


def accepted(
    target: PreTrainedModel,
    drafters: Mapping[str, Drafter],
    records: Sequence[Record],
    tree: DynamicTree,
    window: int | None,
) -> dict[str, list[Cycles]]:
    """The cycles of each drafter alone, seeing `window` slots of its context (None: all)."""
    seeing = {name: copy.deepcopy(drafter) for name, drafter in drafters.items()}
    for drafter in seeing.values():
        drafter.config.context_window = window
    ways = [Variant(name, (name,), Single(0), tree) for name in seeing]
    rows = replay(records, target, seeing, ways, dict.fromkeys(seeing, ""))
    found = [one for cycles in rows for one in cycles]
    return {name: [one for one in found if one.variant == name] for name in seeing}


def table(found: Mapping[tuple[int, int | None], Mapping[str, Sequence[Cycles]]]) -> str:
    """tau, in Markdown: a row for each context, drafter and group of prompts, a column a window.

    Args:
        found: by context and window, the cycles of each drafter.
    """
    contexts, windows = (list(dict.fromkeys(column)) for column in zip(*found))
    shown = ["all" if window is None else str(window) for window in windows]
    lines = [
        f"| after | drafter | prompts | {' | '.join(shown)} |",
        f"|{' --- |' * (3 + len(shown))}",
    ]
    for context in contexts:
        for name, rows in found[context, windows[0]].items():
            for group in dict.fromkeys(row.benchmark for row in rows):
                cells = [
                    f"{tau([one for one in found[context, w][name] if one.benchmark == group]):.2f}"
                    for w in windows
                ]
                lines.append(f"| {context:,} | {name} | {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parse(argv)
    set_threads(options.threads)
    prompts = [prompt for spec in options.prompts for prompt in read_prompts(spec)]
    target, tokenizer, drafters = load_models(options, "auto")
    for drafter in drafters.values():
        if options.draft_vocab is not None:
            drafter.score_only(options.draft_vocab)
    windows = (None, *options.windows)
    found = {}
    with tqdm(total=len(options.context) * len(windows), unit="window") as bar:
        for context in options.context:
            records = answered(target, tokenizer, prompts, options, context)
            for window in windows:
                tree = DynamicTree(*options.tree)
                found[context, window] = accepted(target, drafters, records, tree, window)
                bar.update()
    scored = f", scoring {options.draft_vocab} tokens" if options.draft_vocab else ""
    print(
        f"tau, {options.dtype}, greedy, at most {options.max_new_tokens} tokens, trees "
        f"{options.tree}{scored}; {hardware(target.device)}, torch {torch.__version__}  \n"
        f"`{command(argv, 'windows.py')}`\n\n{table(found)}"
    )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE[:COUNT]")
    add_model_options(parser)
    parser.add_argument(
        "--filler",
        nargs="+",
        default=[],
        metavar="FILE[:COUNT]",
        help="prompts whose texts fill contexts (default: the prompts, which repeat if few)",
    )
    parser.add_argument(
        "--context", nargs="+", type=int, default=[512, 1024, 2048], help="tokens of each prompt"
    )
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[128, 256, 512], help="slots that drafters see"
    )
    parser.add_argument("--tree", nargs=3, type=int, default=[3, 8, 15])
    parser.add_argument("--draft-vocab", type=int, help="tokens that drafters score")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--records", type=Path, required=True, help="folder of the target's answers, kept"
    )
    options = parser.parse_args(argv)
    check_model_options(parser, options)
    for name in ("context", "windows", "tree"):
        if wrong := [number for number in getattr(options, name) if number < 1]:
            parser.error(f"--{name}: {wrong[0]}, expected positive numbers")
    return options


if __name__ == "__main__":
    sys.exit(main())
