"""The objective of EAGLE-3: foresee what the target says, however deep the draft, and nothing else.

The training-time test of arXiv 2503.01840, section 3.2: the drafter drafts several tokens deep and
is told at each depth what the target's distribution is. Its states need resemble nothing, so
gradients flow through those it hands from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from ...drafters.modeling_eagle3 import Eagle3Drafter
from .base import DraftObjective, FrozenTarget, ObjectiveOptions, register_objective

_ROWS = 4096  # slots of which the target's whole distributions are held at a time


@register_objective("eagle3")
class Eagle3(DraftObjective):
    """Cross-entropy against the target's distribution over the drafter's tokens, 7 tokens deep.

    As in the authors' code the target's distribution is that over the tokens that the drafter
    scores, renormalised, and slots at which the target's likeliest token is none of these are not
    counted; step j weighs 0.8^(j - 1). (There the steps are summed, here their weighted mean is
    taken, so that gradients are clipped alike whatever their number; and only chains that begin
    within an answer count, as decoding begins none before it.)
    """

    title = "EAGLE-3"
    backbone = "eagle3"
    drafter_class = Eagle3Drafter
    starts = ("random", "target_head")
    cuts_gradients = False
    drafter_options = ("layer_ids",)
    published: ClassVar[Mapping[str, float | int]] = {
        "steps": 7,
        "decay": 0.8,
        "regression_weight": 0.0,
        "token_weight": 1.0,
        "noise": 0.0,
    }

    def __init__(
        self,
        drafter: Eagle3Drafter,
        frozen: FrozenTarget,
        options: ObjectiveOptions,
        evaluation_depth: int = 5,
    ) -> None:
        super().__init__(drafter, frozen, options, evaluation_depth)
        # What the states that the projection reads are divided by, while it is trained.
        self.register_buffer("input_sizes", torch.ones(drafter.feature_size, device=drafter.device))

    @torch.no_grad()
    def divide_inputs(self, sizes: torch.Tensor) -> None:
        """Train the projection on states divided by these sizes, (layers x hidden,).

        It computes what it did, as its weights are multiplied by them until [`finish`], but a step
        of an optimiser now changes what it makes of every dimension alike. Of a target's states a
        few dimensions are hundreds of times larger than all others, and late layers many times
        larger than early ones: there the same step would be as many times too long.
        """
        self.finish()
        self.input_sizes.copy_(sizes)
        self.drafter.fc.weight.mul_(self.input_sizes)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        return self.drafter.fuse(states / self.input_sizes.to(states.dtype))

    @torch.no_grad()
    def finish(self) -> None:
        self.drafter.fc.weight.div_(self.input_sizes)
        self.input_sizes.fill_(1.0)

    @classmethod
    def options_with(cls, **changes: float | int) -> ObjectiveOptions:
        options = super().options_with(**changes)
        for name in ("regression_weight", "top_k_weight"):
            if value := getattr(options, name):
                raise ValueError(
                    f"`{name}` is {value}, expected 0 for the objective 'eagle3', which has no "
                    "loss but the cross-entropy."
                )
        return options

    def scores(self, predicted: torch.Tensor) -> torch.Tensor:
        return self.drafter.scores(predicted)

    def losses(
        self, wanted: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
        with torch.no_grad(), torch.autocast(wanted.device.type, enabled=False):
            parts = zip(*map(self._taught, wanted.split(_ROWS)))
            probabilities, known = (torch.cat(part) for part in parts)

        def of(predicted: torch.Tensor, counted: torch.Tensor) -> dict[str, torch.Tensor]:
            each = cross_entropy(self.scores(predicted), probabilities)
            return {"token": (each * (counted & known)).sum()}

        return of

    def _taught(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's distributions over the drafter's tokens, and whether they hold its choice.

        Returns:
            (n, scored tokens) float32, each row summing to 1, and (n,) bool.
        """
        logits = self.frozen.all_scores(wanted)
        if (ids := self.drafter.draft_token_ids) is None:
            return logits.softmax(dim=1, dtype=torch.float32), logits.new_ones(len(logits)).bool()
        few = logits[:, ids]
        known = few.amax(dim=1) == logits.amax(dim=1)
        return few.softmax(dim=1, dtype=torch.float32), known


def cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """(n,) float32: -sum q log softmax(logits), of each row, for rows q that sum to 1.

    Written out because these are a step's largest tensors: of logits in half precision nothing
    wider is kept for the gradient, (softmax(logits) - q), and few passes are made over either.

    Args:
        logits: (n, tokens), of any dtype; differentiated.
        probabilities: (n, tokens) float32; not differentiated.
    """
    return _CrossEntropy.apply(logits, probabilities)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(dim=1, dtype=torch.float32)
        normaliser = logits[:, :1].float() - log_p[:, :1]
        ctx.save_for_backward(logits, probabilities, normaliser)
        return -log_p.mul_(probabilities).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, probabilities, normaliser = ctx.saved_tensors
        difference = torch.sub(logits, normaliser).exp_().sub_(probabilities)
        return difference.mul_(gradient[:, None]).to(logits.dtype), None
