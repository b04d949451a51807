from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from taps_hf import ChainTree, EagleDrafter, TreeShape
from taps_hf.drafters.base import DraftRequest
from taps_hf.drafters.configuration_eagle import BACKBONES
from taps_hf.target import LAST
from taps_hf.training import steps as steps_module
from taps_hf.training.features import features_of
from taps_hf.training.objectives import (
    Eagle,
    FrozenTarget,
    Hass,
    ObjectiveOptions,
    base,
    get_objective,
    list_objectives,
    register_objective,
)
from taps_hf.training.options import TrainOptions
from taps_hf.training.steps import IGNORED, accepted_chains, harmonised_steps, scored_slots
from taps_hf.training.trainer import measures_of

from ...tiny import FAMILIES, prompt, tiny_drafters, tiny_target


def slots_of(target, ids):
    """What a drafter reads at every slot: embeddings and features."""
    features = features_of(target, ids[:, :-1])
    return target.get_input_embeddings()(ids[:, 1:-1]), features[:, :-1]


class Forced(TreeShape):
    """A chain of given tokens (1, n), whose predicted features are noted."""

    follows_tokens = False

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def grow(self, drafting, hidden, max_depth, go_on=None):
        self.hidden = [hidden]
        for level in range(1, max_depth):
            visible = torch.ones(1, 1, level, dtype=torch.bool)
            token = self.tokens[:, level - 1 : level]
            self.hidden.append(drafting.step(token, self.hidden[-1], visible, level))
        return ChainTree(1).grow(drafting, hidden, 1)


@torch.no_grad()
def drafted(target, drafter, ids, root: int, depth: int) -> list[torch.Tensor]:
    """Predictions along a chain of true tokens from a root slot, by the code that drafts."""
    shape = Forced(ids[:, root + 2 : root + depth + 1])
    session = drafter.start([drafter], target)
    features = features_of(target, ids)[0]
    session.observe(ids[0, 1 : root + 2], {LAST: features[: root + 1]})
    session.propose((0,), DraftRequest(ids[0, root + 1 : root + 2], shape, depth))
    return [x[0, 0] for x in shape.hidden]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "sdpa with masks", "eager"])
@torch.no_grad()
def test_step_j_computes_what_drafting_j_deep_computes(family, attention, monkeypatch):
    target = tiny_target(family)
    drafter = tiny_drafters(1, family)[0]
    if attention == "eager":
        config = type(drafter.config)(**drafter.config.to_dict())
        eager = EagleDrafter._from_config(config, attn_implementation="eager")
        eager.load_state_dict(drafter.state_dict())
        drafter = eager.eval()
    if attention == "sdpa with masks":  # as GPUs do it
        monkeypatch.setattr(steps_module, "can_attend_along_chains", lambda *_: False)
    depth = 4
    batch = torch.cat([prompt(14, seed=1), prompt(14, seed=2)])
    steps = list(harmonised_steps(drafter, *slots_of(target, batch), depth))
    compared = 0
    for row, ids in enumerate(batch):
        for root in range(0, 12 - depth):
            chain = drafted(target, drafter, ids[None], root, depth)
            for j, hidden in enumerate(chain):
                torch.testing.assert_close(steps[j][row, root + j], hidden, rtol=1e-3, atol=2e-4)
                compared += 1
    assert compared == 2 * 8 * depth
    # Had step 3 read true features throughout, it would have been step 1.
    assert (steps[2] - steps[0]).abs().max() > 1e-2


def test_chains_stay_within_one_answer():
    # Slot t scores token t + 2: answers are tokens 3-5 and 8.
    labels = torch.tensor([[IGNORED] * 3 + [1] * 3 + [IGNORED] * 2 + [1]])
    first, second, third, fourth = (x.int()[0].tolist() for x in scored_slots(labels, 4))
    assert first == [0, 1, 1, 1, 0, 0, 1]
    assert second == [0, 0, 1, 1, 0, 0, 0]
    assert third == [0, 0, 0, 1, 0, 0, 0]
    assert fourth == [0] * 7


