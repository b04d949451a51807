from __future__ import annotations

import pytest

pytest.importorskip("altair")

from taps_hf import DynamicTree
from taps_hf.demo.charts import (
    CHARTS,
    accepted_length_chart,
    confidence_chart,
    depth_chart,
    routing_chart,
)
from taps_hf.demo.settings import Variant

from .written import write


@pytest.fixture
def answer(request_of):
    return write(request_of(max_new_tokens=60, tree=DynamicTree(5, 8, 40)))


def rows(chart) -> list[dict]:
    """The data of a chart; `to_dict` checks the chart against Vega-Lite's schema."""
    (values,) = chart.to_dict()["datasets"].values()
    return values


def test_accepted_length_over_the_answer(answer):
    found = rows(accepted_length_chart(answer))
    lengths = [cycle.accepted_length for cycle in answer.trace.cycles]
    assert [row["accepted"] for row in found] == lengths
    assert found[-1]["mean"] == pytest.approx(answer.trace.accepted_length)


def test_acceptance_by_depth(answer):
    found = {row["depth"]: row["share"] for row in rows(depth_chart(answer))}
    assert found == answer.trace.acceptance_by_depth


def test_confidences_of_judged_nodes(answer):
    found = rows(confidence_chart(answer))
    verdicts = [v for c in answer.trace.cycles if c.drafters for v in c.verdicts[1:]]
    for status in ("accepted", "rejected"):
        assert sum(row["nodes"] for row in found if row["status"] == status) == (
            verdicts.count(status)
        )
        shares = [row["share"] for row in found if row["status"] == status]
        assert sum(shares) == pytest.approx(1.0)


def test_routing_along_the_answer(request_of):
    answer = write(
        request_of(max_new_tokens=60), Variant("confidence", ("math", "chat"), "confidence")
    )
    found = rows(routing_chart(answer))
    chosen = [
        (number, answer.trace.drafters[drafter])
        for number, cycle in enumerate(answer.trace.cycles, start=1)
        for drafter in cycle.drafters
    ]
    assert [(row["cycle"], row["drafter"]) for row in found] == chosen
    assert len({name for _, name in chosen}) == 2
    accepted = sum(cycle.accepted_length for cycle in answer.trace.cycles)
    assert sum(row["accepted"] for row in found) == accepted


def test_charts_of_the_shortest_answer(request_of):
    """One token, nothing drafted."""
    answer = write(request_of(max_new_tokens=1))
    for chart in CHARTS:
        assert rows(chart(answer)) is not None
