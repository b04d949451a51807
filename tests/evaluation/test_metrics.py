from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from taps_hf import CycleTrace, DraftTrace, EmittedToken
from taps_hf.evaluation import metrics
from taps_hf.evaluation.measurements import Cycles, Measurements
from taps_hf.evaluation.records import Record

ROOT = Path(__file__).parents[2]


def key(benchmark="a", question=1, turn=0) -> str:
    """Of an answer; each has a text of its own."""
    tokens = torch.tensor([question, turn])
    nothing = torch.zeros(0)
    found = Record(benchmark, str(question), "", turn, 0.0, tokens, 1, 2, nothing, nothing)
    return found.key


FIRST = key()


def cycles(accepted, tokens=None, record=FIRST, variant="v", **more) -> Cycles:
    """An answer whose last cycle ended with a token of the target's, unless `tokens` says other."""
    nothing = [None] * len(accepted)
    columns = {
        "nodes": [8] * len(accepted),
        "chosen": [[0]] * len(accepted),
        "accepted_entropy": [[1.0] * n for n in accepted],
        "rejected_entropy": nothing,
        "accepted_target_entropy": [[0.5] * n for n in accepted],
        "rejected_target_entropy": nothing,
        "overlap": nothing,
        **more,
    }
    tokens = sum(accepted) + len(accepted) if tokens is None else tokens
    benchmark = record.partition("/")[0]
    return Cycles(record, variant, variant, benchmark, "", 0.0, tokens, list(accepted), **columns)


ROWS = [cycles([2, 0, 1]), cycles([3], 3, record=key("a", 2)), cycles([0, 0], record=key("b", 1))]


def test_means_by_hand():
    assert metrics.accepted_length(ROWS) == 6 / 6
    assert metrics.tau(ROWS) == (6 + 3 + 2) / 6
    assert metrics.macro_accepted_length(ROWS) == pytest.approx((1 + 3 + 0) / 3)
    assert metrics.macro_tau(ROWS) == pytest.approx((2 + 3 + 1) / 3)
    assert metrics.tau_by_last_index(ROWS) == pytest.approx((6 / 2 + 2 / 1) / 2)
    assert metrics.nodes(ROWS) == 8


def test_the_last_cycle_emits_what_is_left():
    assert ROWS[0].emitted == [3, 1, 2]
    assert ROWS[1].emitted == [3]


def test_acceptance_by_depth_is_that_of_a_trace():
    rng = random.Random(0)
    rows, trace = [], DraftTrace(("d",))
    for _ in range(20):
        accepted = [rng.randrange(4) for _ in range(rng.randrange(1, 6))]
        end = rng.random() < 0.5 and accepted[-1] > 0
        row = cycles(accepted, sum(accepted) + len(accepted) - end)
        rows.append(row)
        for length, emitted in zip(row.accepted, row.emitted):
            tokens = tuple(EmittedToken(1, d, (0,), (), ()) for d in range(emitted))
            trace.cycles.append(CycleTrace((0,), 8, tuple(range(length)), tokens, 0, 0, 0))
    assert metrics.acceptance_by_depth(rows) == trace.acceptance_by_depth
    reached = {d: sum(d <= n for row in rows for n in row.emitted) for d in range(1, 6)}
    frequent = metrics.acceptance_by_depth(rows, least=20)
    assert set(frequent) == {d for d in trace.acceptance_by_depth if reached[d] >= 20}
    assert metrics.tau(rows) == trace.tau
    assert metrics.accepted_length(rows) == trace.accepted_length


