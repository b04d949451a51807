from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from taps_hf import Eagle3Drafter
from taps_hf.drafters.base import DraftRequest
from taps_hf.target import LAST
from taps_hf.training.features import features_of
from taps_hf.training.objectives import Eagle3, FrozenTarget, ObjectiveOptions, get_objective
from taps_hf.training.objectives.eagle3 import cross_entropy
from taps_hf.training.options import TrainOptions
from taps_hf.training.steps import IGNORED, harmonised_steps

from ...tiny import FAMILIES, VOCAB, prompt, tiny_target
from .test_eagle import Forced


def drafter_for(target, draft_vocab=None, seed=0, **kwargs) -> Eagle3Drafter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = None if draft_vocab is None else torch.randperm(VOCAB)[:draft_vocab]
        drafter = Eagle3Drafter.from_target(
            target, draft_token_ids=ids, **{"layer_ids": [2, 1], **kwargs}
        )
    return drafter.float().eval()


def objective_for(target, drafter, depth=5, **changes) -> Eagle3:
    options = get_objective("eagle3").options_with(**changes)
    return Eagle3(drafter, FrozenTarget(target, drafter), options, depth)


def read_by(target, drafter, ids) -> torch.Tensor:
    """The states at every token of the layers that a drafter reads, as transformers says."""
    states = target(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in drafter.config.layer_ids], dim=-1)


def steps_of(target, drafter, ids, depth: int, cut: bool = False) -> list[torch.Tensor]:
    features = features_of(target, ids[:, :-2], layers=drafter.reads_layers)
    embeds = target.get_input_embeddings()(ids[:, 1:-1])
    return list(harmonised_steps(drafter, embeds, drafter.fuse(features), depth, cut))


@torch.no_grad()
def drafted(target, drafter, ids, root: int, depth: int) -> list[torch.Tensor]:
    """States along a chain of true tokens from a root slot, by the code that drafts."""
    shape = Forced(ids[:, root + 2 : root + depth + 1])
    session = drafter.start([drafter], target)
    states = {
        layer: features_of(target, ids, layers=[layer])[0, : root + 1]
        for layer in drafter.reads_layers
    }
    session.observe(ids[0, 1 : root + 2], states)
    session.propose((0,), DraftRequest(ids[0, root + 1 : root + 2], shape, depth))
    return [x[0, 0] for x in shape.hidden]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dialect", [{}, {"norm_output": True, "fc_norm": True}])
