from __future__ import annotations

import pytest
import torch

from taps_hf.target import LAST
from taps_hf.training.engines.batched import answer_batch
from taps_hf.training.features import features_of

from ...tiny import FAMILIES, prompt, tiny_target

PROMPTS = [prompt(length, seed=length)[0].tolist() for length in (3, 9, 5, 12, 4)]
END = {2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(LAST,), (0,), (1, LAST)])
def test_greedy_answers_are_those_of_generate(family, layers):
    target = tiny_target(family)
    found = answer_batch(target, PROMPTS, 15, END, layers=layers)
    lengths = set()
    for ids, answer in zip(PROMPTS, found):
        ids_tensor = torch.tensor([ids])
        plain = target.generate(
            ids_tensor,
            attention_mask=torch.ones_like(ids_tensor),
            do_sample=False,
            max_new_tokens=15,
            eos_token_id=2,
            pad_token_id=0,
        )[0].tolist()
        assert [*ids, *answer.tokens] == plain
        lengths.add(len(answer.tokens))
        expected = features_of(target, torch.tensor([plain[:-1]]), layers=layers)[0]
        torch.testing.assert_close(answer.features.float(), expected, rtol=2e-2, atol=5e-2)
    assert family != "llama" or len(lengths) > 1  # rows did leave the batch


def test_sampled_answers_follow_the_targets_distribution():
    target, temperature, count = tiny_target(), 2.0, 4000
    with torch.no_grad():
        logits = target(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(0)
    generator = torch.Generator().manual_seed(0)
    found = answer_batch(target, [PROMPTS[0]] * count, 1, END, temperature, generator)
    drawn = torch.tensor([answer.tokens[0] for answer in found])
    frequency = torch.bincount(drawn, minlength=16) / count
    assert (frequency - expected).abs().max() < 4 * (0.25 / count) ** 0.5
