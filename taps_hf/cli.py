"""The command `taps-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from .averaging import average_drafters
from .evaluation.commands import add_evaluate
from .files import ResultFolder
from .modeling_eagle import EagleDrafter
from .push import add_push
from .training.commands import add_regenerate, add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="taps-hf", description=__doc__)
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
    add_push(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"taps-hf: {error}", file=sys.stderr)
        return 2
    return 0


def _average(options: argparse.Namespace) -> None:
    result = ResultFolder(Path(options.out), "average")
    drafters = [EagleDrafter.from_pretrained(name) for name in options.drafters]
    average = average_drafters(drafters, options.weights)
    with result.writing() as folder:
        average.save_pretrained(folder)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