@torch.no_grad()
def test_step_j_computes_what_drafting_j_deep_computes(family, dialect):
    """The training-time test is a test of decoding."""
    target = tiny_target(family)
    drafter, depth = drafter_for(target, **dialect), 7
    batch = torch.cat([prompt(14, seed=1), prompt(14, seed=2)])
    steps = steps_of(target, drafter, batch, depth)
    compared = 0
    for row, ids in enumerate(batch):
        for root in range(12 - depth):
            for j, hidden in enumerate(drafted(target, drafter, ids[None], root, depth)):
                torch.testing.assert_close(steps[j][row, root + j], hidden, rtol=1e-3, atol=5e-4)
                compared += 1
    assert compared == 2 * 5 * depth
    # Had step 3 read true features throughout, it would have been step 1.
    assert (steps[2] - steps[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_reads_the_layers_that_decoding_reads(family):
    target = tiny_target(family)
    drafter = drafter_for(target)
    ids = prompt(11)
    expected = read_by(target, drafter, ids)[:, :, :32]  # 2 is the last layer's in most: see below
    found = features_of(target, ids, layers=drafter.reads_layers)
    count = target.config.num_hidden_layers
    if count > 2:  # of the last entry transformers gives the normalised states
        torch.testing.assert_close(found[:, :, :32], expected)
    torch.testing.assert_close(found[:, :, 32:], read_by(target, drafter, ids)[:, :, 32:])
    last = target.base_model.norm(found[:, :, :32]) if count == 2 else features_of(target, ids)
    torch.testing.assert_close(last, target(ids, output_hidden_states=True).hidden_states[-1])


def naive_loss(target, drafter, ids, labels, steps, decay) -> float:
    """Slot by slot, as the authors' code says it, with a mean over steps."""
    logits = target(ids).logits[0]
    tokens = drafter.draft_token_ids
    tokens = torch.arange(VOCAB) if tokens is None else tokens
    total = 0.0
    for step, hidden in enumerate(steps_of(target, drafter, ids, steps)):
        for slot in range(hidden.shape[1]):
            if any(labels[0, slot + 2 - i] == IGNORED for i in range(step + 1)):
                continue
            if logits[slot + 1].argmax() not in tokens:
                continue
            q = F.softmax(logits[slot + 1][tokens], 0)
            log_p = F.log_softmax(drafter.scores(hidden[0, slot]), 0)
            total -= decay**step * float((q * log_p).sum())
    weights = sum(decay**step for step in range(steps))
    return total / weights / int((labels != IGNORED).sum())


@pytest.mark.parametrize("draft_vocab", [None, 6])
@torch.no_grad()
def test_the_loss_is_what_the_authors_code_says(draft_vocab):
    target = tiny_target()
    drafter = drafter_for(target, draft_vocab)
    ids = prompt(16)
    labels = ids.clone()
    labels[:, :5] = labels[:, 11] = IGNORED
    objective = objective_for(target, drafter, steps=4).train()
    found = objective(ids, labels)
    expected = naive_loss(target, drafter, ids, labels, 4, 0.8)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    known = objective.losses(features_of(target, ids)[0])(torch.zeros(16, 32), torch.ones(16) > 0)
    if draft_vocab:  # some slots are not counted, or this would not test that
        top = target(ids).logits[0].argmax(1)
        assert 0 < (top[:, None] == drafter.draft_token_ids).any(1).sum() < 16
    assert known["token"] > 0
    # Features that are given, and slots that are known, change nothing.
    features = features_of(target, ids[:, :-1], layers=objective.layers)
    slots = (labels[:, 2:] != IGNORED).flatten().nonzero()[:, 0]
    again = objective(ids, labels, features=features, slots=slots)
    torch.testing.assert_close(again["loss"], found["loss"])
    padded = objective(F.pad(ids, (0, 5)), F.pad(labels, (0, 5), value=IGNORED))
    torch.testing.assert_close(padded["loss"], found["loss"])


def test_gradients_flow_through_what_is_handed_on():
    """The gradient is the loss's own, which it is not where it is cut between steps."""
    target = copy.deepcopy(tiny_target()).double()
    drafter = drafter_for(target).double()
    ids = prompt(12)
    weight = drafter.trunk.layers[0].mlp.down_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def of(cut: bool) -> torch.Tensor:
        return steps_of(target, drafter, ids, 3, cut)[2].square().sum()

    with torch.no_grad():
        values = []
        for distance in (1e-3, -2e-3):
            weight += distance * direction
            values.append(of(False))
        weight += 1e-3 * direction
    slope = float(values[0] - values[1]) / 2e-3
    found = [
        float((torch.autograd.grad(of(cut), weight)[0] * direction).sum()) for cut in (False, True)
    ]
    assert found[0] == pytest.approx(slope, rel=2e-3)
    assert found[1] != pytest.approx(slope, rel=1e-2)


def test_all_weights_are_trained_and_only_these():
    target = tiny_target()
    drafter = drafter_for(target, 8)
    objective = objective_for(target, drafter).train()
    ids = prompt(14)
    objective(ids, ids.clone())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert all(p.grad is None for p in target.parameters())
    kept = {f"drafter.{name}" for name in drafter.state_dict()}
    assert set(objective.state_dict()) == {*kept, "input_sizes"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_is_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator).mul(4).to(dtype).requires_grad_()
    probabilities = torch.randn(5, 40, generator=generator).mul(3).softmax(1)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0])
    plain = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(plain, probabilities, reduction="none")
    found = cross_entropy(logits, probabilities)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, plain.grad.to(dtype))


