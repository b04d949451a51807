"""Drafting that stops under load and begins again: drafters know then what they have not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from taps_hf import EagleDrafter
from taps_hf.embedded import EMBEDDED_DRAFTERS
from taps_hf.exchange import export_composed

from ..test_real import CARDS, QUESTIONS, encode
from .served import LENGTH, drafted_by, needs_vllm, serve, whole

pytestmark = needs_vllm
RESTED, AFTER, BLOCK = 40, 56, 32
PASSAGE = (
    "Three friends walk along a river. The first one carries a basket with twelve apples, the "
    "second one a map of the hills, and the third one an old lamp that nobody has lit for years. "
    "At noon they sit down below an oak, share four of the apples and look at the map for a long "
    "time, since the path that they came by is not on it. "
)


@pytest.fixture(scope="module")
def prompts(real_folder) -> list[list[int]]:
    """Of the second there are blocks to cache."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    long = PASSAGE + QUESTIONS["math"]
    each = [encode(tokenizer, text)["input_ids"][0].tolist() for text in (QUESTIONS["chat"], long)]
    assert len(each[1]) > 3 * BLOCK
    return each


@pytest.fixture(scope="module")
def results(tmp_path_factory, real_at_folder, prompts) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("load")
    drafters = {
        name: EagleDrafter.from_pretrained(CARDS / EMBEDDED_DRAFTERS[name], dtype=torch.float32)
        for name in ("math", "chat")
    }
    export_composed(drafters, folder / "composed", real_at_folder, whole("token"))
    always = drafted_by(folder / "composed", "eagle")
    alone = always | {"num_speculative_tokens_per_batch_size": [[1, 1, LENGTH], [2, 64, 0]]}
    short, long = prompts
    further = long + _answer(real_at_folder, long, RESTED)
    job = {"model": real_at_folder.config.name_or_path, "speculative": always}
    jobs = {
        "plain": {**job, "speculative": None, "prompts": [further, long], "new_tokens": AFTER},
        "awake": {**job, "prompts": [further, long], "new_tokens": AFTER},
        "rested": {
            **job,
            "speculative": alone,
            "prompts": [short, long],
            "together": True,
            "new_tokens": [RESTED, RESTED + AFTER],
        },
        "cached": {
            **job,
            "speculative": alone,
            "prompts": [short, long, long],
            "together": [2, 1],
            "cached": BLOCK,
            "new_tokens": [4, 4, AFTER],
        },
    }
    return dict(zip(jobs, serve(folder, list(jobs.values()))))


def _answer(target: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    out = target.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
    return out[0, len(prompt) :].tolist()


def _assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Exactly: a draft or a token less is what is lost where something has not been read."""
    print(*({**each, "tokens": len(each["tokens"])} for each in (found, alone)))
    assert alone["accepted"] > AFTER / 3
    assert found == alone


def test_after_the_load_drafts_are_those_of_drafters_that_read_everything(results):
    """A prompt and much of its answer go by while another is answered, too."""
    answer = results["rested"]["answers"][1]["tokens"][RESTED:]
    awake, plain = (results[name]["answers"][0] for name in ("awake", "plain"))
    assert answer == plain["tokens"]
    _assert_same({"tokens": answer, **results["rested"]["counted"]}, awake)


def test_prompts_that_others_get_from_the_cache_are_read_under_load(results):
    awake, plain = (results[name]["answers"][1] for name in ("awake", "plain"))
    cached = results["cached"]["answers"][2]
    assert cached["tokens"] == plain["tokens"]
    _assert_same(cached, awake)
