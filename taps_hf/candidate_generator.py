"""The seam to transformers' assisted generation: drafters and a strategy as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .drafters.modeling_eagle import EagleDrafter
from .drafters.session import DrafterSession
from .drafters.stacking import groups_of
from .measuring import learnt_costs
from .strategies import Choice, CycleOutcome, GenerationContext, Strategy
from .strategies.checks import check_asked, check_choice
from .trees.shapes import TreeShape
from .trees.tree import DraftTree, move


class TreeCandidateGenerator(CandidateGenerator):
    """Proposes draft trees for one generation.

    The decoding loop of this package calls [`observe`], [`propose`] and [`record`]. The same object
    also works in transformers' own assisted generation, which verifies single sequences:
    [`get_candidates`] then returns the tree's most confident path.

    Args:
        target: the model to be accelerated.
        drafters: at least one drafter that fits it.
        strategy: how their trees are composed.
        tree: the shape of each drafter's tree.
        max_length: no candidate may lie beyond this many tokens (for `get_candidates`).
        sample_temperature: None for deterministic trees; see [`DrafterSession`].
        with_entropy: whether trees carry draft entropies even if the strategy needs none.
    """

    requires_model_outputs = True
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_hidden_states": True}

    def __init__(
        self,
        target: PreTrainedModel,
        drafters: Sequence[EagleDrafter],
        strategy: Strategy,
        tree: TreeShape,
        max_length: int | None = None,
        sample_temperature: float | None = None,
        with_entropy: bool = False,
    ) -> None:
        self.shape = tree
        self.max_length = max_length
        self.history: list[CycleOutcome] = []
        self._num_drafters = len(drafters)
        self._vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self._sampled = sample_temperature is not None
        self.strategy = strategy.begin(
            GenerationContext(
                len(drafters), target.device, lambda: learnt_costs(target, drafters, tree)
            )
        )
        if not isinstance(self.strategy, Strategy):
            raise ValueError(
                f"{type(strategy).__name__}.begin returned a {type(self.strategy).__name__}, "
                "expected a taps_hf.Strategy."
            )
        self._sessions = [
            DrafterSession(
                [drafters[index] for index in group],
                target,
                group,
                len(drafters),
                sample_temperature,
                with_entropy or strategy.needs_entropy,
            )
            for group in groups_of(drafters)  # drafters of one shape run as one
        ]
        self._observed = 0

    def observe(self, tokens: torch.Tensor, features: torch.Tensor) -> None:
        """Tell the drafters what the target has computed.

        Args:
            tokens: (n,) int64: the tokens that follow the positions of `features`.
            features: (n, hidden): the target's last hidden states.
        """
        if len(tokens) == 0:
            return
        self._observed += len(tokens)
        for session in self._sessions:
            session.observe(tokens, features)

    def propose(self, root: torch.Tensor, max_depth: int) -> Choice:
        """The tree to verify in this cycle.

        Args:
            root: (1,) int64: the last emitted token.
            max_depth: no node may lie deeper; with 0 nothing is drafted.

        Returns:
            the strategy's choice, its tree on the CPU.

        Raises:
            ValueError: naming the strategy, if what it decided makes no sense.
        """
        if max_depth < 1 or not self._sessions[0].has_context:
            return Choice(DraftTree.root(root.cpu(), self._num_drafters), ())
        asked = check_asked(
            self.strategy,
            self.strategy.drafters_to_run(self._num_drafters, self.history),
            self._num_drafters,
        )
        grown: dict[int, DraftTree] = {}
        for session in self._sessions:
            wanted = [index for index in asked if index in session.indices]
            if wanted:
                session.ask(wanted)
                trees = self.shape.grow(
                    session, root.to(session.device), max_depth, self.strategy.go_on
                )
                # Trees are tiny, and the walk reads them on the host: they are composed there.
                grown |= dict(zip(session.asked, move(trees, torch.device("cpu"))))
        trees = {index: grown[index] for index in asked}
        if not trees:
            return Choice(DraftTree.root(root.cpu(), self._num_drafters), ())
        choice = self.strategy.compose(trees, self.history)
        check_choice(
            self.strategy, choice, int(root), self._num_drafters, self._vocab_size, self._sampled
        )
        deep = choice.tree.depths > max_depth  # a strategy's own proposals: it knows no limit
        if deep.any():
            choice = replace(choice, tree=choice.tree.select((~deep).nonzero().squeeze(1)))
        return choice

    def record(self, outcome: CycleOutcome) -> None:
        """Tell the strategy what became of its choice. Cycles without a draft are no history."""
        self.strategy.observe(outcome)
        if outcome.drafters:
            self.history.append(outcome)

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_outputs: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """One candidate sequence, for transformers' assisted generation.

        Args:
            input_ids: (1, length) int64.
            model_outputs: the target's outputs over the tokens since the last call, with
                `hidden_states`; None before the first pass.

        Returns:
            `input_ids` with the most confident path appended, and no logits.
        """
        if model_outputs is None:
            return input_ids, None
        new = input_ids.shape[1] - 1 - self._observed
        features = model_outputs.hidden_states[-1][0]
        # With an earlier turn's cache there are no features for what it covers.
        missing = max(0, new - len(features))
        self._observed += missing
        new -= missing
        self.observe(input_ids[0, -new:], features[:new])
        room = input_ids.shape[1] if self.max_length is None else self.max_length
        tree = self.propose(input_ids[0, -1:], room - input_ids.shape[1] - 1).tree
        value = tree.path_confidence.nan_to_num(nan=-1.0).amax(dim=0).tolist()
        parents, path = tree.parents.tolist(), []
        while children := [
            node for node, parent in enumerate(parents) if parent == (path or [0])[-1]
        ]:
            path.append(max(children, key=value.__getitem__))
        return torch.cat([input_ids, tree.tokens[path][None].to(input_ids.device)], dim=1), None

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Nothing to do: trees are shaped by confidence, not by the length accepted before."""
