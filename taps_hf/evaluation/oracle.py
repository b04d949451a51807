"""How good could a drafter be? Trees grown by the target's own probabilities: the ceiling.

What a drafter's path confidence estimates, the oracle's is: the probability that the target says
these tokens. A tree's accepted tokens to be expected are the sum of that over its nodes, so of the
candidates that EAGLE-2's growth comes by the oracle keeps the best tree there is. What even it
misses is the text's own randomness.

It is for measuring only: a tree of d levels costs d passes of the target, which is what decoding
with it could save at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..cache import CACHE
from ..checks import NOT_NEGATIVE, check_numbers
from ..drafters.base import Drafter, DrafterSession, DraftRequest
from ..drafters.heads import expand
from ..target import TargetSession
from ..trees.growth import Expansion, assemble
from ..trees.tree import DraftTree


class Oracle(Drafter):
    """The target as its own drafter. Deterministic trees only.

    Args:
        temperature: at which the text was sampled: confidences are the probabilities there; 0 for
            greedy, which is certain of the likeliest token.

    Raises:
        ValueError: for a negative temperature.
    """

    def __init__(self, temperature: float = 0.0) -> None:
        self.temperature = temperature
        check_numbers(self, {"temperature": NOT_NEGATIVE})

    def __repr__(self) -> str:
        return f"Oracle(temperature={self.temperature!r})"

    @classmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> OracleSession:
        (oracle,) = drafters
        return OracleSession(oracle, target)


class OracleSession(DrafterSession):
    """The target reading along, with a cache of its own.

    Args:
        oracle: whose trees it grows.
        target: any that decoding takes.
    """

    def __init__(self, oracle: Oracle, target: PreTrainedModel) -> None:
        self._model, self._head = target, _AtTemperature(oracle.temperature)
        self._reading: TargetSession | None = None  # since it was first asked
        # Tokens that are not in the cache; the last one read is among them: it was a root.
        self._unread: list[torch.Tensor] = []

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        self._unread.append(tokens.cpu())

    def forget(self, count: int) -> bool:
        """Never: records only grow."""
        return False

    @torch.no_grad()
    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        growth = _Growth(*self._read(), self._head, request)
        levels = request.shape.grow(growth, growth.at_root, request.max_depth, request.go_on)
        return {0: request.shape.prune(assemble(levels, 0, request.root))}

    def _read(self) -> tuple[TargetSession, torch.Tensor]:
        """Read what was heard: the target at the text's end, and the last token's logits there."""
        text = torch.cat(self._unread)
        if self._reading is None:
            cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
            self._reading = TargetSession(
                self._model, text[None], GenerationConfig(), {CACHE: cache}
            )
            self._reading.prefill()
            text = text[-1:]
        logits, _ = self._reading.verify(_tree(text, torch.arange(len(text)) - 1))
        self._reading.keep(list(range(len(text) - 1)))
        self._unread = [text[-1:]]
        return self._reading, logits[-1:]


class _Growth:
    """Growing one tree (`growth.Drafting`); what is predicted at a node are its children's logits.

    The target runs trees, so each level is one pass over all nodes there are so far.

    Args:
        target: with the whole text before the root in its cache.
        at_root: (1, vocabulary): the root's logits.
        head: makes distributions of logits.
        request: what is wanted.
    """

    def __init__(
        self,
        target: TargetSession,
        at_root: torch.Tensor,
        head: _AtTemperature,
        request: DraftRequest,
    ) -> None:
        self.at_root = at_root[None]
        self._target, self._head, self._request = target, head, request
        self._tokens = request.root.cpu()  # of all nodes that were run, the root first
        self._parents = [-1]

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        return expand(self._head, hidden, k, with_entropy=self._request.with_entropy)

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        # Slot i is node i + 1; of those that a node may read, the last but itself is its parent.
        for row in visible[0].tolist():
            slots = [slot for slot, seen in enumerate(row) if seen]
            self._parents.append(slots[-2] + 1 if len(slots) > 1 else 0)
        self._tokens = torch.cat([self._tokens, tokens[0].cpu()])
        logits, _ = self._target.verify(_tree(self._tokens, torch.tensor(self._parents)))
        self._target.keep([])
        return logits[None, -tokens.shape[1] :]


def _tree(tokens: torch.Tensor, parents: torch.Tensor) -> DraftTree:
    """A tree to be run, of nodes (n,) in any order that has parents before children."""
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    known = torch.ones(1, len(tokens))
    return DraftTree(tokens, parents, torch.tensor(depths), known, known)


class _AtTemperature:
    """What stands for a draft head (`heads.expand`) where logits are known already.

    Args:
        temperature: of the distributions; at 0 all is the likeliest token's, of several the first.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, n, vocabulary), as logits."""
        if self._temperature:
            return logits.float() / self._temperature
        certain = torch.full_like(logits, -torch.inf)
        return certain.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)

    def token_ids(self, scored: torch.Tensor) -> torch.Tensor:
        """All tokens are scored, in their order."""
        return scored
