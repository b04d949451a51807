from __future__ import annotations

import copy

import pytest
import torch

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.training import start
from taps_hf.training.encoding import Example
from taps_hf.training.features import features_of
from taps_hf.training.objectives import Eagle3, FrozenTarget, get_objective
from taps_hf.training.start import (
    balance_inputs,
    balance_layers,
    check_can_be_fitted,
    copy_head,
    fit_projection,
)

from ..tiny import tiny_target


def examples(count: int = 40, length: int = 30) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 16, (count, length), generator=generator).tolist()
    return [Example(tuple(row), (False,) * 5 + (True,) * (length - 5)) for row in rows]


def given(target, rows):
    def read(example: Example) -> torch.Tensor:
        return features_of(target, torch.tensor([example.input_ids[:-1]]))[0]

    return target.get_input_embeddings(), rows, read


def drafter_of(target, **kwargs) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EagleDrafter.from_target(target, **kwargs).float()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("fc_bias", [True, False])
@torch.no_grad()
def test_the_fitted_projection_is_the_least_squares_solution(family, fc_bias, monkeypatch):
    """Against torch's solver on all slots at once; the layer adds nothing to it."""
    monkeypatch.setattr(start, "_RIDGE", 1e-6)
    target, rows = tiny_target(family), examples()
    drafter = drafter_of(target, fc_bias=fc_bias)
    embedding, _, read = given(target, rows)
    explained = fit_projection(drafter, embedding, rows, read)
    inputs, wanted = [], []
    for row in rows:
        features, slots = read(row), torch.tensor(row.is_answer[2:])
        embeds = embedding(torch.tensor(row.input_ids[1:-1]))
        inputs.append(torch.cat([embeds, features[:-1]], dim=1)[slots])
        wanted.append(features[1:][slots])
    x, y = torch.cat(inputs).double(), torch.cat(wanted).double()
    design = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if fc_bias else x
    expected = design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    torch.testing.assert_close(drafter.fc(x.float()), expected.float(), rtol=1e-3, atol=1e-3)
    share = 1 - ((y - expected) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert explained == pytest.approx(float(share), abs=1e-4)
    assert explained > 0.1
    row = rows[0]
    found = drafter(
        inputs_embeds=embedding(torch.tensor([row.input_ids[1:-1]])),
        features=read(row)[None, :-1],
    ).last_hidden_state[0]
    alone = drafter.fc(
        torch.cat([embedding(torch.tensor(row.input_ids[1:-1])), read(row)[:-1]], dim=1)
    )
    torch.testing.assert_close(found, alone)


@torch.no_grad()
def test_no_more_slots_are_read_than_wanted(monkeypatch):
    target, rows = tiny_target(), examples()
    one, other = (drafter_of(target, fc_bias=True) for _ in range(2))
    monkeypatch.setattr(start, "_SLOTS", 200)  # 25 of each example
    fit_projection(one, *given(target, rows))
    fit_projection(other, *given(target, rows[:8]))
    assert torch.equal(one.fc.weight, other.fc.weight)
    fit_projection(other, *given(target, rows[:7]))
    assert not torch.equal(one.fc.weight, other.fc.weight)


def test_layers_that_normalise_their_outputs_are_refused():
    with pytest.raises(ValueError, match="expected 'random'"):
        check_can_be_fitted(drafter_of(tiny_target("gemma3_text")))
    check_can_be_fitted(drafter_of(tiny_target()))


@torch.no_grad()
def test_balanced_inputs_contribute_alike():
    target = copy.deepcopy(tiny_target())
    target.get_input_embeddings().weight.mul_(0.01)
    drafter, rows = drafter_of(target), examples()
    balance_inputs(drafter, *given(target, rows))
    width = target.config.hidden_size
    row = rows[20]
    embeds = target.get_input_embeddings()(torch.tensor(row.input_ids))
    feature = features_of(target, torch.tensor([row.input_ids]))[0]
    token_part = embeds @ drafter.fc.weight[:, :width].T
    feature_part = feature @ drafter.fc.weight[:, width:].T
    assert float(token_part.std() / feature_part.std()) == pytest.approx(1, rel=0.5)


def eagle3_of(target, **kwargs) -> Eagle3Drafter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Eagle3Drafter.from_target(target, layer_ids=[1, 2], **kwargs).float()


@pytest.mark.parametrize("norms", [{}, {"fc_norm": True}, {"norm_before_fc": True}])
@torch.no_grad()
def test_layers_contribute_alike_to_features_of_size_one(norms):
    target, rows = tiny_target(), examples()
    scales = torch.cat([torch.full((32,), 50.0), torch.ones(32), torch.ones(32)])
    scales[40] = 300.0  # a dimension that would outweigh all others

    def read(example: Example) -> torch.Tensor:
        ids = torch.tensor([example.input_ids[:-1]])
        return features_of(target, ids, layers=(0, 1, -1))[0] * scales

    drafter = eagle3_of(target, **norms)
    options = get_objective("eagle3").options_with()
    objective = Eagle3(drafter, FrozenTarget(target, drafter), options)
    balance_layers(objective, rows, read, scale=True)
    states = torch.cat([read(row) for row in rows[:16]])[:, :64]
    sizes = objective.input_sizes.clone()
    assert float(objective.fuse(states).std()) == pytest.approx(1, rel=1e-4)
    if norms:
        assert sizes.eq(1).all()
    else:
        torch.testing.assert_close((states / sizes).std(dim=0), torch.ones(64))
        steps = drafter.fc.weight.std(dim=0)
        assert float(steps.max() / steps.min()) < 2  # what is learnt of all is of like size, too
    fused = objective.fuse(states)
    balance_layers(objective, rows[20:], read, scale=False)  # other rows have other sizes
    torch.testing.assert_close(objective.fuse(states), fused, rtol=1e-3, atol=1e-3)
    assert norms or not objective.input_sizes.equal(sizes)
    objective.finish()
    torch.testing.assert_close(drafter.fuse(states), fused, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("draft_vocab", [None, 6])
@torch.no_grad()
def test_a_head_starts_as_the_targets_but_no_more_certain_than_a_random_one(draft_vocab):
    target = tiny_target("qwen3")
    ids = None if draft_vocab is None else torch.tensor([3, 9, 1, 14, 7, 2])
    drafter = eagle3_of(target, draft_token_ids=ids)
    copy_head(drafter, target)
    states = 7 * torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0))
    scores = drafter.scores(states)
    expected = target.lm_head(states)
    if ids is not None:
        expected = expected[:, :, ids.sort().values]
    assert scores.argmax(2).equal(expected.argmax(2))
    assert float(scores.std()) == pytest.approx(1, rel=0.1)