def naive_losses(target, drafter, ids, labels, steps, top_k):
    """Slot by slot, in the words of the papers."""
    features = features_of(target, ids)[0]
    head, tokens = target.get_output_embeddings().weight, drafter.draft_token_ids
    head = head if tokens is None else head[tokens]
    predictions = list(harmonised_steps(drafter, *slots_of(target, ids), steps))
    sums = {"regression": 0.0, "token": 0.0, "top_k": 0.0}
    for step, hidden in enumerate(predictions):
        for slot in range(hidden.shape[1]):
            if any(labels[0, slot + 2 - i] == IGNORED for i in range(step + 1)):
                continue
            q = F.softmax(head @ features[slot + 1], 0)
            log_p = F.log_softmax(head @ hidden[0, slot], 0)
            gap = (hidden[0, slot] - features[slot + 1]).abs()
            smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5)
            sums["regression"] += smooth.mean().item()
            sums["token"] -= (q * log_p).sum().item()
            best = q.argsort(descending=True)[:top_k]
            sums["top_k"] -= (q[best] * log_p[best]).sum().item()
    return sums


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("draft_vocab", [None, 6])
@torch.no_grad()
def test_the_loss_is_what_the_papers_say(steps, draft_vocab):
    target = tiny_target()
    drafter = tiny_drafters(1, draft_vocab=draft_vocab)[0]
    ids = prompt(12)
    labels = ids.clone()
    labels[:, :5] = labels[:, 9] = IGNORED
    options = ObjectiveOptions(steps, 1.0, 0.7, 0.2, 0.4, top_k=3, noise=0.0)
    objective = Eagle(drafter, FrozenTarget(target, drafter), options).train()
    found = objective(ids, labels)
    expected = naive_losses(target, drafter, ids, labels, steps, top_k=3)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4)
    total = 0.7 * expected["regression"] + 0.2 * expected["token"] + 0.4 * expected["top_k"]
    count = int((labels != IGNORED).sum())
    assert found["loss"].item() == pytest.approx(total / count / steps, rel=1e-4)
    halved = objective(ids, labels, num_items_in_batch=torch.tensor(2 * count))
    assert halved["loss"].item() == pytest.approx(found["loss"].item() / 2, rel=1e-5)
    objective.eval()


@torch.no_grad()
def test_padding_changes_nothing():
    target, drafter = tiny_target(), tiny_drafters(1)[0]
    options = get_objective("hass").options_with(noise=0.0)
    objective = Eagle(drafter, FrozenTarget(target, drafter), options).train()
    ids = prompt(12)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    padded = F.pad(ids, (0, 5)), F.pad(labels, (0, 5), value=IGNORED)
    expected, found = objective(ids, labels), objective(*padded)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    objective.eval()
    torch.testing.assert_close(objective(ids, labels)["counts"], objective(*padded)["counts"])


def test_only_the_drafter_is_trained_and_kept():
    target, drafter = tiny_target(), tiny_drafters(1)[0]
    frozen = FrozenTarget(target, drafter)
    objective = Eagle(drafter, frozen, get_objective("hass").options_with())
    assert set(objective.state_dict()) == {f"drafter.{name}" for name in drafter.state_dict()}
    assert len(list(objective.parameters())) == len(list(drafter.parameters()))
    ids = prompt(9)
    objective.train()(ids, ids.clone())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert all(p.grad is None for p in target.parameters())
    drafter.zero_grad(set_to_none=True)
    drafter.eval()


def test_noise_is_uniform_on_what_is_read_and_absent_in_evaluation(monkeypatch):
    target, drafter = tiny_target(), tiny_drafters(1)[0]
    read = []
    forward = EagleDrafter.forward

    def noted(self, inputs_embeds, features, **kwargs):
        read.append(features)
        return forward(self, inputs_embeds=inputs_embeds, features=features, **kwargs)

    monkeypatch.setattr(EagleDrafter, "forward", noted)
    objective = Eagle(
        drafter, FrozenTarget(target, drafter), ObjectiveOptions(noise=0.5), evaluation_depth=1
    )
    ids = prompt(60)
    with torch.no_grad():
        objective.train()(ids, ids.clone())
        objective.eval()(ids, ids.clone())
    noise = read[0] - features_of(target, ids)[:, :-2]
    assert noise.abs().max() <= 0.5
    assert noise.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    torch.testing.assert_close(read[1], features_of(target, ids)[:, :-2])


