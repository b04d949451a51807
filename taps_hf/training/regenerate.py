"""The target's own answers to prompts: what a drafter should learn to foresee.

Own loop rather than `generate`: rows that have ended leave the batch, the cache grows in place, and
the features, which `generate` would compute and forget, can be kept for training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache import CACHE, InPlaceCache
from ..checks import COUNT, NOT_NEGATIVE, SEED, check_numbers
from ..files import (
    check_writable,
    cut_off,
    digest_of_file,
    hold,
    read_json,
    starts_like,
    write_json,
)
from ..target import LAST
from .conversations import (
    DataReport,
    SourceRow,
    UnusableRowError,
    digest_of,
    messages_of,
    prompt_of,
)
from .encoding import encode_prompt
from .features import FeatureStore, LayerStates


@dataclass(frozen=True)
class Answer:
    """What the target wrote.

    Args:
        tokens: ids, ending with an end-of-sequence token unless the answer was cut.
        features: (prompt + answer - 1, layers x hidden) or None: the target's states of every
            token but the last one, which was never read.
    """

    tokens: list[int]
    features: torch.Tensor | None


@torch.inference_mode()
def answer_batch(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: set[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    layers: Sequence[int] = (),
) -> list[Answer]:
    """Answer tokenised prompts together.

    Args:
        prompts: token ids of each prompt.
        max_new_tokens: longest answer.
        end_ids: tokens that end an answer.
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        generator: where random numbers come from, on the target's device.
        layers: whose states of prompts and answers are returned, side by side in this order (see
            [`features`]); none for no features.

    Raises:
        ValueError: if the target has no such layers.
    """
    device, head = target.device, target.get_output_embeddings()
    read = tuple(layers) if LAST in layers else (*layers, LAST)
    decoder = LayerStates(target, read)
    width = target.config.get_text_config(decoder=True).hidden_size
    scored = slice(read.index(LAST) * width, (read.index(LAST) + 1) * width)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(padding, prompts)], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = InPlaceCache(DynamicCache(config=target.config.get_text_config(decoder=True)))
    answers: list[list[int]] = [[] for _ in prompts]
    features: list[list[torch.Tensor]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt a row of the shrinking batch belongs to
    while True:
        states = decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache.cache},
        )
        tokens = _choose(head(states[:, -1, scored]).float(), temperature, generator)
        # Of all rows at once: a device would be waited for row by row.
        kept_states = states[..., : len(layers) * width].to("cpu", copy=True) if layers else None
        going = []
        for row, token in enumerate(tokens.tolist()):
            index = rows[row]
            answer = answers[index]
            if answer and answer[-1] in end_ids:
                continue  # ended, but still in the batch
            if kept_states is not None:
                first = 0 if answer else padding[index]
                features[index].append(kept_states[row, first:])
            answer.append(token)
            if token not in end_ids:
                going.append(row)
        if not going or len(answers[rows[going[0]]]) == max_new_tokens:
            break
        if len(going) < 0.85 * len(rows):  # dropping rows copies the cache: not every time
            kept = torch.tensor(going, device=device)
            cache.select_rows(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            rows = [rows[row] for row in going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        Answer(answer, torch.cat(parts) if layers else None)
        for answer, parts in zip(answers, features)
    ]


def _choose(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """(batch,) int64 tokens from (batch, vocabulary) float32 logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The Gumbel trick rather than multinomial, which is slow for many rows on a CPU.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return (logits / temperature - noise).argmax(dim=-1)


@dataclass(frozen=True)
class RegenerateOptions:
    """How prompts are drawn and answered.

    Args:
        max_prompt_tokens: longer prompts are left out, and counted.
        max_new_tokens: longest answer.
        temperature: 0 for greedy answers.
        batch_size: prompts answered together.
        chunk_size: prompts between two writes to disk; within one, prompts of like length are
            batched together.
        seed: of the order of the rows, of which question of a conversation is asked, and of
            sampled answers.
    """

    max_prompt_tokens: int = 512
    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 64
    chunk_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_prompt_tokens", "max_new_tokens", "batch_size", "chunk_size")
        ranges = {**dict.fromkeys(counts, COUNT), "temperature": NOT_NEGATIVE, "seed": SEED}
        check_numbers(self, ranges)


@dataclass(frozen=True)
class _Prompt:
    index: int
    messages: list[dict[str, str]]
    ids: list[int]
    where: str


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SourceRow],
    out: Path,
    options: RegenerateOptions,
    store: FeatureStore | None = None,
) -> DataReport:
    """Have the target answer the questions in `rows`; appends JSON lines to `out`.

    A line has `messages` (the answer last), `input_ids` and `answer_start` (the exact tokens),
    `finish_reason` (`stop` or `length`), `source` and `index`. A run that was stopped goes on where
    it was, with the same answers, if it is started with the same arguments. What `out` holds beyond
    the answers of that run is never cut off.

    Args:
        rows: conversations, in the order in which they are dealt with.
        store: where to keep the features the target computed on the way.

    Returns:
        how many of the rows were used, and why others were not.

    Raises:
        ValueError: if `out` was written with other options or another target, or not by this
            command alone.
    """
    report = DataReport()
    asked = {
        "target": target.config.name_or_path,
        "dtype": str(target.dtype),
        "chat_template": tokenizer.get_chat_template(),
        "rows": digest_of(rows),
        "features": store is not None,
        "options": dict(vars(options)),
    }
    end_ids = end_of_turn_ids(target, tokenizer)
    with (
        hold_answers(out),
        tqdm(total=len(rows), unit="prompt", desc=out.name) as progress,
    ):
        done = _resume(out, asked)
        for start in range(0, len(rows), options.chunk_size):
            chunk = range(start, min(start + options.chunk_size, len(rows)))
            prompts = [*_prompts(rows, chunk, tokenizer, options, report)]
            if start >= done:
                generator = torch.Generator(target.device).manual_seed(options.seed * 10**6 + start)
                answers = _answer_chunk(target, prompts, end_ids, options, generator, store)
                if store is not None:  # first, so that no answer on disk lacks its features
                    store.append(
                        (p.ids + a.tokens[:-1], a.features) for p, a in zip(prompts, answers)
                    )
                _write(out, tokenizer, prompts, answers, end_ids, start + options.chunk_size)
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


def _answer_chunk(
    target: PreTrainedModel,
    prompts: list[_Prompt],
    end_ids: set[int],
    options: RegenerateOptions,
    generator: torch.Generator,
    store: FeatureStore | None,
) -> list[Answer]:
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    for first in range(0, len(order), options.batch_size):
        batch = order[first : first + options.batch_size]
        found = answer_batch(
            target,
            [prompts[i].ids for i in batch],
            options.max_new_tokens,
            end_ids,
            options.temperature,
            generator,
            () if store is None else store.layers,
        )
        answers.update(zip(batch, found))
    return [answers[i] for i in range(len(prompts))]


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


def _resume(out: Path, asked: dict[str, object]) -> int:
    """How many rows were dealt with before; cuts off what a stopped run left half written."""
    state = check_answers(out)
    if "asked" not in state:
        write_json(_state_file(out), {"asked": asked, **state})
        return 0
    if state["asked"] != asked:
        raise ValueError(f"{out} was begun with {state['asked']}, expected the same as {asked}.")

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
