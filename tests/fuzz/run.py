"""The long run: `make fuzz`. What it does is said in the package."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from transformers.utils import logging

from .kinds import KINDS

_EVERY = 30.0  # seconds between two lines of progress
_ENOUGH = 20  # failures
_STUCK = 900.0  # seconds after which a case is taken to hang: its process says where, and ends


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="in all (default: 600)")
    parser.add_argument("--kind", choices=[*KINDS], help="only this one")
    parser.add_argument("--seed", type=int, help="only this case of --kind")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    if options.seed is not None:
        if options.kind is None:
            parser.error("--seed needs --kind: a seed is one of a kind")
        _prepare()
        KINDS[options.kind].case(options.seed)
        print("passed")
        return 0
    return Run([options.kind] if options.kind else [*KINDS], options.seconds, options.jobs).run()


class Run:
    """Cases of several kinds until the time is over, in several processes.

    Args:
        kinds: names.
        seconds: after which no case is begun.
        jobs: processes.
    """

    def __init__(self, kinds: list[str], seconds: float, jobs: int) -> None:
        self.kinds, self.seconds, self.jobs = kinds, seconds, jobs
        self.first = random.SystemRandom().randrange(2**40)
        self.begun: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.took: Counter[str] = Counter()  # seconds, of cases that ended
        self.failed: list[tuple[str, int]] = []

    def run(self) -> int:
        """Returns the exit status."""
        start = told = time.monotonic()
        context = multiprocessing.get_context("spawn")
        running: dict[Future, tuple[str, int]] = {}
        pool = ProcessPoolExecutor(self.jobs, context, _prepare)
        try:
            while running or time.monotonic() < start + self.seconds:
                while len(running) < self.jobs and time.monotonic() < start + self.seconds:
                    kind = self._next([kind for kind, _ in running.values()])
                    seed = self.first + self.begun[kind]
                    self.begun[kind] += 1
                    running[pool.submit(attempt, kind, seed)] = (kind, seed)
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    self.take(*running[future], *future.result())
                    del running[future]
                if len(self.failed) >= _ENOUGH:
                    break
                if time.monotonic() > told + _EVERY:
                    told = time.monotonic()
                    print(f"{told - start:.0f} s: {self}", flush=True)
        except BrokenProcessPool:
            print(f"A process died, at one of {[*running.values()]}.")
            self.failed += running.values()
        finally:
            pool.shutdown(cancel_futures=True)
        print(f"In {time.monotonic() - start:.0f} s: {self}")
        return 1 if self.failed else 0

    def _next(self, running: list[str]) -> str:
        """The kind that has had, or is having, the least of its share."""

        def share(kind: str) -> float:
            each = self.took[kind] / self.passed[kind] if self.passed[kind] else float("inf")
            under_way = running.count(kind) * each if kind in running else 0.0
            return (self.took[kind] + under_way) / KINDS[kind].share

        return min(self.kinds, key=share)

    def take(self, kind: str, seed: int, seconds: float, report: str | None) -> None:
        """Count a case that has ended, and say how to repeat it if it failed."""
        self.took[kind] += seconds
        if report is None:
            self.passed[kind] += 1
            return
        self.failed.append((kind, seed))
        print(f"--- make fuzz FUZZ_KIND={kind} FUZZ_SEED={seed}\n{report}", flush=True)

    def __str__(self) -> str:
        passed = ", ".join(
            f"{kind} {self.passed[kind]} ({self.took[kind]:.0f} s)" for kind in self.kinds
        )
        failed = ", ".join(f"{kind} {seed}" for kind, seed in self.failed) or "none"
        return f"passed: {passed}; failed: {failed}"


def _prepare() -> None:
    torch.set_num_threads(1)  # tiny models gain nothing from more
    warnings.filterwarnings("ignore", "Unfeasible length constraints")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def attempt(kind: str, seed: int) -> tuple[float, str | None]:
    """Run a case.

    Returns:
        how many seconds it took, and if it failed what it had printed and raised.
    """
    said = io.StringIO()
    start = time.monotonic()
    # Not the stream that tests capture.
    faulthandler.dump_traceback_later(_STUCK, exit=True, file=sys.__stderr__)
    report = None
    try:
        with contextlib.redirect_stdout(said):
            KINDS[kind].case(seed)
    except Exception:
        report = said.getvalue() + traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - start, report


if __name__ == "__main__":
    sys.exit(main())
