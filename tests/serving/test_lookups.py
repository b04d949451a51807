"""What requests' own texts offer, against a lookup over the whole text at once."""

from __future__ import annotations

import math
import random

import torch

from taps_hf.drafters.lookup import likeliest
from taps_hf.drafters.suffixes import SuffixAutomaton
from taps_hf.serving.lookups import Lookups


def at_once(text: list[int], length: int) -> tuple[list[int], list[float]]:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.add(token)
    found = likeliest(automaton, length)
    missing = length - len(found)
    tokens = [token for token, _ in found] + [-1] * missing
    return tokens, [math.log(sure) for _, sure in found] + [-math.inf] * missing


def test_texts_are_read_bit_by_bit():
    """A prompt, what a runner already has of the answer, and what it has not yet."""
    choose, lookups = random.Random(0), Lookups()
    texts = {name: [choose.randrange(3) for _ in range(12)] for name in "ab"}
    answers = {name: [] for name in texts}
    for _ in range(10):
        for name, prompt in texts.items():
            new = [choose.randrange(3) for _ in range(choose.randrange(1, 4))]
            lookups.read(name, prompt, answers[name], new)
            answers[name] += new
        tokens, confidences = lookups.offer(["b", "new", "a"], 4)
        for row, name in ((0, "b"), (2, "a")):
            expected = at_once(texts[name] + answers[name], 4)
            assert tokens[row].tolist() == expected[0]
            torch.testing.assert_close(confidences[row], torch.tensor(expected[1]))
        assert tokens[1].tolist() == [-1] * 4


def test_a_text_that_was_taken_back_is_read_anew():
    lookups = Lookups()
    lookups.read("a", [1, 2, 3, 4, 1, 2])
    lookups.read("a", [5, 6, 7, 5])
    assert lookups.offer(["a"], 2)[0].tolist() == [at_once([5, 6, 7, 5], 2)[0]]


def test_nothing_is_kept_of_requests_that_have_ended():
    lookups = Lookups()
    for name in "ab":
        lookups.read(name, [1, 2, 1])
    lookups.forget({"b"})
    tokens, _ = lookups.offer(["a", "b"], 1)
    assert tokens.tolist() == [[-1], [2]]
