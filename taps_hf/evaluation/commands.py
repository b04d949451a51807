"""`taps-hf evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checks import named_paths
from ..loading import EMBEDDED
from .options import EvaluateOptions


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    defaults = EvaluateOptions
    parser = commands.add_parser(
        "evaluate",
        help="measure drafters: tables and figures",
        description="Record the target's answers, replay drafters against them, and write tables "
        "and figures. A run that was stopped goes on where it was.",
        argument_default=argparse.SUPPRESS,  # what is not given is as `EvaluateOptions` has it
    )
    parser.add_argument(
        "--target", help=f"folder, Hub name, or `{EMBEDDED}` (default: {defaults.target})"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="to use instead of the tokenizer's")
    parser.add_argument(
        "--drafter", action="append", required=True, metavar="NAME=PATH", help="may be repeated"
    )
    parser.add_argument(
        "--compose", nargs="+", metavar="NAME", help="drafters that are routed and merged"
    )
    parser.add_argument("--average", nargs=2, metavar="NAME", help="two drafters to average")
    parser.add_argument("--lookup", action="store_true", help="measure lookups in the text as well")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="measure trees grown by the target's own probabilities as well: the ceiling. Costs a "
        "pass of the target for each level of each tree",
    )
    parser.add_argument(
        "--oracle-answers", type=int, metavar="N", help="of each benchmark (default: all)"
    )
    parser.add_argument("--lambdas", nargs="+", type=float, help="weights of the first of them")
    parser.add_argument(
        "--benchmark", action="append", required=True, metavar="NAME[=FILE]", help="may be repeated"
    )
    parser.add_argument("--limit", type=int, help="questions of each benchmark, evenly spread")
    parser.add_argument("--temperature", nargs="+", type=float, help="default: 0")
    parser.add_argument(
        "--max-new-tokens", type=int, help=f"of an answer (default: {defaults.max_new_tokens})"
    )
    parser.add_argument(
        "--tree",
        nargs=3,
        type=int,
        metavar=("DEPTH", "TOP_K", "NODES"),
        help=f"of every drafter (default: {' '.join(map(str, defaults.tree))})",
    )
    parser.add_argument("--live", type=int, metavar="N", help="answers also run live (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write or continue")
    parser.add_argument("--records", type=Path, help="folder of the records (default: in --out)")
    parser.add_argument(
        "--record-batch",
        type=int,
        metavar="N",
        help=f"answers recorded together (default: {defaults.record_batch})",
    )
    parser.add_argument("--record-features", choices=["float32", "bfloat16"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, help=f"default: {defaults.seed}")
    parser.add_argument(
        "--others", nargs="+", type=Path, help="results of other targets, to compare"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import evaluate

    given = vars(options).copy()
    del given["run"]
    # A flag that may be repeated, or given once with several values, stands for a field of many.
    for flag, name in [("benchmark", "benchmarks"), ("temperature", "temperatures")]:
        if flag in given:
            given[name] = given.pop(flag)
    drafters = named_paths(given.pop("drafter"), "--drafter")
    evaluate(EvaluateOptions(drafters=drafters, **given))