def test_routing_and_entropies():
    row = cycles([1, 0, 0], chosen=[[0], [1], []], rejected_entropy=[3.0, None, 5.0])
    assert metrics.routing([row], ("x", "y", "z")) == {"x": 0.5, "y": 0.5, "z": 0.0}
    found = metrics.entropies([row])
    assert found["accepted_entropy"] == 1.0
    assert found["rejected_entropy"] == 4.0
    assert metrics.overlap([cycles([0, 1], overlap=[0.5, None])]) == 0.5
    live = cycles([1], seconds=2.0, plain_seconds=3.0)
    assert metrics.speedup([live, live]) == 1.5


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Questions have a level of their own; turns of one question share it."""
    rng = random.Random(1)
    covered = 0
    for _ in range(60):
        rows = []
        for question in range(40):
            level = rng.choice([0, 1, 2, 3])
            for turn in range(2):
                accepted = [level] * 10
                rows.append(cycles(accepted, record=key("a", question, turn)))
        found = metrics.bootstrap(metrics.accepted_length, rows, resamples=200)
        assert found.value == metrics.accepted_length(rows)
        covered += found.low <= 1.5 <= found.high
    assert 50 <= covered <= 60


def test_turns_of_a_question_are_drawn_together():
    """The interval is as wide as that of the questions' first turns alone, not of twice as many."""
    rng = random.Random(4)
    levels = [rng.randrange(8) for _ in range(40)]
    both = [cycles([n] * 5, record=key("a", q, t)) for q, n in enumerate(levels) for t in range(2)]
    first = both[::2]
    expected = metrics.bootstrap(metrics.tau, first)
    found = metrics.bootstrap(metrics.tau, both)
    assert (found.value, found.low, found.high) == (expected.value, expected.low, expected.high)


def test_differences_are_paired():
    """A variant that is a token better everywhere, on questions that differ by more than that."""
    rng = random.Random(2)
    better, worse = [], []
    for question in range(30):
        for turn in range(2):
            accepted = [rng.randrange(12)] * 10
            record = key("a", question, turn)
            worse.append(cycles(accepted, record=record))
            better.append(cycles([n + 1 for n in accepted], record=record))
    rng.shuffle(better)
    found = metrics.difference(metrics.tau, better, worse)
    assert [found.value, found.low, found.high] == pytest.approx([1.0] * 3)
    apart = [metrics.bootstrap(metrics.tau, rows) for rows in (worse, better)]
    assert apart[0].high > apart[1].low
    back = metrics.difference(metrics.tau, worse, better)
    assert str(back) == "-1.00 (-1.00 to -1.00)"
    with pytest.raises(ValueError, match="1 questions were answered by one of the variants only"):
        metrics.difference(metrics.tau, better, [row for row in worse if "a/7/" not in row.record])


def test_shares_are_paired():
    """A variant that needs twice as many passes on every question: half, without any doubt."""
    rng = random.Random(3)
    whole, half = [], []
    for question in range(30):
        accepted = [2 * rng.randrange(6) + 1] * 10
        record = key("a", question)
        whole.append(cycles(accepted, record=record))
        half.append(cycles([(n + 1) // 2 - 1 for n in accepted for _ in range(2)], record=record))
    found = metrics.share(metrics.tau, half, whole)
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="1 questions were answered by one of the variants only"):
        metrics.share(metrics.tau, half[1:], whole)


def test_measurements_survive_a_torn_line(tmp_path):
    file = tmp_path / "m.jsonl"
    kept = Measurements(file)
    kept.add(ROWS[:2])
    with file.open("a") as torn:
        torn.write('{"record": "a/3')
    again = Measurements(file)
    assert again.rows == ROWS[:2]
    assert again.get(key(), "v", "v") == ROWS[0]
    assert again.get(key(), "w", "v") is None  # the same weights under another name
    assert again.get(key("b", 1), "v", "v") is None
    again.add(ROWS)  # what is known is not taken twice
    assert Measurements(file).rows == ROWS


def test_the_metric_module_agrees(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(str(ROOT / "metrics" / "acceptance"), cache_dir=str(tmp_path))
    arguments = {
        "predictions": [row.accepted for row in ROWS],
        "references": [row.tokens for row in ROWS],
    }
    found = metric.compute(**arguments)
    for name, value in found.items():
        assert value == pytest.approx(getattr(metrics, name)(ROWS))
    assert metric.compute(predictions=[[3]], references=[3])["tau_by_last_index"] is None
    for predictions, references in [([[1]], [5]), ([[]], [0])]:
        with pytest.raises(ValueError, match="expected"):
            metric.compute(predictions=predictions, references=references)
