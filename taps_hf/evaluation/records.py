"""Records of the target: its answers, with all that replaying drafters against them needs.

Because decoding is lossless, every drafter and strategy emits the text the target emits alone. So
the target runs once per question and temperature, and drafters are replayed against the record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..cache import CACHE
from ..checks import COUNT, NOT_NEGATIVE, SEED, check_numbers
from ..files import check_begun, read_json, whole, write_json
from ..target import LAST, TargetSession
from ..training.engines.batched import answer_batch
from ..training.features import features_of
from ..training.regenerate import end_ids
from .benchmarks import Question

_INNER = "states."  # with a layer's index: what a file calls that layer's states


@dataclass(frozen=True)
class Record:
    """One answer of the target.

    Args:
        benchmark, question_id, category: of the question.
        turn: which of its turns, from 0.
        temperature: 0 for greedy.
        tokens: (n,) int64: prompt and answer.
        answer_start: index of the answer's first token.
        max_length: the limit that the answer was generated under.
        features: (n - 1, hidden): last hidden states of all tokens but the last.
        entropies: (n - answer_start,) float32, nats: of the target's distribution (at temperature
            1) that each answer token was chosen from.
        states: as `features`, by layer, of those inner layers that drafters have read so far.
    """

    benchmark: str
    question_id: str
    category: str
    turn: int
    temperature: float
    tokens: torch.Tensor
    answer_start: int
    max_length: int
    features: torch.Tensor
    entropies: torch.Tensor
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the record; another text has another name."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:8]
        question = f"{self.benchmark}/{self.question_id}"
        return f"{question}/{self.turn}/t{self.temperature:g}-{digest}"

    @property
    def num_answer_tokens(self) -> int:
        return len(self.tokens) - self.answer_start


@dataclass(frozen=True)
class RecordOptions:
    """How the target answers.

    Args:
        temperature: 0 is greedy; otherwise no top-k or top-p.
        max_new_tokens: longest answer.
        batch_size: 1 runs plain `generate`, seeded question by question, so that live runs with
            that seed give the same text. More answers that many questions at once: faster, but
            sampled text is drawn otherwise.
        seed: of sampled answers.
        feature_dtype: what features are kept in. float32 replays exactly as live runs; bfloat16
            takes half the room.
    """

    temperature: float = 0.0
    max_new_tokens: int = 256
    batch_size: int = 1
    seed: int = 0
    feature_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        ranges = {"temperature": NOT_NEGATIVE, "max_new_tokens": COUNT, "batch_size": COUNT}
        check_numbers(self, {**ranges, "seed": SEED})


class RecordStore:
    """A folder of records, one safetensors file each, written whole.

    Args:
        folder: made if it does not exist.
        settings: what all its records have in common: the target and how it was run.

    Raises:
        ValueError: if the folder was recorded with other settings, or holds other things.
    """

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self.folder = folder
        self.settings = settings
        check_begun(folder, "settings.json")
        file = folder / "settings.json"
        if not file.exists():
            write_json(file, settings)
        elif (found := read_json(file, "the settings of records")) != settings:
            raise ValueError(f"{folder} was recorded with {found}, expected {settings}.")

    def file(self, question: Question, turn: int, temperature: float) -> Path:
        """Where a record lies. Another text of the question has another name."""
        text = json.dumps([question.turns[: turn + 1], question.question_id])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder / f"{question.benchmark}-t{temperature:g}-{turn}-{digest}.safetensors"

    def save(self, file: Path, record: Record) -> None:
        """Write a record."""
        tensors = {
            "tokens": record.tokens.int(),
            "features": record.features.contiguous(),
            "entropies": record.entropies,
            **{f"{_INNER}{layer}": x.contiguous() for layer, x in record.states.items()},
        }
        names = ("benchmark", "question_id", "category", "turn", "temperature")
        rest = {name: getattr(record, name) for name in (*names, "answer_start", "max_length")}
        with whole(file) as temporary:
            save_file(tensors, temporary, metadata={"record": json.dumps(rest)})

    def load(self, file: Path) -> Record:
        """Read a record."""
        with safe_open(file, framework="pt") as opened:
            rest = json.loads(opened.metadata()["record"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        inner = [name for name in tensors if name.startswith(_INNER)]
        states = {int(name.removeprefix(_INNER)): tensors.pop(name) for name in inner}
        tensors["tokens"] = tensors["tokens"].long()
        return Record(**rest, **tensors, states=states)

    def complete(self, file: Path, target: PreTrainedModel, layers: Sequence[int]) -> bool:
        """Write a record anew if it lacks states of some layers, with them; whether it did."""
        with safe_open(file, framework="pt") as opened:
            held = set(opened.keys())
        missing = [layer for layer in layers if layer != LAST and f"{_INNER}{layer}" not in held]
        if not missing:
            return False
        kept = self.load(file)
        found = states_of(kept, target, missing)
        found.pop(LAST, None)
        self.save(file, replace(kept, states={**kept.states, **found}))
        return True


@torch.no_grad()
def states_of(
    record: Record, target: PreTrainedModel, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """By layer the states of all tokens but the last, (n - 1, hidden): these layers' and the last.

    What the record does not hold is computed, as the target computes a prompt: one pass. Of a text
    of one token there are none.

    Args:
        record: a text.
        target: whose states.
        layers: indices of decoder layers, or [`target.LAST`].
    """
    known = dict(record.states)
    if len(record.features):
        known[LAST] = record.features
    missing = [layer for layer in layers if layer not in known]
    if missing and len(record.tokens) > 1:
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        given = (record.tokens[None], GenerationConfig(), {CACHE: cache}, missing)
        with TargetSession(target, *given) as session:
            _, found = session.prefill()
        known |= {layer: x.to("cpu", record.features.dtype) for layer, x in found.items()}
    return {layer: known[layer] for layer in {LAST, *layers} if layer in known}


def record(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    options: RecordOptions,
    store: RecordStore,
    layers: Sequence[int] = (),
) -> list[Path]:
    """Have the target answer the questions, turn by turn, and keep what the store lacks.

    Args:
        target, tokenizer: who answers.
        questions: what is asked.
        options: how the target answers.
        store: of the records.
        layers: whose states are kept beside the last ones, which always are; records that lack some
            of them get them.

    Returns:
        the files of all records, question by question.
    """
    files: list[Path] = []
    said: dict[Question, list[dict[str, str]]] = {question: [] for question in questions}
    turns = max(len(question.turns) for question in questions)
    total = sum(len(question.turns) for question in questions)
    with tqdm(total=total, unit="answer", desc=f"records, t = {options.temperature:g}") as bar:
        for turn in range(turns):
            asked = [question for question in questions if turn < len(question.turns)]
            paths = {q: store.file(q, turn, options.temperature) for q in asked}
            files += paths.values()
            for question in asked:
                said[question].append({"role": "user", "content": question.turns[turn]})
            missing = [question for question in asked if not paths[question].exists()]
            bar.update(len(asked) - len(missing))
            prompts = {
                q: tokenizer.apply_chat_template(
                    said[q], add_generation_prompt=True, return_dict=False
                )
                for q in missing
            }
            for kept in _recorded(target, prompts, turn, options):
                for question, one in kept.items():
                    store.save(paths[question], one)
                bar.update(len(kept))
            for question in asked:
                store.complete(paths[question], target, layers)
                kept = store.load(paths[question])
                answer = tokenizer.decode(
                    kept.tokens[kept.answer_start :], skip_special_tokens=True
                )
                said[question].append({"role": "assistant", "content": answer})
    return sorted(files, key=lambda file: file.name)


def _recorded(
    target: PreTrainedModel,
    prompts: Mapping[Question, list[int]],
    turn: int,
    options: RecordOptions,
) -> Iterator[dict[Question, Record]]:
    """Records of the answers to prompts of one turn, batch by batch."""
    # Prompts of like length together.
    questions = sorted(prompts, key=lambda question: len(prompts[question]))
    for first in range(0, len(questions), options.batch_size):
        batch = questions[first : first + options.batch_size]
        seeds = [seed_of(options.seed, q.benchmark, q.question_id, turn) for q in batch]
        found = _answers(target, [prompts[q] for q in batch], options, seeds)
        yield {
            question: Record(
                question.benchmark,
                question.question_id,
                question.category,
                turn,
                options.temperature,
                tokens,
                start,
                start + options.max_new_tokens,
                features.to("cpu", options.feature_dtype),
                _entropies(target, features[start - 1 :]),
            )
            for question, (tokens, start, features) in zip(batch, found)
        }


def seed_of(seed: int, benchmark: str, question_id: str, turn: int) -> int:
    """Of one answer; the same whatever else is asked."""
    text = f"{seed}/{benchmark}/{question_id}/{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _answers(
    target: PreTrainedModel,
    prompts: list[list[int]],
    options: RecordOptions,
    seeds: list[int],
) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """For each prompt: all tokens, where the answer starts, the features of all but the last."""
    if options.batch_size == 1:
        (prompt,), (seed,) = prompts, seeds
        tokens = generate_seeded(target, prompt, options, seed)[0].cpu()
        features = features_of(target, tokens[None, :-1])[0]
        return [(tokens, len(prompt), features)]
    generator = torch.Generator(target.device).manual_seed(seeds[0])
    found = answer_batch(
        target,
        prompts,
        options.max_new_tokens,
        end_ids(target),
        options.temperature,
        generator,
        (LAST,),
    )
    return [
        (torch.tensor([*prompt, *answer.tokens]), len(prompt), answer.features)
        for prompt, answer in zip(prompts, found)
    ]


def generate_seeded(
    target: PreTrainedModel,
    prompt: Sequence[int],
    options: RecordOptions,
    seed: int,
    **more: Any,
) -> Any:
    """What `generate` returns for one prompt, greedy or sampled at the temperature.

    Args:
        more: further arguments of `generate`, as drafters.
    """
    ids = torch.tensor([list(prompt)], device=target.device)
    sampling: dict[str, object] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    return target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        **sampling,
        **more,
    )


@torch.no_grad()
def _entropies(target: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
    """(n,) float32, nats, of the target's distributions at features (n, hidden)."""
    head = target.get_output_embeddings()
    found = []
    for part in features.split(64):
        logits = head(part.to(head.weight.device, head.weight.dtype)).float()
        found.append(torch.distributions.Categorical(logits=logits).entropy().cpu())
    return torch.cat(found)
