"""A drafter of a kind that the package does not have: it knows some phrases by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from taps_hf import Drafter, DrafterSession, DraftRequest, DraftTree


class Phrases(Drafter):
    """Proposes what follows the last token in any of its phrases: a trie, no model at all.

    Args:
        phrases: token ids.
        confidence: of every node.
    """

    name_or_path = "by/heart"

    def __init__(self, *phrases: Sequence[int], confidence: float = 0.9) -> None:
        self.phrases = [tuple(phrase) for phrase in phrases]
        self.confidence = confidence

    def __repr__(self) -> str:
        return f"Phrases({self.phrases}, {self.confidence})"

    @classmethod
    def start(cls, drafters, target):
        (drafter,) = drafters
        return PhrasesSession(drafter)


class PhrasesSession(DrafterSession):
    def __init__(self, drafter: Phrases) -> None:
        self.drafter = drafter
        self.text: list[int] = []

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        assert len(tokens)
        self.text += tokens.tolist()

    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        assert rows == [0]
        assert self.text[-1] == int(request.root)
        tokens, parents, depths = [self.text[-1]], [-1], [0]
        for phrase in self.drafter.phrases:
            for start in range(len(phrase)):
                # The longest matching suffix is not looked for: two tokens have to do.
                if phrase[max(start - 1, 0) : start + 1] != tuple(self.text[-min(start + 1, 2) :]):
                    continue
                node = 0
                for token in phrase[start + 1 : start + 1 + request.max_depth]:
                    same = [i for i, p in enumerate(parents) if p == node and tokens[i] == token]
                    if not same:
                        if len(tokens) > request.shape.num_nodes:
                            break
                        tokens.append(token)
                        parents.append(node)
                        depths.append(depths[node] + 1)
                        same = [len(tokens) - 1]
                    node = same[0]
        depth = torch.tensor(depths)
        confidence = torch.full((1, len(tokens)), self.drafter.confidence)
        confidence[:, 0] = 1.0
        known = self.drafter.confidence ** depth[None]
        return {0: DraftTree(torch.tensor(tokens), torch.tensor(parents), depth, confidence, known)}

    def forget(self, count: int) -> bool:
        del self.text[len(self.text) - count :]
        return bool(self.text)
