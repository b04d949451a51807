"""vLLM with composed EAGLE-3 drafters: texts, acceptance, and both drafters at work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from taps_hf import Eagle3Drafter
from taps_hf.exchange import export_composed

from .served import LENGTH, chain, drafted_by, needs_vllm, save_small_target, serve, whole

pytestmark = needs_vllm
NEW_TOKENS, STEPS = 64, 40
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 2, 3, 5, 8], [6, 2, 8, 3, 1, 8]]
# In pairs that can run as one; layers and draft vocabularies of each are its own.
SETTINGS: dict[str, dict[str, Any]] = {
    "original": {},
    "normed": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "qwen3": {"family": "qwen3", "fc_norm": True},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_small_target(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def drafters(target) -> dict[str, dict[str, Eagle3Drafter]]:
    """The first of each pair knows the answers to the first prompts, the second to the others."""
    texts = target.generate(torch.tensor(PROMPTS), max_new_tokens=NEW_TOKENS, do_sample=False)
    found: dict[str, dict[str, Eagle3Drafter]] = {}
    with torch.random.fork_rng():
        for name, settings in SETTINGS.items():
            found[name] = {}
            for seed, (drafter, layer_ids) in enumerate((("a", [2, 4, 5]), ("b", [8, 1, 4]))):
                torch.manual_seed(seed)
                tokens = torch.randperm(16)[: 14 - seed]
                one = Eagle3Drafter.from_target(target, tokens, layer_ids=layer_ids, **settings)
                for part, weight in one.named_parameters():
                    if "norm" in part:  # new ones are all alike: none would be missed
                        weight.data.uniform_(0.5, 1.5)
                _teach(one, target, texts[2 * seed : 2 * seed + 2])
                found[name][drafter] = one.eval()
    return found


def _teach(drafter: Eagle3Drafter, target: PreTrainedModel, texts: torch.Tensor) -> None:
    """Until it knows some texts nearly by heart; from the target's features only."""
    with torch.no_grad():
        states = target(texts, output_hidden_states=True).hidden_states
        features = torch.cat([states[i][:, :-2] for i in drafter.config.layer_ids], dim=-1)
        embeds = target.get_input_embeddings()(texts[:, 1:-1])
    ids = drafter.draft_token_ids
    known = torch.isin(texts[:, 2:], ids)
    wanted = torch.searchsorted(ids, texts[:, 2:][known])
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(STEPS):
        hidden = drafter(embeds, drafter.fuse(features)).last_hidden_state
        loss = F.cross_entropy(drafter.scores(hidden)[known], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def results(tmp_path_factory, target, drafters) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("served3")
    few = {"model": target.config.name_or_path, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    few["ignore_eos"] = True
    batch = {**few, "together": True}
    jobs = {"plain, few": {**few, "speculative": None}, "plain": {**batch, "speculative": None}}
    for name, pair in drafters.items():
        export_composed(pair, folder / name, target, whole("token"))
        jobs[name] = {**batch, "speculative": drafted_by(folder / name, "eagle3")}
        export_composed({"b": pair["b"]}, folder / f"{name}, one", target, whole("token"))
        one = drafted_by(folder / f"{name}, one", "eagle3")
        jobs[f"{name}, one"] = {**few, "speculative": one}
    export_composed(drafters["original"], folder / "request", target, whole("request"))
    jobs["request"] = {**batch, "speculative": drafted_by(folder / "request", "eagle3")}
    export_composed(drafters["original"], folder / "draft", target, whole("draft"))
    jobs["draft"] = {**few, "speculative": drafted_by(folder / "draft", "eagle3")}
    probable = {**jobs["original"]["speculative"], "draft_sample_method": "probabilistic"}
    jobs["sampled"] = {**batch, "temperature": 0.7, "speculative": probable}
    jobs["eagle"] = {**batch, "speculative": drafted_by(folder / "original", "eagle")}
    return dict(zip(jobs, serve(folder, list(jobs.values()))))


@pytest.mark.parametrize("name", SETTINGS)
def test_one_drafter_accepts_what_our_chain_does(results, target, drafters, name):
    """So it reads the layers that it was made for, in its own order, and nothing else."""
    ours = chain(target, drafters[name]["b"], PROMPTS, NEW_TOKENS)
    served, plain = (results[each]["answers"] for each in (f"{name}, one", "plain, few"))
    assert sum(answer["accepted"] for answer in served) > 50
    for there, alone, here in zip(served, plain, ours, strict=True):
        assert there["tokens"] == alone["tokens"] == here["tokens"]
        assert abs(there["drafts"] - here["drafts"]) <= 2
        assert abs(there["accepted"] - here["accepted"]) <= LENGTH + 1


@pytest.mark.parametrize("name", [*SETTINGS, "request"])
def test_texts_are_plain_ones_in_a_batch(results, name):
    plain, served = (
        [answer["tokens"] for answer in results[each]["answers"]] for each in ("plain", name)
    )
    assert served == plain


def test_who_drafts_alone_knows_the_text(results):
    """One request at a time: what is fed back and what is scored are one drafter's, and differ."""
    plain, served = (results[each]["answers"] for each in ("plain, few", "draft"))
    assert [answer["tokens"] for answer in served] == [answer["tokens"] for answer in plain]
    needed = {name: results[name]["counted"]["drafts"] for name in ("draft", "original, one")}
    assert needed["draft"] < needed["original, one"]  # who knows half of the texts


@pytest.mark.parametrize("name", [*SETTINGS, "request", "draft", "sampled"])
def test_both_drafters_take_part_and_are_counted(results, name):
    found = results[name]["by_drafter"]
    print(name, found, results[name]["counted"])
    assert min(found.values()) > 0
    for kind in ("drafted", "accepted"):
        assert sum(found[f"{drafter} {kind}"] for drafter in "ab") == results[name]["counted"][kind]


def test_another_method_is_refused(results):
    assert (
        "`method` of the speculative configuration is 'eagle', expected 'eagle3'"
        in results["eagle"]["refused"]
    )
