"""Conversations as token ids, with the assistant's tokens marked, for any chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .conversations import DataReport, Message, SourceRow, UnusableRowError, messages_of


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    Args:
        input_ids: token ids.
        is_answer: of the same length: which of them the assistant wrote, end of turn included.
    """

    input_ids: tuple[int, ...]
    is_answer: tuple[bool, ...]


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], end_of_turn: Iterable[int] = ()
) -> Example:
    """Tokenise a conversation with the tokenizer's chat template.

    Templates with `{% generation %}` say themselves what the assistant wrote. For others it is what
    an answer adds to the conversation before it with the generation prompt, up to the first of the
    `end_of_turn` ids.

    Raises:
        UnusableRowError: if nothing in the template's text tells the assistant's tokens apart, or
            the template refuses the conversation.
        ValueError: if the tokenizer has no chat template.
    """
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\b", template):
        found = _apply(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        marks = [bool(mark) for mark in found["assistant_masks"]]
        if not any(marks):
            raise UnusableRowError("the chat template marks no token as the assistant's")
        return Example(tuple(found["input_ids"]), tuple(marks))
    whole = _ids(tokenizer, messages)
    marks = [False] * len(whole)
    ends = set(end_of_turn)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids(tokenizer, messages[:i], add_generation_prompt=True)
        until = _ids(tokenizer, messages[: i + 1])
        if until[: len(before)] != before or whole[: len(until)] != until:
            raise UnusableRowError(
                "the chat template does not continue its own generation prompt, and has no "
                "{% generation %} marks"
            )
        answer = until[len(before) :]
        stop = next((k + 1 for k, token in enumerate(answer) if token in ends), len(answer))
        marks[len(before) : len(before) + stop] = [True] * stop
    if not any(marks):
        raise UnusableRowError("no answer")
    return Example(tuple(whole), tuple(marks))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that the assistant is to continue.

    Raises:
        UnusableRowError: if the chat template refuses it, or makes nothing of it.
    """
    ids = _ids(tokenizer, messages, add_generation_prompt=True)
    if not ids:
        raise UnusableRowError("the chat template makes nothing of it")
    return ids


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[SourceRow],
    max_length: int,
    report: DataReport,
    end_of_turn: Iterable[int] = (),
) -> list[Example]:
    """Tokenise rows, counting in `report` those that are cut, and those that can't be used.

    Rows that the target itself answered (`input_ids` and `answer_start`, as `taps-hf regenerate`
    writes them) are taken token by token as they are.

    Args:
        max_length: tokens; longer examples are cut to it.
    """
    ends = tuple(end_of_turn)
    examples = []
    for row in rows:
        try:
            if "input_ids" in row.fields:
                example = _regenerated(row.fields, len(tokenizer))
            else:
                example = encode(tokenizer, messages_of(row.fields), ends)
            cut = len(example.input_ids) > max_length
            if cut:
                example = Example(example.input_ids[:max_length], example.is_answer[:max_length])
                if not any(example.is_answer):
                    raise UnusableRowError(f"no answer within the first {max_length} tokens")
            if not any(example.is_answer[2:]):  # nothing precedes those that a drafter could read
                raise UnusableRowError("an answer within the first two tokens alone")
            if cut:
                report.count(f"cut to {max_length} tokens, and used", row.where)
        except UnusableRowError as problem:
            report.count(str(problem), row.where)
            continue
        report.used += 1
        examples.append(example)
    return examples


def _regenerated(fields: dict, vocab_size: int) -> Example:
    ids, start = fields["input_ids"], fields.get("answer_start")
    if not isinstance(ids, list) or not isinstance(start, int) or not 0 < start < len(ids):
        raise UnusableRowError("`answer_start` does not lie within `input_ids`")
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
        raise UnusableRowError("`input_ids` holds something that is no token of this tokenizer")
    return Example(tuple(ids), tuple(i >= start for i in range(len(ids))))


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> list[int]:
    return _apply(
        tokenizer, messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **how: bool
) -> list[int] | BatchEncoding:
    try:
        return tokenizer.apply_chat_template(list(messages), **how)
    except TemplateError as error:  # many templates refuse systems, or turns they do not know
        raise UnusableRowError(f"the chat template refuses it: {error}") from error
