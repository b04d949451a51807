"""The seam to transformers' assisted generation: drafters and a strategy as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .compiled.settings import Compilation
from .drafters.base import Drafter, DraftRequest
from .drafters.ensemble import Ensemble, ensemble_for, free_among, lay_by, layers_read
from .measuring import learnt_costs
from .strategies import Choice, CycleOutcome, GenerationContext, Strategy
from .strategies.checks import check_asked, checked_choice
from .strategies.costs import LearntCosts
from .strategies.experience import experience_of
from .target import LAST
from .trees.shapes import TreeShape
from .trees.tree import DraftTree


class TreeCandidateGenerator(CandidateGenerator):
    """Proposes draft trees for one generation.

    The decoding loop of this package calls [`read_prompt`], and in every cycle [`propose`],
    [`observe`] and [`record`]. The same object also works in transformers' own assisted generation,
    which verifies single sequences: [`get_candidates`] then returns the tree's most confident path.

    Args:
        target: the model to be accelerated.
        drafters: at least one drafter that fits it.
        strategy: how their trees are composed.
        tree: the shape of each drafter's tree.
        max_length: no candidate may lie beyond this many tokens (for `get_candidates`).
        sample_temperature: None for deterministic trees; see [`DraftRequest`].
        with_entropy: whether trees carry draft entropies even if the strategy needs none.
        cache: the target's. Drafters that drafted when it was filled go on with what they know.
        costs: what the strategy is given as the costs here; by default they are measured when it
            asks.
        compilation: how passes are compiled; None if they are not.
    """

    requires_model_outputs = True
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_hidden_states": True}

    def __init__(
        self,
        target: PreTrainedModel,
        drafters: Sequence[Drafter],
        strategy: Strategy,
        tree: TreeShape,
        max_length: int | None = None,
        sample_temperature: float | None = None,
        with_entropy: bool = False,
        cache: Cache | None = None,
        costs: Callable[[], LearntCosts] | None = None,
        compilation: Compilation | None = None,
    ) -> None:
        self.shape = tree
        self.max_length = max_length
        self._everyone = tuple(range(len(drafters)))
        self._vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self._sample_temperature = sample_temperature
        self._with_entropy = with_entropy or strategy.needs_entropy
        measure = costs or (lambda: learnt_costs(target, drafters, tree, compilation=compilation))
        serials = tuple(drafter.serial_number for drafter in drafters)
        context = GenerationContext(
            len(drafters),
            target.device,
            measure,
            free=free_among(drafters),
            experience=lambda: experience_of(target, serials),
        )
        self.strategy = strategy.begin(context)
        if not isinstance(self.strategy, Strategy):
            raise ValueError(
                f"{type(strategy).__name__}.begin returned a {type(self.strategy).__name__}, "
                "expected a taps_hf.Strategy."
            )
        self._cache = cache
        if cache is None:
            self._ensemble = Ensemble(drafters, target)
        else:
            self._ensemble = ensemble_for(drafters, target, cache)
        self._observed = 0

    def read_prompt(
        self, earlier: torch.Tensor, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]
    ) -> None:
        """Tell the drafters what the generation begins with; see [`Ensemble.read_prompt`]."""
        self._ensemble.read_prompt(earlier, tokens, states)

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        """Tell the drafters what was emitted.

        Args:
            tokens: (n,) int64.
            states: by layer, (n, hidden): what the target computed at the positions before them.
        """
        self._ensemble.observe(tokens, states)

    def propose(self, root: torch.Tensor, max_depth: int) -> Choice:
        """The tree to verify in this cycle.

        Args:
            root: (1,) int64: the last emitted token; on the CPU it need not be read back.
            max_depth: no node may lie deeper; with 0 nothing is drafted.

        Returns:
            the strategy's choice, its tree on the CPU.

        Raises:
            ValueError: naming the strategy, if what it decided makes no sense.
        """
        count = len(self._everyone)
        root = root.cpu()
        nothing = Choice(DraftTree.root(root, count), ())
        if max_depth < 1:
            return nothing
        asked = check_asked(self.strategy, self.strategy.ask(self._everyone), count)
        request = DraftRequest(
            root,
            self.shape,
            max_depth,
            self.strategy.go_on,
            self._sample_temperature,
            self._with_entropy,
        )
        trees = self._ensemble.propose(asked, request)
        also = check_asked(self.strategy, self.strategy.ask_also(trees), count, asked)
        if also:
            trees |= self._ensemble.propose(also, request)
        if not trees:
            return nothing
        choice = self.strategy.compose(trees)
        sampled = self._sample_temperature is not None
        return checked_choice(
            self.strategy, choice, int(root), count, self._vocab_size, sampled, max_depth
        )

    def record(self, outcome: CycleOutcome) -> None:
        """Tell the strategy what became of its choice."""
        self.strategy.observe(outcome)

    def lay_by(self) -> None:
        """Keep what drafters know for a generation that goes on from the same cache.

        For the end of a generation; not of one that an exception ended.
        """
        self._ensemble.finish()
        if self._cache is not None:
            lay_by(self._ensemble, self._cache)

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
        new = input_ids[0, self._observed :]
        # Of the last token there are none yet, of those that were not accepted nobody wants any,
        # and of what an earlier turn's cache covers there are none.
        known = len(new) - (self._observed == 0)
        self._observed = input_ids.shape[1]
        hidden = model_outputs.hidden_states
        states = {
            layer: hidden[-1 if layer == LAST else layer + 1][0][:known]
            for layer in layers_read(self._ensemble.drafters)
        }
        self.observe(new, states)
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
