from __future__ import annotations

import json
import sys

import pytest

from taps_hf.evaluation.benchmarks import HUB_BENCHMARKS, Question, read_benchmark


def write(file, rows) -> str:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return f"sums={file}"


def test_questions_of_a_file(tmp_path):
    rows = [{"question_id": 7, "category": "easy", "turns": ["a", "b"]}, "", {"turns": ["c"]}]
    assert read_benchmark(write(tmp_path / "x.jsonl", rows)) == [
        Question("sums", "7", ("a", "b"), "easy"),
        Question("sums", "1", ("c",), ""),
    ]


def test_samples_are_spread_and_seeded(tmp_path):
    spec = write(tmp_path / "x.jsonl", [{"turns": [str(i)]} for i in range(100)])
    found = [int(question.turns[0]) for question in read_benchmark(spec, limit=10)]
    assert [i // 10 for i in found] == list(range(10))
    assert found == [int(q.turns[0]) for q in read_benchmark(spec, limit=10)]
    assert found != [int(q.turns[0]) for q in read_benchmark(spec, limit=10, seed=1)]
    assert len(read_benchmark(spec, limit=1000)) == 100
    with pytest.raises(ValueError, match="`limit` is 0"):
        read_benchmark(spec, limit=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"turns": ["a"]}', "{half"], "x.jsonl, line 2: not JSON"),
        ([{"turns": ["a"]}, {"prompt": "b"}], "x.jsonl, line 2: expected an object with `turns`"),
        ([{"turns": []}], "line 1: expected"),
        ([{"turns": [" "]}], "line 1: expected"),
        ([{"turns": ["a"], "question_id": 1}] * 2, "line 2: `question_id` 1 occurs twice"),
        ([], "no questions"),
    ],
)
def test_bad_files_are_refused_by_file_and_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(write(tmp_path / "x.jsonl", rows))


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        read_benchmark(f"a={tmp_path / 'none'}")
    with pytest.raises(ValueError, match="expected NAME=FILE or one of gsm8k"):
        read_benchmark("unknown")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="taps-hf\\[eval\\]"):
        read_benchmark("gsm8k")


def test_benchmarks_of_the_hub_have_the_same_form(monkeypatch):
    rows = {
        "openai/gsm8k": {"question": "q", "answer": "a"},
        "HuggingFaceH4/MATH-500": {"problem": "q", "subject": "algebra"},
        "ChilleD/SVAMP": {"Body": "b.", "Question": "q", "Type": "sum"},
        "HuggingFaceH4/mt_bench_prompts": {"prompt": ["q", "r"], "category": "c", "prompt_id": 81},
    }

    class Datasets:
        @staticmethod
        def load_dataset(path, *name, split):
            return [rows[path]]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    found = [read_benchmark(name)[0] for name in HUB_BENCHMARKS]
    assert [question.turns for question in found] == [("q",), ("q",), ("b. q",), ("q", "r")]
    assert found[3] == Question("mt_bench", "81", ("q", "r"), "c")
