"""The candidate generator also serves transformers' own assisted generation."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.generation.candidate_generator import CandidateGenerator

import taps_hf
from tests.tiny import prompt, tiny_drafters, tiny_target


def test_in_transformers_own_assisted_generation(monkeypatch):
    if not hasattr(CandidateGenerator, "requires_model_outputs"):
        pytest.skip("this transformers hands no model outputs to candidate generators")
    target = copy.deepcopy(tiny_target())
    made = []
    proposed = []  # tokens a cycle

    class Counting(taps_hf.TreeCandidateGenerator):
        def get_candidates(self, input_ids, *args, **kwargs):
            candidates, logits = super().get_candidates(input_ids, *args, **kwargs)
            proposed.append(candidates.shape[1] - input_ids.shape[1])
            return candidates, logits

    def ours(self, **kwargs):
        made.append(
            Counting(
                target,
                tiny_drafters(2),
                taps_hf.Merged(),
                taps_hf.DynamicTree(depth=3, top_k=4, num_nodes=12),
                max_length=kwargs["generation_config"].max_length,
            )
        )
        return made[0]

    plain = target.generate(prompt(), max_new_tokens=30, do_sample=False)
    monkeypatch.setattr(type(target), "_get_candidate_generator", ours)
    # Any assistant model makes generate take the assisted path.
    assisted = target.generate(
        prompt(), max_new_tokens=30, do_sample=False, assistant_model=tiny_target()
    )
    assert torch.equal(plain, assisted)
    assert sum(proposed) > 0
    assert len(proposed) < 30  # some were accepted: fewer cycles than tokens


def test_before_the_first_pass_there_is_nothing_to_propose():
    generator = taps_hf.TreeCandidateGenerator(
        tiny_target(), tiny_drafters(1), taps_hf.Single(), taps_hf.ChainTree(2), max_length=50
    )
    candidates, logits = generator.get_candidates(prompt())
    assert torch.equal(candidates, prompt())
    assert logits is None
    assert len(generator.propose(prompt()[0, -1:], max_depth=3).tree) == 1
