"""The demo: a page that shows which drafter's tokens are accepted while an answer is written.

    python app.py

Without arguments it answers with SmolLM2-135M-Instruct and the drafters in hub_cards/. This file is
also what a Space runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from taps_hf.checks import FINITE, Range, check_device, check_numbers
from taps_hf.command import Parser, run_command
from taps_hf.embedded import EMBEDDED_DRAFTERS

try:
    from taps_hf.demo.models import LOOKUP, ModelSpec, default_device, default_target
    from taps_hf.demo.page import PageOptions, serve
    from taps_hf.demo.settings import Limits
except ModuleNotFoundError as error:
    sys.exit(f'app.py: {error}; the demo needs more: pip install ".[demo]"')

_CARDS = Path(__file__).resolve().parent / "hub_cards"
_ON_A_SPACE = "SPACE_ID" in os.environ


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; returns the exit status."""
    limits = Limits()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", default=default_target(), help="folder, Hub name or `embedded` (%(default)s)"
    )
    parser.add_argument(
        "--drafters",
        nargs="+",
        metavar="NAME=PATH",
        default=[f"{name}={_CARDS / folder}" for name, folder in EMBEDDED_DRAFTERS.items()],
        help="folders or Hub names (default: math and chat, from hub_cards/)",
    )
    parser.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a drafter that looks up in the text, beside the others (default: yes)",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default=default_device(), help="%(default)s")
    parser.add_argument("--host", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--max-prompt-tokens", type=int, default=limits.prompt_tokens)
    parser.add_argument("--max-new-tokens", type=int, default=limits.new_tokens)
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=limits.seconds,
        help="of an answer; a comparison may take twice as long",
    )
    parser.add_argument("--concurrency", type=int, default=1, help="answers written at once")
    parser.add_argument("--queue-size", type=int, default=16, help="requests that may wait")
    parser.add_argument(
        "--choose-models",
        action=argparse.BooleanOptionalAction,
        default=not _ON_A_SPACE,
        help="let visitors load other models (default: not on a Space)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    return run_command("app.py", lambda: _serve(given), given.debug)


def _serve(given: argparse.Namespace) -> None:
    check_device(given.device)
    # Only that these are numbers: what they may be, the page's limits say.
    check_numbers(given, {"max_seconds": FINITE, "port": Range(at_least=1, at_most=65535)})
    models = ModelSpec.parse(given.target, given.drafters, given.dtype, given.device)
    if given.lookup and LOOKUP not in dict(models.drafters):
        models = replace(models, drafters=(*models.drafters, (LOOKUP, LOOKUP)))
    serve(
        PageOptions(
            models,
            Limits(
                prompt_tokens=given.max_prompt_tokens,
                new_tokens=given.max_new_tokens,
                seconds=given.max_seconds,
                comparison_seconds=2 * given.max_seconds,
            ),
            given.concurrency,
            given.queue_size,
            given.choose_models,
        ),
        given.host,
        given.port,
    )


if __name__ == "__main__":
    sys.exit(main())
