"""The target's own answers to prompts: what a drafter should learn to foresee.

An engine answers ([`engines`]); which prompts, and what of it is on disk when, is decided here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import (
    check_writable,
    cut_off,
    digest_of_file,
    hold,
    read_json,
    starts_like,
    write_json,
)
from .conversations import (
    DataReport,
    SourceRow,
    UnusableRowError,
    digest_of,
    messages_of,
    prompt_of,
)
from .encoding import encode_prompt
from .engines.base import Answer, AnswerEngine, RegenerateOptions
from .engines.batched import BatchedEngine
from .features import FeatureStore, fill_store


@dataclass(frozen=True)
class _Prompt:
    index: int
    messages: list[dict[str, str]]
    ids: list[int]
    where: str


@dataclass
class _Speed:
    """Of this run, since it was started."""

    tokens: int = 0
    answering: float = 0.0  # seconds
    keeping: float = 0.0

    def add(self, answers: Sequence[Answer], answering: float, keeping: float) -> None:
        self.tokens += sum(len(answer.tokens) for answer in answers)
        self.answering += answering
        self.keeping += keeping

    def __str__(self) -> str:
        seconds = self.answering + self.keeping
        return f"{self.tokens / seconds:.1f} tokens/s, keeping took {self.keeping / seconds:.0%}"


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SourceRow],
    out: Path,
    options: RegenerateOptions,
    store: FeatureStore | None = None,
    engine: AnswerEngine | None = None,
) -> DataReport:
    """Have the target answer the questions in `rows`; appends JSON lines to `out`.

    A line has `messages` (the answer last), `input_ids` and `answer_start` (the exact tokens),
    `finish_reason` (`stop` or `length`), `source` and `index`. A run that was stopped goes on where
    it was, with the same answers, if it is started with the same arguments. What `out` holds beyond
    the answers of that run is never cut off.

    Args:
        target: the model. With another engine than ours and without a store its weights are not
            used: it may lie on the meta device.
        rows: conversations, in the order in which they are dealt with.
        store: where to keep the features of prompts and answers: those that the engine computed on
            the way, or else the target's, of one more pass over each answer.
        engine: who answers, with these options; by default [`BatchedEngine`].

    Returns:
        how many of the rows were used, and why others were not.

    Raises:
        ValueError: if `out` was written with other options, by another engine or target, or not by
            this command alone.
    """
    report, speed = DataReport(), _Speed()
    ends = end_of_turn_ids(target, tokenizer)
    if engine is None:
        engine = BatchedEngine(target, options, ends, () if store is None else store.layers)
    asked = {
        "target": target.config.name_or_path,
        "dtype": str(target.dtype),
        "chat_template": tokenizer.get_chat_template(),
        "rows": digest_of(rows),
        "features": store is not None,
        "options": dict(vars(options)),
        **engine.asked,
    }
    with (
        hold_answers(out),
        tqdm(total=len(rows), unit="prompt", desc=out.name) as progress,
    ):
        done = _resume(out, asked, len(rows), engine)
        for start in range(0, len(rows), options.chunk_size):
            chunk = range(start, min(start + options.chunk_size, len(rows)))
            prompts = [*_prompts(rows, chunk, tokenizer, options, report)]
            if start >= done:
                before = time.perf_counter()
                answers = engine.answer([prompt.ids for prompt in prompts], start)
                answered = time.perf_counter()
                if store is not None:  # first, so that no answer on disk lacks its features
                    _keep_features(store, target, prompts, answers)
                _write(out, tokenizer, prompts, answers, ends, start + options.chunk_size)
                speed.add(answers, answered - before, time.perf_counter() - answered)
                progress.set_postfix_str(str(speed), refresh=False)
            progress.update(len(chunk))
    return report


def _prompts(
    rows: Sequence[SourceRow],
    chunk: range,
    tokenizer: PreTrainedTokenizerBase,
    options: RegenerateOptions,
    report: DataReport,
) -> Iterator[_Prompt]:
    """What is asked of the rows in a chunk; the others are counted in the report."""
    for index in chunk:
        row = rows[index]
        # Drawn by the row's index, so that a run that goes on draws the same.
        rng = random.Random(f"{options.seed}/{index}")
        try:
            messages = prompt_of(messages_of(row.fields), rng)
            ids = encode_prompt(tokenizer, messages)
            if len(ids) > options.max_prompt_tokens:
                raise UnusableRowError(f"a prompt of more than {options.max_prompt_tokens} tokens")
        except UnusableRowError as problem:
            report.count(str(problem), row.where)
            continue
        report.used += 1
        yield _Prompt(index, messages, ids, row.source)


def end_ids(target: PreTrainedModel) -> set[int]:
    """The tokens at which `generate` ends an answer of the target; maybe none."""
    ends = target.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


def end_of_turn_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which the target's answers end; the tokenizer's if the target names none."""
    return end_ids(target) or {tokenizer.eos_token_id} - {None}


