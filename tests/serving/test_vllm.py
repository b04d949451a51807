"""vLLM with our plugin: plain vLLM's texts, our own acceptance, and both drafters at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedModel

from taps_hf import EagleDrafter
from taps_hf.embedded import EMBEDDED_DRAFTERS
from taps_hf.exchange import export_composed
from taps_hf.formats.composition import Drafting, Routing

from ..test_real import CARDS, QUESTIONS
from .served import (
    LENGTH,
    SMALL_VOCAB,
    ByTrust,
    ChainLookup,
    assert_as_ours,
    chain,
    compose_small,
    drafted_by,
    encoded,
    needs_vllm,
    save_small_target,
    serve,
    whole,
)

pytestmark = needs_vllm
SCORED = 4096
ROUTINGS = get_args(Routing)
SHORT, FEW = 48, 4
STOP = 0.2
ANSWERS = 2000
MIXED = [
    *QUESTIONS.values(),
    "Tom has 3 boxes with 15 pens each. He gives away 9 pens. How many pens does he have left?",
    "What is a good way to begin learning the guitar?",
    "A train travels 60 miles an hour for 3 hours, then 40 miles an hour for 2. How far is that?",
    "Write a short letter to a friend who has moved away.",
    "Anna reads 24 pages a day. How many days does she need for a book of 360 pages?",
    "Describe a walk along the sea in the rain.",
    "A shirt costs 40 dollars and is reduced by a quarter. What does it cost now?",
    "Which hobbies are cheap, and why?",
    "There are 8 teams and each plays each other once. How many games are there?",
    "Explain to a child why the sky is blue.",
    "If 5 apples cost 3 dollars, what do 20 apples cost?",
    "Give me three names for a small bakery.",
    "Paul is 4 years older than Mary, and together they are 30. How old is Paul?",
    "How do I politely refuse an invitation?",
    "A tank holds 120 litres and loses 8 litres an hour. When is it empty?",
    "Tell me a story about a fox and a clock.",
    "Half of a class of 28 play football, a quarter tennis. How many play neither?",
    "What should I look at first in a museum?",
]


@pytest.fixture(scope="module")
def prompts(real_folder) -> list[list[int]]:
    return encoded(real_folder, MIXED)


@pytest.fixture(scope="module")
def drafters() -> dict[str, EagleDrafter]:
    """As they are in the zoo, with biases; they score tokens of their own, not equally many."""
    found = {}
    for name, scored in (("math", SCORED), ("chat", SCORED // 2)):
        drafter = EagleDrafter.from_pretrained(
            CARDS / EMBEDDED_DRAFTERS[name], dtype=torch.float32
        ).eval()
        drafter.score_only(scored)
        found[name] = drafter
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, real_at_folder, prompts, drafters) -> dict[str, dict[str, Any]]:
    """All that one process of vLLM answers; starting it takes longer than answering."""
    folder = tmp_path_factory.mktemp("served")
    composed = {"math": ["math"], **{routing: ["math", "chat"] for routing in ROUTINGS}}
    for out, names in composed.items():
        routing = out if out in ROUTINGS else "token"
        chosen = {name: drafters[name] for name in names}
        export_composed(chosen, folder / out, real_at_folder, whole(routing))
    for out, lookup in (("stop", False), ("lookup", True)):
        drafting = Drafting("draft", STOP, lookup)
        export_composed(drafters, folder / out, real_at_folder, drafting)
    few = {"prompts": prompts[:FEW], "model": real_at_folder.config.name_or_path}
    every = {**few, "prompts": prompts, "together": True, "new_tokens": SHORT}
    both = drafted_by(folder / "token", "eagle")
    by_load = {"num_speculative_tokens_per_batch_size": [[1, 1, LENGTH], [2, 64, 0]]}
    off = drafted_by(folder / "lookup", "eagle") | by_load
    jobs = {
        "plain, few": {**few, "speculative": None},
        "math, few": {**few, "speculative": drafted_by(folder / "math", "eagle")},
        "plain": {**every, "speculative": None},
        "token": {**every, "speculative": both},
        "draft": {**every, "speculative": drafted_by(folder / "draft", "eagle")},
        "draft, few": {**few, "speculative": drafted_by(folder / "draft", "eagle")},
        "stop": {**every, "speculative": drafted_by(folder / "stop", "eagle")},
        "stop, few": {**few, "speculative": drafted_by(folder / "stop", "eagle")},
        "lookup": {**every, "speculative": drafted_by(folder / "lookup", "eagle")},
        "lookup, few": {**few, "speculative": drafted_by(folder / "lookup", "eagle")},
        "request": {**every, "speculative": drafted_by(folder / "request", "eagle")},
        "off": {**every, "speculative": off},
        "sampled": {
            **every,
            "prompts": prompts[:FEW],
            "temperature": 0.7,
            "speculative": both,
        },
        "other target": {
            **few,
            "model": str(_narrow(folder / "narrow", real_at_folder)),
            "speculative": both,
        },
    }
    return dict(zip(jobs, serve(folder, list(jobs.values()))))


def _narrow(folder: Path, target: PreTrainedModel) -> Path:
    """A target of half the width."""
    config = target.config.__class__.from_dict(
        {
            **target.config.to_dict(),
            "hidden_size": target.config.hidden_size // 2,
            "num_hidden_layers": 1,
        }
    )
    type(target)._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_one_drafter_accepts_what_our_chain_does(results, real_at_folder, prompts, drafters):
    ours = chain(real_at_folder, drafters["math"], prompts[:FEW])
    served, plain = (results[name]["answers"] for name in ("math, few", "plain, few"))
    assert sum(answer["accepted"] for answer in served) > 100
    assert_as_ours(served, plain, ours, "math")


@pytest.mark.parametrize("name", [*ROUTINGS, "stop", "lookup", "off"])
def test_texts_are_plain_ones_in_a_batch(results, name):
    plain, served = (
        [answer["tokens"] for answer in results[each]["answers"]] for each in ("plain", name)
    )
    assert len(served) == len(MIXED)
    assert served == plain


@pytest.mark.parametrize("name", [*ROUTINGS, "stop", "lookup", "sampled"])
def test_both_drafters_take_part_and_are_counted(results, name):
    found = results[name]["by_drafter"]
    print(name, found, results[name]["counted"])
    for kind in ("drafted", "accepted"):
        drafters = ["math", "chat"] + ["lookup"] * (name == "lookup")
        of_each = [found[f"{drafter} {kind}"] for drafter in drafters]
        assert min(of_each) > 0
        assert sum(of_each) == results[name]["counted"][kind]


def test_who_drafts_alone_is_the_right_one(results):
    """One request at a time, so that all but the first token of a draft is one drafter's work."""
    plain, served = (results[f"{name}, few"]["answers"] for name in ("plain", "draft"))
    assert [answer["tokens"] for answer in served] == [answer["tokens"] for answer in plain]
    needed = {name: results[f"{name}, few"]["counted"]["drafts"] for name in ("draft", "math")}
    assert needed["draft"] < needed["math"]


