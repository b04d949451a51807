from __future__ import annotations

import pytest

from taps_hf.training.conversations import DataReport, SourceRow, UnusableRowError
from taps_hf.training.encoding import encode, encode_prompt, encode_rows

from .chat import CHATML, MARKED, REWRITING, chat_tokenizer

SAID = [
    {"role": "user", "content": "t5 t6"},
    {"role": "assistant", "content": "t7"},
    {"role": "user", "content": "t8"},
    {"role": "assistant", "content": "t9 t10 t5"},
]


def answers(example) -> list[int]:
    return [t for t, answer in zip(example.input_ids, example.is_answer) if answer]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_what_the_assistant_wrote_is_marked(template):
    tokenizer = chat_tokenizer(template)
    example = encode(tokenizer, SAID, end_of_turn=[2])
    whole = tokenizer.apply_chat_template(SAID, return_dict=False)
    assert list(example.input_ids) == whole
    assert answers(example) == [7, 2, 9, 10, 5, 2]
    # The tokens before an answer are exactly the prompt for it.
    first = example.is_answer.index(True)
    assert whole[:first] == encode_prompt(tokenizer, SAID[:1])


def test_templates_that_tell_nothing_apart_are_refused():
    with pytest.raises(UnusableRowError, match="does not continue its own generation prompt"):
        encode(chat_tokenizer(REWRITING), SAID)
    with pytest.raises(UnusableRowError, match="no answer"):
        encode(chat_tokenizer(CHATML), SAID[:1])
    with pytest.raises(UnusableRowError, match="marks no token"):
        encode(chat_tokenizer(MARKED), SAID[:1])


def test_conversations_that_a_template_refuses_are_counted():
    refusing = (
        CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer = chat_tokenizer(refusing)
    row = {"messages": [{"role": "system", "content": "t5"}, *SAID]}
    report = DataReport()
    rows = [SourceRow(row, "f", 1), SourceRow({"messages": SAID}, "f", 2)]
    assert len(encode_rows(tokenizer, rows, 100, report, [2])) == 1
    assert report.first == {"the chat template refuses it: no": "f:1"}
    with pytest.raises(UnusableRowError, match="makes nothing of it"):
        encode_prompt(chat_tokenizer("{{ '' }}"), SAID[:1])


def test_every_row_is_used_or_counted():
    tokenizer = chat_tokenizer(CHATML)
    fields = [
        {"messages": SAID},
        {"messages": SAID[:1]},
        {"conversations": 3},
        {"input_ids": [4, 5, 6, 7], "answer_start": 2, "messages": SAID},
        {"input_ids": [4, 5], "answer_start": 2},
        {"input_ids": [4, 99], "answer_start": 1},
        {"input_ids": [4, 5], "answer_start": 1},
    ]
    rows = [SourceRow(row, "f", number) for number, row in enumerate(fields, start=1)]
    report = DataReport()
    examples = encode_rows(tokenizer, rows, 100, report, [2])
    assert report.used == len(examples) == 2
    assert answers(examples[1]) == [6, 7]
    assert sum(report.problems.values()) == 5
    assert set(report.first.values()) == {"f:2", "f:3", "f:5", "f:6", "f:7"}


def test_long_rows_are_cut_and_counted():
    tokenizer = chat_tokenizer(CHATML)
    row = SourceRow({"messages": SAID}, "f", 1)
    (whole,) = encode_rows(tokenizer, [row], 99, DataReport(), [2])
    first = whole.is_answer.index(True)
    for length, used in [(first + 1, 1), (first, 0)]:
        report = DataReport()
        found = encode_rows(tokenizer, [row], length, report, [2])
        assert len(found) == report.used == used
        assert [example.input_ids for example in found] == [whole.input_ids[:length]] * used
        assert sum(report.problems.values()) == 1
