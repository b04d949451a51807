"""Drafting without a model: what followed in the text where its last tokens stood before.

Prompt lookup as it is commonly done copies what came after one earlier place. Here every context
that matches votes: the longest suffix of the text and a node's path that stood there before, and
shorter ones that also stood elsewhere. Their counts are interpolated as in Witten and Bell (1991):
after a context that N times was followed by D different tokens, one of these comes again with
probability N / (N + k D), where k falls with the length of the match; what is left goes to the next
shorter context. Nodes come best first, so a tree is a long chain where the text repeats itself and
a bush where it might.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import count, islice

import torch
from transformers import PreTrainedModel

from ..trees.tree import DraftTree
from .base import Drafter, DrafterSession, DraftRequest
from .suffixes import SuffixAutomaton

LEAST = 0.01
"""Less likely paths are not proposed: no pass is so cheap that they would pay."""
_CONTEXTS = 4  # that vote on what follows
_TOKENS = 16  # of a context, counted last: what followed a common word before that is left out
_SUREST = 0.99
# Tokens that match at least, and k: the likeliest for SmolLM2-135M-Instruct's answers to questions
# about texts, mathematical ones and conversations (35 of 128 tokens, greedy).
_DOUBT = ((32, 0.01), (16, 0.05), (10, 0.2), (5, 0.25), (4, 0.3), (3, 0.7), (2, 0.9), (1, 2.0))
_DOUBT_LATER = 3.0  # of contexts whose longer ones were wrong, whatever their length


class PromptLookup(Drafter):
    """Proposes what followed earlier in the text: in the prompt, in earlier turns, in the answer.

    It needs no model, no training and no features, fits every target and costs next to nothing. It
    foresees much where an answer repeats: quotes, summaries, code, reasoning that restates.

    Args:
        min_match: tokens that a context must have at least.

    Raises:
        ValueError: unless that is a positive integer.
    """

    name_or_path = "lookup"
    is_free = True

    def __init__(self, min_match: int = 1) -> None:
        if not isinstance(min_match, int) or isinstance(min_match, bool) or min_match < 1:
            raise ValueError(f"`min_match` is {min_match!r}, expected a positive integer.")
        self.min_match = min_match

    def __repr__(self) -> str:
        return f"PromptLookup(min_match={self.min_match})"

    def run_key(self) -> Hashable:
        return self.min_match

    @classmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> LookupSession:
        (drafter,) = drafters
        return LookupSession(drafter)


class LookupSession(DrafterSession):
    """The text of one generation or several, and where its contexts stand.

    Args:
        drafter: whose settings are used.
    """

    def __init__(self, drafter: PromptLookup) -> None:
        self._min_match = drafter.min_match
        self._automaton = SuffixAutomaton()
        self._text: list[int] = []  # in the automaton
        self._heard: list[torch.Tensor] = []  # not yet: read back from the device when asked

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        self._heard.append(tokens)

    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        self._read()
        found = self._automaton.longest_match
        limits = (request.shape.num_nodes, request.max_depth, self._min_match)
        tree = grow(self._automaton, found, self._automaton.length(found), request.root, *limits)
        return {0: tree} if len(tree) > 1 else {}

    def forget(self, count: int) -> bool:
        self._read()
        text = self._text[: max(len(self._text) - count, 0)]
        self._automaton, self._text = SuffixAutomaton(), []
        self._add(text)  # anew: a conversation is taken back once a turn at most
        return bool(text)

    def _read(self) -> None:
        for tokens in self._heard:
            self._add(tokens.tolist())
        self._heard = []

    def _add(self, tokens: Sequence[int]) -> None:
        self._text += tokens
        for token in tokens:
            self._automaton.add(token)


def grow(
    automaton: SuffixAutomaton,
    state: int,
    matched: int,
    root: torch.Tensor,
    num_nodes: int,
    max_depth: int,
    min_match: int = 1,
) -> DraftTree:
    """The likeliest continuations of a text, of those that an automaton knows.

    Args:
        automaton: over a text, not necessarily the one that goes on.
        state: of the longest suffix of the text that the automaton knows.
        matched: tokens of that suffix.
        root: (1,) int64: the text's last token.
        num_nodes: nodes at most, the root not counted.
        max_depth: no node lies deeper.
        min_match: shorter contexts do not vote.
    """
    tokens, parents, depths = root.tolist(), [-1], [0]
    confidence, path = [1.0], [1.0]
    places = [(state, matched)]
    order = count()  # among equals the earlier one
    waiting: list[tuple] = []

    def expand(node: int) -> None:
        if depths[node] == max_depth:
            return
        for token, (sure, place) in _following(automaton, *places[node], min_match).items():
            if path[node] * sure >= LEAST:
                heapq.heappush(waiting, (-path[node] * sure, next(order), token, node, sure, place))

    expand(0)
    while waiting and len(tokens) <= num_nodes:
        likely, _, token, parent, sure, (following, length) = heapq.heappop(waiting)
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        confidence.append(sure)
        path.append(-likely)
        places.append((following, length))
        expand(len(tokens) - 1)
    return DraftTree(
        torch.tensor(tokens, device="cpu"),
        torch.tensor(parents, device="cpu"),
        torch.tensor(depths, device="cpu"),
        torch.tensor([confidence], device="cpu"),
        torch.tensor([path], device="cpu"),
    )


def likeliest(
    automaton: SuffixAutomaton, length: int, min_match: int = 1
) -> list[tuple[int, float]]:
    """How a text most likely goes on, with each token's probability after those before it.

    Args:
        automaton: over the text.
        length: tokens at most; fewer where nothing is known to follow.
        min_match: shorter contexts do not vote.
    """
    found: list[tuple[int, float]] = []
    place = (automaton.longest_match, automaton.length(automaton.longest_match))
    while len(found) < length and (following := _following(automaton, *place, min_match)):
        token = max(following, key=lambda token: following[token][0])
        sure, place = following[token]
        found.append((token, sure))
    return found


def _following(
    automaton: SuffixAutomaton, state: int, matched: int, min_match: int
) -> dict[int, tuple[float, tuple[int, int]]]:
    """What may follow a context: its probability, and where that leads (state and match)."""
    found: dict[int, tuple[float, tuple[int, int]]] = {}
    rest, doubt = 1.0, _doubt(max(matched, 1))
    for context in islice(automaton.contexts(state), _CONTEXTS):
        length = min(matched, automaton.length(context))
        if length < min_match:
            break
        counts = automaton.counts(context)
        if not counts:  # it stands at the text's end only
            continue
        total, kinds = sum(counts.values()), len(counts)
        share = rest / (total + doubt * kinds)
        for token, times in islice(reversed(counts.items()), _TOKENS):
            sure, place = found.get(token, (0.0, None))
            place = place or (automaton.after(context, token), length + 1)
            found[token] = (min(sure + share * times, _SUREST), place)
        rest *= doubt * kinds / (total + doubt * kinds)
        doubt = _DOUBT_LATER
    return found


def _doubt(matched: int) -> float:
    """The `k` of a context that matches so many tokens, at least one."""
    return next(doubt for least, doubt in _DOUBT if matched >= least)