@pytest.mark.parametrize(
    ("name", "stop_below", "more"),
    [("draft", 0.0, []), ("stop", STOP, []), ("lookup", STOP, [ChainLookup()])],
)
def test_routing_per_draft_follows_the_rule(
    results, real_at_folder, prompts, drafters, name, stop_below, more
):
    """In our own decoding: who was right in a request, where drafts end, what is looked up."""
    rule = ByTrust(stop_below)
    ours = chain(real_at_folder, [*drafters.values(), *more], prompts[:FEW], strategy=rule)
    served, plain = (results[f"{each}, few"]["answers"] for each in (name, "plain"))
    assert_as_ours(served, plain, ours, name)
    if not stop_below:
        assert all(answer["drafted"] == LENGTH * answer["drafts"] for answer in served)


def test_drafts_end_where_little_would_be_right(results):
    """Few of the tokens that are not drafted then would have been accepted."""
    long, stopped = (results[f"{name}, few"]["counted"] for name in ("draft", "stop"))
    assert long["drafted"] == LENGTH * long["drafts"]
    saved = long["drafted"] - stopped["drafted"]
    lost = long["accepted"] - stopped["accepted"]
    assert saved > long["drafted"] / 5
    assert lost < saved / 4


def test_sampled_drafts_are_accepted(results):
    """On a CPU vLLM by itself accepts nothing then: see `taps_hf.serving.sampling`."""
    counted = results["sampled"]["counted"]
    assert counted["accepted"] > counted["drafts"] / 4