def test_replayed_chains_are_counted_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(3, 30, generator=generator) < 0.85, 1, IGNORED)
    scored = scored_slots(labels, 4)
    hits = [torch.rand(x.shape, generator=generator) < 0.7 for x in scored]
    could, were = [0] * 4, [0] * 4
    for row in range(3):
        for start in range(28):
            for j in range(4):
                if (labels[row, start + 2 : start + j + 3] == IGNORED).any() or start + j >= 28:
                    break  # the answer has no more
                could[j] += 1
                if not hits[j][row, start + j]:
                    break
                were[j] += 1
    found = accepted_chains(hits, scored)
    assert [counts.shape for counts in found] == [(3, 4), (3, 4)]
    assert [counts.sum(dim=0).tolist() for counts in found] == [could, were]


def test_what_an_answer_does_not_have_is_no_mistake():
    labels = torch.tensor([[IGNORED] * 3 + [5] * 6])
    scored = scored_slots(labels, 5)
    counts = torch.stack(accepted_chains([torch.ones_like(x) for x in scored], scored), dim=2)
    found = measures_of(EvalPrediction(counts, counts))
    # Chains from the answer's six tokens, of which four have fewer than five before them.
    assert found == {
        "top_1": 1.0,
        "deep_acceptance": 1.0,
        "accepted_length": pytest.approx((5 + 5 + 4 + 3 + 2 + 1) / 6),
        "chains": 6.0,
    }


@torch.no_grad()
def test_evaluation_counts_what_drafting_would_have_had_accepted():
    target, drafter, depth = tiny_target(), tiny_drafters(1)[0], 3
    with torch.no_grad():
        ids = target.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
    labels = ids.clone()
    labels[:, :3] = IGNORED
    objective = Eagle(
        drafter, FrozenTarget(target, drafter), ObjectiveOptions(), evaluation_depth=depth
    ).eval()
    could, were = objective(ids, labels)["counts"][0].T.tolist()
    head = target.get_output_embeddings()
    expected = [[0] * depth, [0] * depth]
    for root in range(1, ids.shape[1] - 2):
        reach = min(depth, ids.shape[1] - 2 - root)
        for j, hidden in enumerate(drafted(target, drafter, ids, root, reach)):
            expected[0][j] += 1
            if head(hidden).argmax() != ids[0, root + 2 + j]:
                break
            expected[1][j] += 1
    assert [could, were] == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "`steps` is 0"),
        ({"noise": -0.1}, "`noise` is -0.1"),
        ({"regression_weight": 0.0, "token_weight": 0.0}, "All weights"),
    ],
)
def test_bad_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**wrong)


def test_published_objectives():
    assert list_objectives() == ("eagle", "eagle3", "hass")
    assert get_objective("eagle").options_with() == ObjectiveOptions()
    hass = get_objective("hass").options_with(noise=0.3)
    assert (hass.steps, hass.top_k_weight, hass.top_k, hass.noise) == (3, 1.0, 10, 0.3)
    for name in ("eagle", "hass"):
        assert get_objective(name).backbone in BACKBONES
    with pytest.raises(ValueError, match="expected one of eagle, eagle3, hass"):
        get_objective("medusa")


def test_an_objective_is_one_class(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", {**base._REGISTRY})

    @register_objective("deeper")
    class Deeper(Hass):
        title, published = "Deeper", {"steps": 5}

    options = TrainOptions(data=["a.jsonl"], out="x", objective="deeper", noise=0.2)
    assert options.objective_options() == ObjectiveOptions(steps=5, noise=0.2)
    with pytest.raises(ValueError, match="registered already"):
        register_objective("deeper")(Deeper)
