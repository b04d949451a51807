from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taps_hf.training.muon import MuonWithAdamW
from taps_hf.training.options import TrainOptions

from ..tiny import needs_muon


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def learn(layers: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()


@needs_muon
def test_matrices_take_orthogonal_steps_and_vectors_those_of_adamw(layers):
    start = copy.deepcopy(layers)
    optimizer = MuonWithAdamW(layers.named_parameters(), lr=1e-2)
    learn(layers, optimizer, range(1))
    adamw = copy.deepcopy(start)
    reference = torch.optim.AdamW(adamw.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    learn(adamw, reference, range(1))
    for (name, was), now, by_adamw in zip(
        start.named_parameters(), layers.parameters(), adamw.parameters()
    ):
        if was.ndim == 1:
            torch.testing.assert_close(now, by_adamw, msg=name)
            continue
        # Newton and Schulz's five steps bring singular values near one, not to it; gradients
        # that are zero in a direction stay so.
        strengths = torch.linalg.svdvals(was - now) / (1e-2 * 0.2 * max(was.shape) ** 0.5)
        strengths = strengths[strengths > 0.05]
        assert len(strengths) >= 3
        assert 0.5 < strengths.min() <= strengths.max() < 1.5, name


@needs_muon
def test_in_float32_it_takes_the_steps_that_torchs_own_takes_in_bfloat16(layers, monkeypatch):
    taken = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda c=capability: c)
        learnt = copy.deepcopy(layers)
        optimizer = MuonWithAdamW(learnt.named_parameters(), lr=1e-2, weight_decay=0.1)
        assert (type(optimizer.parts[0]) is torch.optim.Muon) == (capability == "AVX512")
        learn(learnt, optimizer, range(3))
        taken.append([now - was for now, was in zip(learnt.parameters(), layers.parameters())])
    for ours, torchs in zip(*taken):
        assert (ours - torchs).norm() < 0.03 * torchs.norm()


@needs_muon
def test_it_goes_on_from_its_state(layers):
    optimizer = MuonWithAdamW(layers.named_parameters(), lr=1e-2, weight_decay=0.1)
    learn(layers, optimizer, range(3))
    resumed = copy.deepcopy(layers)
    other = MuonWithAdamW(resumed.named_parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(layers, optimizer, range(3, 6))
    learn(resumed, other, range(3, 6))
    for now, then in zip(resumed.parameters(), layers.parameters()):
        assert now.equal(then)


@needs_muon
def test_a_schedule_reaches_both(layers):
    optimizer = MuonWithAdamW(layers.named_parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    start = copy.deepcopy(layers)
    learn(layers, optimizer, range(1))
    schedule.step()
    for now, was in zip(layers.parameters(), start.parameters()):
        assert now.equal(was)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    learn(layers, optimizer, range(1))
    assert not any(now.equal(was) for now, was in zip(layers.parameters(), start.parameters()))


def test_an_older_torch_is_told_so_before_work_starts(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"has no Muon; expected 2\.9"):
        TrainOptions(data=["a.jsonl"], out="x", optimizer="muon")
    with pytest.raises(ValueError, match="`optimizer` is 'sgd'"):
        TrainOptions(data=["a.jsonl"], out="x", optimizer="sgd")


@needs_muon
def test_a_head_is_left_to_adamw():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"fc": nn.Linear(4, 4, bias=False), "lm_head": nn.Linear(4, 9, bias=False)}
    )
    muon, adamw = MuonWithAdamW(model.named_parameters(), lr=1e-2).parts
    assert muon.param_groups[0]["params"] == [model["fc"].weight]
    assert adamw.param_groups[0]["params"] == [model["lm_head"].weight]
