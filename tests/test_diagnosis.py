"""`taps-hf check`: a drafter that drafts, and the same one read wrongly in each known way."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch

from taps_hf import Eagle3Drafter, EagleDrafter, diagnosis
from taps_hf.diagnosis import accepted, diagnose, report
from taps_hf.drafters.modeling_feature import FeatureDrafter
from taps_hf.evaluation.records import Record, states_of
from taps_hf.target import LAST

from .formats import foreign


@functools.cache
def records() -> tuple[Record, ...]:
    """Random texts: nothing about them can be known without the target's states."""
    generator = torch.Generator().manual_seed(3)
    none = torch.empty(0)
    found = []
    for number in range(3):
        tokens = torch.randint(0, foreign.VOCAB, (40,), generator=generator)
        found.append(Record("check", str(number), "", 0, 0.0, tokens, 3, 40, none, none))
    return tuple(found)


@functools.cache
def restless():
    """A target each of whose layers drowns what those before it gave."""
    target = copy.deepcopy(foreign.target())
    with torch.no_grad():
        for number, layer in enumerate(target.model.layers):
            layer.mlp.down_proj.weight.mul_(10.0 * 8.0**number)
    return target


@functools.cache
def learnt(kind: type[FeatureDrafter]) -> FeatureDrafter:
    """A drafter that knows the texts by heart, from the states that it reads."""
    target = restless()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        more = {"layer_ids": [2, 4, 6]} if kind is Eagle3Drafter else {"fc_bias": True}
        drafter = kind.from_target(target, **more)
    if kind is Eagle3Drafter:  # by the states alone, or it would know the texts without them
        drafter.trunk.layers[0].input_layernorm.weight.requires_grad_(False).zero_()
    tokens = torch.stack([record.tokens for record in records()])
    with torch.no_grad():
        layers = drafter.reads_layers
        known = [
            states_of(record, target, [n for n in layers if n != LAST] or [0])
            for record in records()
        ]
        if LAST in layers:
            features = target.base_model(tokens[:, :-1]).last_hidden_state
        else:
            features = torch.stack([torch.cat([x[n] for n in layers], dim=1) for x in known])
        embeds = target.get_input_embeddings()(tokens[:, 1:])
    optimiser = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(120):
        hidden = drafter(embeds, drafter.fuse(features)).last_hidden_state
        scores = drafter.scores(hidden) if drafter.has_own_head else target.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), tokens[:, 2:].flatten()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5
    return drafter.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [EagleDrafter, Eagle3Drafter])
def test_a_drafter_that_drafts(kind):
    found = diagnose(learnt(kind), restless(), records())
    assert found.found.first > 0.8
    assert found.causes == []
    assert found.changed == {}
    assert "The drafter drafts." in report(found)


def test_acceptance_is_counted_by_depth():
    """Against drafting every position by hand, one token deep."""
    drafter, target = learnt(EagleDrafter), restless()
    states = [states_of(record, target, [0, LAST]) for record in records()]
    found = accepted(drafter, target, records(), states)
    right = tried = 0
    with torch.no_grad():
        for record, known in zip(records(), states):
            embeds = target.get_input_embeddings()(record.tokens[None, 1:])
            hidden = drafter(embeds, known[LAST][None]).last_hidden_state
            best = target.lm_head(hidden)[0].argmax(dim=-1)
            for root in range(record.answer_start, 39):
                tried += 1
                right += int(best[root - 1] == record.tokens[root + 1])
    assert (found.right[0], found.tried[0]) == (right, tried)
    assert all(a >= b for a, b in zip(found.tried, found.tried[1:]))
    assert all(found.right[d] >= found.tried[d + 1] for d in range(4))


def _shifted(drafter):
    drafter.config.layer_ids = [1, 3, 5]


def _biased(drafter):
    with torch.no_grad():
        drafter.fc.bias.normal_(std=20.0)


@pytest.mark.parametrize(
    ("kind", "spoil", "cause"),
    [
        (Eagle3Drafter, _shifted, r"layer ids off by one: hidden_states [2, 4, 6] instead of"),
        (EagleDrafter, _biased, "bias: a projection without its bias"),
    ],
)
def test_what_was_read_wrongly_is_named(kind, spoil, cause):
    drafter = copy.deepcopy(learnt(kind))
    drafter.config = copy.deepcopy(drafter.config)
    spoil(drafter)
    found = diagnose(drafter, restless(), records())
    assert found.found.first < 0.25
    assert found.causes[0].startswith(cause)
    assert "Far below what is usual" in report(found)
    # Nothing is left changed.
    assert drafter.digest() != learnt(kind).digest()


def test_the_wrong_target_is_named_and_nothing_else_invented():
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(restless(), layer_ids=[2, 4, 6]).eval()
    drafter.config.target_name_or_path = "somebody/else"
    target = copy.copy(restless())
    target.config = copy.deepcopy(target.config)
    target.config.name_or_path = "me/mine"
    found = diagnose(drafter, target, records())
    assert "wrong target: it was made for somebody/else, and this is me/mine" in found.causes
    drafter.config.target_name_or_path = None
    found = diagnose(drafter, target, records())
    assert found.causes[-1].startswith("none of the changes tried helps")


def test_prompts_come_from_a_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"t{i}", "output": "t9"} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(diagnosis._prompts(str(file), 2))[0].startswith("t")
    assert len(diagnosis._prompts(str(file), 2)) == 2
    assert len(diagnosis._prompts(None, 4)) == 4
    file.write_text('{"something": "else"}\n')
    with pytest.raises(ValueError, match="no conversation that can be used"):
        diagnosis._prompts(str(file), 1)