def _keep_features(
    store: FeatureStore, target: PreTrainedModel, prompts: list[_Prompt], answers: list[Answer]
) -> None:
    """Add features of all but each answer's last token, which nothing is drafted from."""
    rows = [(p.ids + a.tokens[:-1], a.features) for p, a in zip(prompts, answers)]
    if any(features is None for _, features in rows):
        fill_store(store, target, [ids for ids, _ in rows], leave=False)
    else:
        store.append(rows)


def _state_file(out: Path) -> Path:
    return out.with_name(out.name + ".state.json")


def check_answers(out: Path) -> dict[str, Any]:
    """What is known of a file of answers, which may be yet to begin.

    Raises:
        ValueError: if there is such a file and this command did not write it, or not all of it.
    """
    file = _state_file(out)
    check_writable(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected a file of JSON lines.")
    if not file.exists():
        if out.exists() and out.stat().st_size:
            raise ValueError(f"{out} exists, but {file.name} does not; expected a new file.")
        return {"done": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    state = read_json(file, f"the state of {out.name}")
    if not {"asked", "done", "bytes"} <= set(state):
        raise ValueError(f"{file} is not the state of {out.name}; expected another name of `out`.")
    if not out.exists() and not state["bytes"]:  # it was stopped between its first two writes
        return {**state, "sha256": hashlib.sha256().hexdigest()}
    found = None
    if out.exists() and out.stat().st_size >= state["bytes"]:
        found = digest_of_file(out, state["bytes"])
    # Earlier versions noted no digest.
    if found is None or found != state.setdefault("sha256", found):
        raise ValueError(
            f"{out} is not as it was left: its first {state['bytes']} bytes differ from those that "
            f"{file.name} tells of; expected the same file, or a new name."
        )
    return state


def hold_answers(out: Path) -> IO[bytes]:
    """Be the only one that appends to a file of answers, which is made if it does not exist.

    Raises:
        ValueError: as [`check_answers`], or if another process appends to it.
    """
    check_answers(out)
    return hold(out)


def _resume(out: Path, asked: dict[str, object], total: int, engine: AnswerEngine) -> int:
    """How many rows were dealt with before; cuts off what a stopped run left half written.

    The engine is started, if there is anything left to do, before a new file is bound to it.
    """
    state = check_answers(out)
    if state.get("asked", asked) != asked:
        raise ValueError(f"{out} was begun with {state['asked']}, expected the same as {asked}.")
    if state["done"] < total:
        engine.start()
    if "asked" not in state:
        write_json(_state_file(out), {"asked": asked, **state})
        return 0
    cut_off(out, state["bytes"], lambda line: _is_answer(line, state["done"]))
    return state["done"]


def _is_answer(line: bytes, first: int) -> bool:
    """Whether a line, maybe cut short, is what is written for a row from `first` on."""
    if not line.endswith(b"\n"):
        return starts_like(line, b'{"messages": [')
    try:
        return int(json.loads(line)["index"]) >= first
    except (ValueError, TypeError, KeyError):
        return False


def _write(
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[_Prompt],
    answers: list[Answer],
    end_ids: set[int],
    done: int,
) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.writelines(_lines(tokenizer, prompts, answers, end_ids))
        file.flush()
        os.fsync(file.fileno())
    state = read_json(_state_file(out), f"the state of {out.name}")
    size = out.stat().st_size
    written = {"done": done, "bytes": size, "sha256": digest_of_file(out, size)}
    write_json(_state_file(out), {**state, **written})


def _lines(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[_Prompt],
    answers: list[Answer],
    end_ids: set[int],
) -> Iterator[str]:
    for prompt, answer in zip(prompts, answers):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        row = {
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
            "input_ids": [*prompt.ids, *answer.tokens],
            "answer_start": len(prompt.ids),
            "finish_reason": "stop" if answer.tokens[-1] in end_ids else "length",
            "source": prompt.where,
            "index": prompt.index,
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"
