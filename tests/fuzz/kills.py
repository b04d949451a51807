"""Commands that are killed again and again: in the end, the files of an undisturbed run.

A run is a process of its own, forked from a server that has imported everything: it spends its time
at work, and so the kills fall there. One kill in two comes at a random moment, the others at, or up
to some milliseconds after, a random one of the run's steps in its folder (a file opened, renamed,
removed, ...), where they hurt most.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..tiny import tiny_drafters, tiny_target
from ..training.chat import CHATML, chat_tokenizer

_HALF_WRITTEN = re.compile(r"\..*\.[0-9a-f]{32}")
_KILLS = 6  # at most; then the run may end
_KEPT: list[tempfile.TemporaryDirectory] = []  # for as long as this process lives
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "taps_hf.training.train", "taps_hf.evaluation.evaluate"])


class Command(NamedTuple):
    """A command to be killed.

    Args:
        arguments: of `taps-hf`, from the folder of the inputs and the one to write in.
        results: globs, in the latter, of what has to be the same.
    """

    arguments: Callable[[Path, Path], list[str]]
    results: Sequence[str]


def _train(inputs: Path, out: Path) -> list[str]:
    return [
        *("train", "--target", f"{inputs / 'target'}", "--data", f"{inputs / 'rows.jsonl'}"),
        *("--out", f"{out / 'drafter'}", "--features", f"{out / 'features'}", "--device", "cpu"),
        *("--objective", "hass", "--held-out", "0.2", "--max-steps", "12", "--batch-size", "4"),
        *("--evaluations", "4", "--eval-depth", "2", "--dtype", "float32", "--threads", "1"),
    ]


def _regenerate(inputs: Path, out: Path) -> list[str]:
    return [
        *("regenerate", "--target", f"{inputs / 'target'}", "--data", f"{inputs / 'rows.jsonl'}"),
        *("--out", f"{out / 'answers.jsonl'}", "--features", f"{out / 'features'}"),
        *("--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-new-tokens", "12"),
        *("--batch-size", "2", "--chunk-size", "4", "--temperature", "0.7"),
    ]


def _evaluate(inputs: Path, out: Path) -> list[str]:
    return [
        *("evaluate", "--target", f"{inputs / 'target'}", "--out", f"{out / 'results'}"),
        *("--drafter", f"math={inputs / 'math'}", "--drafter", f"chat={inputs / 'chat'}"),
        *("--compose", "math", "chat", "--benchmark", f"sums={inputs / 'sums.jsonl'}"),
        *("--tree", "3", "3", "6", "--max-new-tokens", "10", "--temperature", "0", "1"),
        *("--device", "cpu", "--threads", "1"),
    ]


COMMANDS = {
    "train": Command(_train, ["drafter/*"]),
    "regenerate": Command(_regenerate, ["answers.jsonl*", "features/**/*"]),
    "evaluate": Command(_evaluate, ["results/records/*", "results/*.json*", "results/tables/*"]),
}
if importlib.util.find_spec("matplotlib") is None:  # of the extra "eval", which `evaluate` needs
    del COMMANDS["evaluate"]


def case(seed: int) -> None:
    """Kill one command up to six times, let it end, and compare."""
    choose = random.Random(seed)
    _kill(choose.choice(sorted(COMMANDS)), choose)


def every_command(seed: int) -> None:
    """A case of each."""
    for name in COMMANDS:
        _kill(name, random.Random(seed))


def _kill(name: str, choose: random.Random) -> None:
    command = COMMANDS[name]
    undisturbed = _undisturbed(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        out.mkdir()
        arguments = command.arguments(_inputs(), out)
        for _ in range(choose.randint(1, _KILLS)):
            if choose.random() < 0.5:
                step = choose.randint(1, undisturbed.steps)
                delay = choose.choice([0.0, 10 ** choose.uniform(-5, -2.5)])
                print(f"{name}, killed {delay:.6f} s after the beginning of its step {step}")
                ended = _run(arguments, out, step=step, delay=delay)
            else:
                share = choose.random()
                print(f"{name}, killed after {share:.0%} of the time")
                ended = _run(arguments, out, seconds=share * undisturbed.seconds)
            if ended:  # this one had more behind it than the kill was to leave
                break
        assert _run(arguments, out)
        found = _results(command, out)
    assert found.keys() == undisturbed.results.keys()
    assert [file for file in found if found[file] != undisturbed.results[file]] == []


class _Undisturbed(NamedTuple):
    results: dict[str, bytes]
    seconds: float
    steps: int


@functools.cache
def _undisturbed(name: str) -> _Undisturbed:
    command = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        out.mkdir()
        counted = Path(folder, "steps")
        start = time.perf_counter()
        assert _run(command.arguments(_inputs(), out), out, count_to=counted)
        seconds = time.perf_counter() - start
        return _Undisturbed(_results(command, out), seconds, int(counted.read_text()))


def _results(command: Command, out: Path) -> dict[str, bytes]:
    """Contents by name, without the name of `out`, and without what was half written when killed.

    That keeps the hidden name under which it was written: nobody is left to remove it.
    """
    files = {file for glob in command.results for file in out.glob(glob) if file.is_file()}
    files = {file for file in files if not _HALF_WRITTEN.match(file.name)}
    contents = {file.relative_to(out).as_posix(): file.read_bytes() for file in files}
    here = str(out).encode()
    return {name: content.replace(here, b"") for name, content in sorted(contents.items())}


def _run(
    arguments: list[str],
    out: Path,
    step: int | None = None,
    delay: float = 0.0,
    seconds: float | None = None,
    count_to: Path | None = None,
) -> bool:
    """Run a command, and kill it so long after the beginning of a step, or of the run.

    Returns:
        whether it came to its end.

    Raises:
        AssertionError: if it failed, with what it said.
    """
    said = out.with_name("said")
    process = _CONTEXT.Process(target=_work, args=(arguments, out, said, step, delay, count_to))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    if process.exitcode in (-signal.SIGKILL, -signal.SIGALRM):
        return False
    assert process.exitcode == 0, said.read_text()[-3000:]
    return True


def _work(
    arguments: list[str],
    out: Path,
    said: Path,
    step: int | None,
    delay: float,
    count_to: Path | None,
) -> None:
    """In the process: run the command."""
    from taps_hf.cli import main

    torch.set_num_threads(1)
    steps = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal steps
        if event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        paths = [str(detail) for detail in details if isinstance(detail, (str, os.PathLike))]
        if any(path.startswith(str(out)) for path in paths):
            steps += 1
            if steps == step and delay:  # nobody handles it: the process ends at once
                signal.setitimer(signal.ITIMER_REAL, delay)
            elif steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(arguments)
    if count_to is not None:
        count_to.write_text(str(steps))
    sys.exit(code)


@functools.cache
def _inputs() -> Path:
    """Models and data."""
    holder = tempfile.TemporaryDirectory()
    _KEPT.append(holder)
    folder = Path(holder.name)
    tiny_target().save_pretrained(folder / "target")
    chat_tokenizer(CHATML).save_pretrained(folder / "target")
    for name, drafter in zip(("math", "chat"), tiny_drafters(2)):
        drafter.save_pretrained(folder / name)
    choose = random.Random(0)
    words = [
        choose.choices([f"t{i}" for i in range(5, 15)], k=choose.randint(3, 9)) for _ in range(24)
    ]
    rows = [{"instruction": " ".join(w), "output": " ".join(w[::-1])} for w in words]
    asked = [{"question_id": i, "turns": [f"t5 t{6 + i}", "t7"]} for i in range(3)]
    for name, lines in (("rows", rows), ("sums", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
