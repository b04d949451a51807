"""Drafters that are right now and then: they have learnt a random target's answers by heart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.drafters.modeling_feature import FeatureDrafter

ANSWER, TAUGHT = 64, 60


def taught_drafter(
    target: PreTrainedModel, prompts: torch.Tensor, scored: torch.Tensor | None, **settings: Any
) -> FeatureDrafter:
    """One that has learnt some of what the target answers to these prompts.

    Args:
        target: with few tokens to guess.
        prompts: (n, length) int64.
        scored: the draft vocabulary of an EAGLE-3 drafter, ascending; None for an EAGLE-2 one.
        settings: of its dialect.
    """
    with torch.random.fork_rng():
        torch.manual_seed(6)
        if scored is None:
            drafter = EagleDrafter.from_target(target)
        else:
            drafter = Eagle3Drafter.from_target(target, scored, **settings)
    answers = target.generate(prompts, max_new_tokens=ANSWER, do_sample=False)
    with torch.no_grad():
        states = target(answers, output_hidden_states=True).hidden_states
        embeds = target.get_input_embeddings()(answers)[:, 1:-1]
    layers = drafter.config.layer_ids if drafter.has_own_head else [-1]
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-2]
    wanted = answers[:, 2:]
    if scored is not None:  # in places of the draft vocabulary; -100 is not asked for
        places = torch.full((target.config.vocab_size,), -100)
        wanted = places.index_copy(0, scored, torch.arange(len(scored)))[wanted]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=0.003)
    for _ in range(TAUGHT):
        hidden = drafter(embeds, drafter.fuse(features)).last_hidden_state
        head = drafter.scores if drafter.has_own_head else target.get_output_embeddings()
        loss = F.cross_entropy(head(hidden).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.requires_grad_(False).eval()