def test_sampled_texts_have_the_distribution_of_the_target(tmp_path):
    """Thousands of answers of three tokens, among sixteen; the second and third may be drafted."""
    target = save_small_target(tmp_path / "small")
    for routing in ("token", "draft"):
        compose_small(tmp_path / routing, target, whole(routing))
    compose_small(tmp_path / "stop", target, Drafting("draft", 0.9, lookup=False))
    compose_small(tmp_path / "lookup", target, Drafting("draft", 0, lookup=True))
    once = [3, 1, 4, 1, 5, 9, 2, 6]
    job = {
        "model": str(tmp_path / "small"),
        "together": True,
        "new_tokens": 3,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    ways = (
        ("token", "greedy", once),
        ("token", "probabilistic", once),
        ("draft", "probabilistic", once),
        ("stop", "probabilistic", once),
        ("lookup", "greedy", once * 4),
    )
    jobs = [
        {
            **job,
            "speculative": drafted_by(tmp_path / folder, "eagle") | {"draft_sample_method": method},
            "prompts": [prompt] * ANSWERS,
        }
        for folder, method, prompt in ways
    ]
    results = serve(tmp_path, jobs)
    long, stopped = (found["counted"] for found in results[2:4])
    assert long["drafted"] / long["drafts"] > stopped["drafted"] / stopped["drafts"] + 0.2
    print(results[4]["by_drafter"])
    assert results[4]["by_drafter"]["lookup drafted"] > ANSWERS / 4
    assert results[4]["by_drafter"]["lookup accepted"] > 0
    for found, (*_, prompt) in zip(results, ways, strict=True):
        expected = probabilities(target, prompt)
        accepted, drafted = (found["counted"][kind] for kind in ("accepted", "drafted"))
        assert 0.01 * drafted < accepted < 0.9 * drafted  # both ways to a token are taken
        tokens = torch.tensor([answer["tokens"] for answer in found["answers"]])
        for place, wanted in enumerate(expected):
            counts = tokens[:, place].bincount(minlength=SMALL_VOCAB)
            surprise = ((counts - ANSWERS * wanted) ** 2 / (ANSWERS * wanted)).sum()
            assert surprise < 45, place  # of 15 degrees of freedom: once in 10,000 times


def probabilities(target: PreTrainedModel, prompt: list[int]) -> list[torch.Tensor]:
    """Of the first, second and third token of an answer: sums over what may come before."""
    with torch.no_grad():
        every = torch.cartesian_prod(*[torch.arange(SMALL_VOCAB)] * 2)
        texts = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], dim=1)
        each = target(texts).logits[:, -3:].softmax(dim=-1).double()
    first = each[0, 0]
    second = each[::SMALL_VOCAB, 1]  # by the first token
    both = first[:, None] * second
    return [first, both.sum(dim=0), (both.flatten()[:, None] * each[:, 2]).sum(dim=0)]


def test_two_drafters_accept_more_than_one(results):
    """More than half of the drafts' first tokens are right only where the right one drafts."""
    counted = results["token"]["counted"]
    assert counted["accepted"] > counted["drafts"]


def test_drafting_follows_the_load(results):
    """With twenty requests nothing is drafted; with the last of them alone, again."""
    assert results["off"]["counted"]["drafts"] < results["token"]["counted"]["drafts"] / 4


def test_another_target_is_refused(results):
    assert (
        "The target's `hidden_size` is 288, but the drafters' is 576"
        in (results["other target"]["refused"])
    )
