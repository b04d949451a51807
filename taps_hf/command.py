"""What commands do with errors: one line that says what is wrong, and an exit status."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from safetensors import SafetensorError

# What checks, files and the Hub raise for what the user can put right.
_EXPECTED = (ValueError, OSError, SafetensorError)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; the usage of some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def run_command(name: str, run: Callable[[], object], debug: bool = False) -> int:
    """Run a command; what it raises becomes one line on stderr.

    Args:
        name: of the command, with which the line begins.
        debug: also print the traceback.

    Returns:
        the exit status: 0; 2 if something was wrong with what was asked for, 1 for any other error,
        130 if interrupted.
    """
    try:
        run()
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        status, said = _verdict(error, debug)
        print(f"{name}: {said}", file=sys.stderr)
        return status
    return 0


def _verdict(error: BaseException, debug: bool) -> tuple[int, str]:
    """The exit status, and what to say."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    kind, message = type(error).__name__, _one_line(error)
    if isinstance(error, _EXPECTED):
        return 2, message or kind
    hint = "" if debug else " (not foreseen; --debug shows the traceback)"
    return 1, f"{kind}: {message}{hint}"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
