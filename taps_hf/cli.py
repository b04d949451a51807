"""The command `taps-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checks import loading
from .command import Parser, run_command
from .diagnosis import add_check
from .drafters.averaging import average_drafters
from .drafters.modeling_eagle import EagleDrafter
from .evaluation.commands import add_evaluate
from .exchange import add_convert, add_export
from .files import ResultFolder
from .push import add_push
from .training.commands import add_regenerate, add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, see [`run_command`]."""
    parser = Parser(prog="taps-hf", description=__doc__)
    commands = parser.add_subparsers(required=True)
    average = commands.add_parser(
        "average", help="write a drafter whose weights are the mean of others'"
    )
    average.add_argument("drafters", nargs="+", help="folders or Hub names, at least two")
    average.add_argument(
        "--weights", nargs="+", type=float, help="one for each drafter, summing to 1"
    )
    average.add_argument("--out", required=True, help="folder to write")
    average.set_defaults(run=_average)
    add_regenerate(commands)
    add_train(commands)
    add_evaluate(commands)
    add_check(commands)
    add_convert(commands)
    add_export(commands)
    add_push(commands)
    # Before the command or after it: there, what is not given must not overrule what was.
    for known in (parser, *commands.choices.values()):
        default = False if known is parser else argparse.SUPPRESS
        known.add_argument(
            "--debug", action="store_true", default=default, help="show the traceback of an error"
        )
    options = parser.parse_args(arguments)
    debug = vars(options).pop("debug")
    return run_command(parser.prog, lambda: options.run(options), debug)


def _average(options: argparse.Namespace) -> None:
    used = {"drafters": [name for name in options.drafters if Path(name).exists()]}
    result = ResultFolder(Path(options.out), "average", used)
    drafters = []
    for name in options.drafters:
        with loading(f"Drafter {name}"):
            drafters.append(EagleDrafter.from_pretrained(name))
    average = average_drafters(drafters, options.weights)
    with result.writing() as folder:
        average.save_pretrained(folder)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
