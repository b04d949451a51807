"""A suffix automaton that grows with a text: every context in it, and what followed there.

The automaton (Blumer et al. 1985) has a state for every set of contexts, strings of the text that
end at the same places, and a transition for every token that follows them; the suffix link of a
state leads to the longest contexts that end at more places. At most two states come with a token.

Beside the transitions it counts. A token is counted after the longest contexts that it had followed
before, and once after all longer ones; the contexts above, which those contain, are left as they
are. So a count says after how many *different* longer contexts a token came: what Kneser and Ney
(1995) estimate lower orders by, and what compressors by partial matching call update exclusion
(Moffat 1990). It is also what can be counted in the steps that building the automaton takes anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class SuffixAutomaton:
    """Every string of a text, with what followed it.

    States are numbers, 0 the empty context. Adding a token takes constant time, amortised over the
    text, but for copying what followed a context when it is first found without what stood before.
    """

    def __init__(self) -> None:
        self._length = [0]  # of the longest context of a state
        self._link = [-1]
        self._next: list[dict[int, int]] = [{}]
        self._counts: list[dict[int, int]] = [{}]  # what was counted last comes last
        self._last = 0

    @property
    def num_states(self) -> int:
        """At most twice as many as tokens."""
        return len(self._length)

    @property
    def longest_match(self) -> int:
        """The state of the text's longest suffix that also stands further up."""
        return max(self._link[self._last], 0)

    def length(self, state: int) -> int:
        """Tokens of a state's longest context."""
        return self._length[state]

    def link(self, state: int) -> int:
        """The state of the longest suffix that also ends elsewhere; -1 of the empty context."""
        return self._link[state]

    def after(self, state: int, token: int) -> int | None:
        """The state of a context followed by a token; None if it never was."""
        return self._next[state].get(token)

    def counts(self, state: int) -> dict[int, int]:
        """What followed a context, and how often; what was counted last comes last. Not a copy."""
        return self._counts[state]

    def contexts(self, state: int) -> Iterator[int]:
        """The state and those of its shorter suffixes, but for the empty context."""
        while state > 0:
            yield state
            state = self._link[state]

    def find(self, text: Sequence[int]) -> tuple[int, int]:
        """Of a text's longest suffix that stands in this one the state, and how long it is."""
        state = matched = 0
        for token in text:
            while state and token not in self._next[state]:
                state = self._link[state]
                matched = self._length[state]
            if token in self._next[state]:
                state, matched = self._next[state][token], matched + 1
        return state, matched

    def add(self, token: int) -> None:
        """Let the text go on with a token."""
        new = self._state(self._length[self._last] + 1, 0, {}, {})
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            self._counts[state][token] = 1
            state = self._link[state]
        if state != -1:
            self._count(state, token)
            self._link[new] = self._context(state, token)
        self._last = new

    def _state(self, length: int, link: int, following: dict, counts: dict) -> int:
        self._length.append(length)
        self._link.append(link)
        self._next.append(following)
        self._counts.append(counts)
        return len(self._length) - 1

    def _count(self, state: int, token: int) -> None:
        counts = self._counts[state]
        counts[token] = counts.pop(token) + 1

    def _context(self, state: int, token: int) -> int:
        """The state whose longest context is that of `state` and the token after it."""
        known = self._next[state][token]
        length = self._length[state] + 1
        if self._length[known] == length:
            return known
        # So far it only ended where a longer context did. Now it also ends here.
        parted = self._state(
            length, self._link[known], self._next[known].copy(), self._counts[known].copy()
        )
        self._link[known] = parted
        while state != -1 and self._next[state].get(token) == known:
            self._next[state][token] = parted
            state = self._link[state]
        return parted
