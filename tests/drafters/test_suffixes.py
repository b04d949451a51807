from __future__ import annotations

import random

import pytest

from taps_hf.drafters.suffixes import SuffixAutomaton


def texts() -> list[list[int]]:
    generator = random.Random(0)
    random_ones = [
        [generator.randrange(size) for _ in range(length)]
        for size in (1, 2, 3, 5)
        for length in (1, 2, 7, 30, 60)
    ]
    return [*random_ones, [0, 1] * 20, [0, 1, 2, 0, 1, 3] * 6, list(range(20)) * 2]


def ends(text: list[int], context: tuple[int, ...]) -> frozenset[int]:
    """Where a context ends in a text."""
    size = len(context)
    return frozenset(i for i in range(size, len(text) + 1) if tuple(text[i - size : i]) == context)


def read(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.add(token)
    return automaton


def state_of(automaton: SuffixAutomaton, context: tuple[int, ...]) -> int | None:
    state = 0
    for token in context:
        state = automaton.after(state, token)
        if state is None:
            return None
    return state


def contexts_of(text: list[int]) -> set[tuple[int, ...]]:
    return {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)}


@pytest.mark.parametrize("text", texts(), ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_states_are_sets_of_contexts_that_end_at_the_same_places(text):
    automaton = read(text)
    assert automaton.num_states <= 2 * len(text)
    places: dict[int, frozenset[int]] = {}
    longest: dict[int, int] = {}
    for context in contexts_of(text):
        state = state_of(automaton, context)
        assert places.setdefault(state, ends(text, context)) == ends(text, context)
        longest[state] = max(longest.get(state, 0), len(context))
    assert len(set(places.values())) == len(places) == automaton.num_states - 1
    assert {state: automaton.length(state) for state in longest} == longest
    assert state_of(automaton, (*text, 9)) is None


@pytest.mark.parametrize("text", texts(), ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_the_longest_match_is_the_longest_suffix_that_also_stands_further_up(text):
    automaton = SuffixAutomaton()
    for i, token in enumerate(text, start=1):
        automaton.add(token)
        so_far = text[:i]
        repeated = [
            so_far[i - size :]
            for size in range(1, i)
            if len(ends(so_far, tuple(so_far[i - size :]))) > 1
        ]
        state = automaton.longest_match
        assert automaton.length(state) == max(map(len, repeated), default=0)
        assert state == state_of(automaton, tuple(so_far[i - automaton.length(state) :]))
        # Its shorter suffixes, of ever more places.
        found = [automaton.length(context) for context in automaton.contexts(state)]
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("text", texts(), ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_tokens_are_counted_after_the_longest_contexts_that_they_had_followed(text):
    """Against a table of all contexts: those that end at the same places are counted as one."""
    counts: dict[tuple[int, ...], dict[int, int]] = {}
    for i, token in enumerate(text):
        so_far = text[:i]
        seen = None  # places of the longest contexts that had the token before
        for size in range(i, -1, -1):
            context = tuple(so_far[i - size :])
            known = counts.setdefault(context, {})
            if token not in known:
                known[token] = 1
                continue
            seen = seen or ends(so_far, context)
            if ends(so_far, context) != seen:
                break
            known[token] += 1
    automaton = read(text)
    for context, known in counts.items():
        assert automaton.counts(state_of(automaton, context)) == known


def test_what_was_counted_last_comes_last():
    automaton = read([7, 1, 7, 2, 7, 3, 7, 1, 7])
    assert list(automaton.counts(state_of(automaton, (7,)))) == [2, 3, 1]


def test_the_empty_context_is_no_match():
    automaton = read([1, 2, 3])
    assert automaton.longest_match == 0
    assert list(automaton.contexts(automaton.longest_match)) == []
    assert SuffixAutomaton().longest_match == 0


@pytest.mark.parametrize("text", texts(), ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_the_end_of_another_text_is_found(text):
    automaton = read(text)
    generator = random.Random(len(text))
    for _ in range(20):
        other = [generator.randrange(max(text) + 2) for _ in range(generator.randrange(12))]
        start = generator.randrange(len(text))
        other += text[start : start + generator.randrange(6)]
        longest = max(
            size
            for size in range(len(other) + 1)
            if ends(text, tuple(other[len(other) - size :])) or not size
        )
        assert automaton.find(other) == (
            state_of(automaton, tuple(other[len(other) - longest :])),
            longest,
        )
