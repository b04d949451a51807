"""`taps-hf evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checks import named_paths


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure drafters: tables and figures",
        description="Record the target's answers, replay drafters against them, and write tables "
        "and figures. A run that was stopped goes on where it was.",
    )
    parser.add_argument("--target", default="embedded", help="folder, Hub name, or `embedded`")
    parser.add_argument("--chat-template", metavar="FILE", help="to use instead of the tokenizer's")
    parser.add_argument(
        "--drafter", action="append", required=True, metavar="NAME=PATH", help="may be repeated"
    )
    parser.add_argument(
        "--compose", nargs="+", metavar="NAME", help="drafters that are routed and merged"
    )
    parser.add_argument("--average", nargs=2, metavar="NAME", help="two drafters to average")
    parser.add_argument(
        "--lambdas", nargs="+", type=float, default=[0.5], help="weights of the first of them"
    )
    parser.add_argument(
        "--benchmark", action="append", required=True, metavar="NAME[=FILE]", help="may be repeated"
    )
    parser.add_argument("--limit", type=int, help="questions of each benchmark, evenly spread")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--tree", nargs=3, type=int, default=[5, 8, 24], metavar=("DEPTH", "TOP_K", "NODES")
    )
    parser.add_argument("--live", type=int, default=0, metavar="N", help="answers also run live")
    parser.add_argument("--out", type=Path, required=True, help="folder to write or continue")
    parser.add_argument("--records", type=Path, help="folder of the records (default: in --out)")
    parser.add_argument("--record-batch", type=int, default=1, metavar="N")
    parser.add_argument("--record-features", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--others", nargs="+", type=Path, default=[], help="results of other targets, to compare"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import EvaluateOptions, evaluate

    given = vars(options).copy()
    del given["run"]
    evaluate(
        EvaluateOptions(
            drafters=named_paths(given.pop("drafter"), "--drafter"),
            benchmarks=given.pop("benchmark"),
            temperatures=given.pop("temperature"),
            tree=tuple(given.pop("tree")),
            compose=given.pop("compose") or (),
            average=given.pop("average") or (),
            **given,
        )
    )
