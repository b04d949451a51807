"""Drafts out of each request's own text: what followed where its last tokens stood before."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import torch

from ..drafters.lookup import likeliest
from ..drafters.suffixes import SuffixAutomaton


class Lookups:
    """The texts of requests, and how they may go on: see [`drafters.lookup`]."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[SuffixAutomaton, int]] = {}  # with the tokens that it has

    def read(self, request: str, *parts: Sequence[int]) -> None:
        """Take in what a request's text has become.

        Args:
            request: its name.
            parts: that the text consists of, from its beginning; what is known of it stays as it
                is, unless there is less of it now.
        """
        text, known = self._texts.get(request, (SuffixAutomaton(), 0))
        length = sum(map(len, parts))
        if length < known:
            text, known = SuffixAutomaton(), 0
        for part in parts:
            for token in part[known:]:
                text.add(int(token))
            known = max(known - len(part), 0)
        self._texts[request] = (text, length)

    def offer(self, requests: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How requests may go on.

        Args:
            requests: of a batch; of those that were never read there is nothing.
            length: tokens at most.

        Returns:
            (n, length) int64 tokens, -1 where nothing is known to follow, and (n, length) float32:
            log-probabilities of each after those before it.
        """
        tokens = torch.full((len(requests), length), -1)
        confidences = torch.full((len(requests), length), -torch.inf)
        for row, request in enumerate(requests):
            if request in self._texts:
                found = likeliest(self._texts[request][0], length)
                for at, (token, sure) in enumerate(found):
                    tokens[row, at], confidences[row, at] = token, math.log(sure)
        return tokens, confidences

    def forget(self, alive: Container[str]) -> None:
        """Let go of the texts of requests that have ended."""
        for request in [request for request in self._texts if request not in alive]:
            del self._texts[request]
