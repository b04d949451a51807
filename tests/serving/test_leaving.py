"""Clients that go away, prompts that are too long, answers that are cut at vLLM's own length."""

from __future__ import annotations

from typing import Any

import pytest

from taps_hf.formats.composition import Drafting

from .served import compose_small, drafted_by, needs_vllm, save_small_target, serve

pytestmark = needs_vllm
LONGEST = 96
ROUTINGS = ["token", "request", "draft"]  # the last with lookups
SERVED = [*ROUTINGS, "unpadded", "one"]
# Two leave in the middle, the last one's prompt has no place; the first one runs against the end.
PROMPTS = [
    [3, 1, 4, 1, 5, 9] * 10,
    [2, 7, 1, 8],
    [1, 1, 2, 3, 5, 8],
    [6, 2, 8],
    [4] * LONGEST,
    [1, 4, 1, 4],
]
LEAVES = [None, 9, None, 14, None, None]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("leaving")
    target = save_small_target(folder / "small")
    job = {
        "model": str(folder / "small"),
        "prompts": PROMPTS,
        "leaves": LEAVES,
        "together": True,
        "new_tokens": 48,
        "ignore_eos": True,
        "max_model_len": LONGEST,
    }
    ways = {"plain": None}
    for routing in ROUTINGS:
        compose_small(folder / routing, target, Drafting(routing))
        ways[routing] = drafted_by(folder / routing, "eagle")
    ways["unpadded"] = {**ways["draft"], "disable_padded_drafter_batch": True}
    ways["one"] = {**ways["draft"], "num_speculative_tokens": 1}
    ways["short"] = {**ways["token"], "max_model_len": LONGEST // 2}
    return dict(zip(ways, serve(folder, [{**job, "speculative": way} for way in ways.values()])))


@pytest.mark.parametrize("routing", SERVED)
def test_others_are_served_as_if_nobody_had_left(results, routing):
    plain, served = (results[name]["answers"] for name in ("plain", routing))
    for alone, answer, leaving in zip(plain, served, LEAVES, strict=True):
        if leaving is None:
            assert answer == alone
        else:  # an accepted draft may have gone beyond
            assert (answer["ended"], alone["ended"]) == (None, None)
            assert answer["tokens"][:leaving] == alone["tokens"][:leaving]
            assert leaving <= len(answer["tokens"]) < 48
    assert len(served[0]["tokens"]) == LONGEST - len(PROMPTS[0])
    assert {answer.get("ended") for answer in served[1:3]} == {None, "length"}


@pytest.mark.parametrize("routing", SERVED)
def test_counts_are_still_vllms_own(results, routing):
    """Of drafts that nobody waited for, and of those that the longest answer has no place for."""
    found, counted = results[routing]["by_drafter"], results[routing]["counted"]
    assert counted["accepted"] > 0
    for kind in ("drafted", "accepted"):
        ours = [count for name, count in found.items() if name.endswith(kind)]
        assert sum(ours) == counted[kind]


def test_nothing_is_kept_of_requests_that_have_ended(results):
    assert all(results[name]["kept"] == [] for name in SERVED)


def test_a_prompt_that_is_too_long_is_refused_as_by_plain_vllm(results):
    said = {name: results[name]["answers"][4]["refused"] for name in ("plain", *SERVED)}
    assert len(set(said.values())) == 1
    assert str(LONGEST) in said["plain"]


def test_drafters_that_are_to_stop_earlier_are_refused(results):
    assert (
        f"`max_model_len` of the speculative configuration is {LONGEST // 2}, expected none"
        in results["short"]["refused"]
    )