@torch.no_grad()
def test_evaluation_counts_what_drafting_would_have_had_accepted():
    target, depth = tiny_target(), 3
    drafter = drafter_for(target, 12)
    ids = target.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    labels = ids.clone()
    labels[:, :3] = IGNORED
    found = objective_for(target, drafter, depth).eval()(ids, labels)["counts"][0]
    could, were = found.T.tolist()
    expected = [[0] * depth, [0] * depth]
    for root in range(1, ids.shape[1] - 2):
        reach = min(depth, ids.shape[1] - 2 - root)
        for j, hidden in enumerate(drafted(target, drafter, ids, root, reach)):
            expected[0][j] += 1
            best = drafter.draft_token_ids[drafter.scores(hidden).argmax()]
            if best != ids[0, root + 2 + j]:
                break
            expected[1][j] += 1
    assert [could, were] == expected
    assert were[0] > 0


def test_published_options_and_those_it_cannot_have():
    options = get_objective("eagle3").options_with()
    assert options == ObjectiveOptions(7, 0.8, 0.0, 1.0, noise=0.0)
    for name in ("regression_weight", "top_k_weight"):
        with pytest.raises(ValueError, match=f"`{name}` is 0.5, expected 0"):
            get_objective("eagle3").options_with(**{name: 0.5})
    with pytest.raises(ValueError, match="`decay` is 0"):
        get_objective("eagle3").options_with(decay=0)
    given = {"data": ["a.jsonl"], "out": "x"}
    for wrong, message in [
        ({"objective": "eagle3", "fc_bias": True}, "`fc_bias` is True, but drafters of"),
        ({"objective": "eagle3", "input_norm": True}, "`input_norm` is True"),
        ({"objective": "eagle3", "start": "least_squares"}, "expected random or target_head"),
        ({"objective": "eagle", "start": "target_head"}, "expected random or least_squares"),
        ({"objective": "hass", "layer_ids": [1]}, r"`layer_ids` is \[1\], but drafters of"),
        ({"objective": "eagle3", "layer_ids": [0]}, "`layer_ids` is"),
        ({"objective": "eagle3", "layer_ids": ["1"]}, "`layer_ids` is"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainOptions(**given, **wrong)


@torch.no_grad()
def test_dividing_inputs_changes_nothing_but_the_way():
    target = tiny_target()
    drafter = drafter_for(target)
    objective = objective_for(target, drafter).train()
    ids, before = prompt(14), drafter.fc.weight.clone()
    expected = objective(ids, ids.clone())["loss"]
    objective.divide_inputs(torch.linspace(0.5, 300, 64))
    assert not drafter.fc.weight.equal(before)
    torch.testing.assert_close(objective(ids, ids.clone())["loss"], expected)
    objective.finish()
    torch.testing.assert_close(drafter.fc.weight, before)
    torch.testing.assert_close(objective(ids, ids.clone())["loss"], expected)


def test_features_hold_what_is_read_and_the_last_states():
    target = tiny_target()
    assert objective_for(target, drafter_for(target)).layers == (1, 0, LAST)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device to wait for")
def test_a_step_does_not_wait_for_the_device():
    target = copy.deepcopy(tiny_target()).to("cuda")
    drafter = drafter_for(target, 8)
    objective = objective_for(target, drafter).train()
    ids = torch.cat([prompt(40, seed=seed) for seed in range(4)]).to("cuda")
    labels = ids.clone()
    labels[:, :5] = IGNORED
    given = {
        "features": features_of(target, ids[:, :-1], layers=objective.layers),
        "slots": (labels[:, 2:] != IGNORED).flatten().nonzero()[:, 0],
        "num_items_in_batch": torch.tensor(140, device="cuda"),
    }
    with torch.autocast("cuda", torch.bfloat16):
        objective(ids, labels, **given)["loss"].backward()  # libraries start
        torch.cuda.set_sync_debug_mode("error")
        try:
            objective(ids, labels, **given)["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in drafter.parameters())
