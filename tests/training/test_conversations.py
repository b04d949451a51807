from __future__ import annotations

import gzip
import json
import random
import sys

import pytest

from taps_hf.training.conversations import (
    DataReport,
    DataSource,
    UnusableRowError,
    messages_of,
    prompt_of,
    read_mixture,
)

SAID = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b."},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d."},
]


def write(file, rows) -> DataSource:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(file))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SAID},
        {
            "conversations": [
                {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
                for m in SAID
            ]
        },
    ],
)
def test_conversations_of_either_kind_read_the_same(row):
    assert messages_of(row) == SAID
    system = {"role": "system", "content": "s"}
    assert messages_of({"messages": [system, *SAID]}) == [system, *SAID]


def test_instructions_become_two_messages():
    row = {"instruction": "a?", "output": "b."}
    assert messages_of(row) == SAID[:2]
    found = messages_of({**row, "input": "of this"})
    assert found[0]["content"] == "a?\n\nof this"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "none of the fields"),
        ({"instruction": "x"}, "no `output`"),
        ({"instruction": "x", "output": 3}, "not text"),
        ({"instruction": "x", "output": "  "}, "an empty answer"),
        ({"instruction": "", "output": "x"}, "an empty question"),
        ({"messages": "x"}, "not a list"),
        ({"messages": []}, "do not alternate"),
        ({"messages": SAID[1:]}, "do not alternate"),
        ({"messages": [SAID[0], SAID[0]]}, "do not alternate"),
        ({"messages": [{"role": "user"}]}, "lacks `role` or `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "not text"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role \['user'\]"),
        ({"messages": [{"role": None, "content": "x"}]}, "unknown role None"),
        ({"instruction": "\ud800", "output": "x"}, "half of a surrogate pair"),
        ({"messages": [SAID[0], {**SAID[1], "content": "x\udfff"}]}, "half of a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, reason):
    with pytest.raises(UnusableRowError, match=reason):
        messages_of(row)


def test_prompts_end_with_any_of_the_questions():
    found = {len(prompt_of(SAID, random.Random(seed))) for seed in range(20)}
    assert found == {1, 3}


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("x.jsonl", DataSource("x.jsonl")),
        ("x.jsonl:35000", DataSource("x.jsonl", count=35000)),
        ("x.jsonl:12.5%", DataSource("x.jsonl", share=0.125)),
        ("org/name:7", DataSource("org/name", count=7)),
        ("c:/x.jsonl", DataSource("c:/x.jsonl")),
    ],
)
def test_sources_are_read_from_text(text, source):
    assert DataSource.parse(text) == source


@pytest.mark.parametrize("text", ["x:0", "x:0%", "x:101%"])
def test_amounts_of_nothing_are_refused(text):
    with pytest.raises(ValueError, match="expected more than none"):
        DataSource.parse(text)


def test_a_file_gives_all_its_rows_in_a_seeded_order(tmp_path):
    rows = [{"instruction": str(i), "output": "x"} for i in range(30)]
    source = write(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "zip"
    zipped.mkdir()
    with gzip.open(zipped / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    found = [dict(row.fields) for row in read_mixture([source], DataReport(), seed=3)]
    assert found != rows
    assert sorted(found, key=lambda row: int(row["instruction"])) == rows
    again = read_mixture([source], DataReport(), seed=3)
    assert [dict(row.fields) for row in again] == found
    unzipped = read_mixture([DataSource(str(zipped / "a.jsonl.gz"))], DataReport())
    assert len(unzipped) == 30


def test_mixtures_by_count_and_by_share(tmp_path):
    a = write(tmp_path / "a", [{"instruction": "a", "output": "x"}] * 30).name
    b = write(tmp_path / "b", [{"instruction": "b", "output": "x"}] * 8).name

    def counts(*sources: str) -> list[int]:
        rows = read_mixture([DataSource.parse(text) for text in sources], DataReport())
        return [sum(row.source == name for row in rows) for name in "ab"]

    assert counts(a, b) == [30, 8]
    assert counts(f"{a}:3", b) == [3, 8]
    assert counts(f"{a}:50%", f"{b}:50%") == [8, 8]
    assert counts(f"{a}:75%", f"{b}:25%") == [24, 8]
    with pytest.raises(ValueError, match="has 8 rows, expected at least the 9"):
        counts(f"{b}:9")
    for wrong in [(f"{a}:50%", b), (f"{a}:50%", f"{b}:40%")]:
        with pytest.raises(ValueError, match="100% together"):
            counts(*wrong)


def test_lines_that_are_no_objects_are_counted(tmp_path):
    file = tmp_path / "x.jsonl"
    unreadable = b'{"half', b"[1]", b'{"caf\xe9": 1}', b"[" * 100_000, b"9" * 10_000
    file.write_bytes(b"\n".join((b'{"instruction": "a", "output": "b"}', *unreadable)))
    report = DataReport()
    assert len(read_mixture([DataSource(str(file))], report)) == 1
    assert report.problems == {"not a JSON object": len(unreadable)}
    assert "first: x.jsonl:2" in str(report)


def test_compressed_files_that_are_not_whole_are_refused(tmp_path):
    """However many rows come before: nobody knows how many are missing."""
    rows = "".join(json.dumps({"instruction": str(i), "output": "x"}) + "\n" for i in range(5000))
    whole = gzip.compress(rows.encode())
    broken = {"short": whole[:-100], "flipped": whole[:-4000] + b"\xff" * 4000, "plain": b"{}\n"}
    for name, content in broken.items():
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.jsonl.gz, line \d+: .* whole gzip file"):
            read_mixture([DataSource(str(file))], DataReport())


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").touch()
    for name, message in [("none.jsonl", "does not exist"), ("empty.jsonl", "has no rows")]:
        with pytest.raises(ValueError, match=message):
            read_mixture([DataSource(str(tmp_path / name))], DataReport())
    with pytest.raises(ValueError, match="No data"):
        read_mixture([], DataReport())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="taps-hf\\[train\\]"):
        read_mixture([DataSource("org/name")], DataReport())


def test_data_sets_of_the_hub_are_read(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, split):
            assert (name, split) == ("org/name", "train")
            return [{"instruction": "a", "output": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    (row,) = read_mixture([DataSource("org/name")], DataReport())
    assert messages_of(row.fields) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_reports_add_up():
    one, two = DataReport(used=2), DataReport(used=3)
    one.count("odd", "a:1")
    two.count("odd", "b:9")
    one.merge(two)
    assert str(one) == "5 rows used\n2 rows: odd (first: a:1)"
