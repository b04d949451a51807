"""Muon for a drafter's matrices and AdamW for its vectors, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..checks import is_fast_in_bfloat16

_HEAD = "lm_head.weight"


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices between hidden states, `torch.optim.AdamW` for all others.

    The others are vectors, and an LM head: its rows belong to tokens, most of them rare, and are no
    directions that should all learn alike.

    Muon makes the momentum of a matrix orthogonal before it is added, so that all its directions
    learn alike (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon). Its steps are scaled
    to the size of AdamW's (arXiv 2502.16982, section 2.2), so one learning rate serves both.

    Args:
        parameters: of the drafter, with their names.
        lr: learning rate.
        weight_decay: decoupled, of Muon's matrices.
        beta2: of AdamW.

    Raises:
        ValueError: for a torch without Muon.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
    ) -> None:
        check_muon()
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        matrices = [p for name, p in trained if p.ndim == 2 and not name.endswith(_HEAD)]
        others = [p for name, p in trained if p.ndim != 2 or name.endswith(_HEAD)]
        self.parts = (
            _muon_for(matrices)(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, beta2), weight_decay=0.0),
        )
        super().__init__(self._groups(), {})
        # The groups of both are the ones a learning rate schedule changes here.
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put both into the states of [`state_dict`]."""
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def _muon_for(matrices: Sequence[nn.Parameter]) -> type[torch.optim.Muon]:
    """Torch's, or where its products in bfloat16 would be slow the one that does without."""
    fast = all(is_fast_in_bfloat16(matrix.device) for matrix in matrices)
    return torch.optim.Muon if fast else _float32_muon()


def _float32_muon() -> type[torch.optim.Muon]:
    # Made here, as an older torch has none to derive it from.
    class Float32Muon(torch.optim.Muon):
        """`torch.optim.Muon`, scaled as `match_rms_adamw`, in float32 instead of bfloat16."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                lr, momentum = group["lr"], group["momentum"]
                parameters: list[torch.Tensor] = []
                gradients: list[torch.Tensor] = []
                momenta: list[torch.Tensor] = []
                self._init_group(group, parameters, gradients, momenta)
                for parameter, gradient, mean in zip(parameters, gradients, momenta):
                    mean.lerp_(gradient, 1 - momentum)
                    update = gradient.lerp(mean, momentum) if group["nesterov"] else mean
                    update = _orthogonal(
                        update, group["ns_coefficients"], group["ns_steps"], group["eps"]
                    )
                    parameter.mul_(1 - lr * group["weight_decay"])
                    parameter.add_(update, alpha=-0.2 * lr * max(parameter.shape) ** 0.5)
            return loss

    return Float32Muon


def _orthogonal(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The matrix with singular values near 1: Newton and Schulz's iteration, quintic as Muon's."""
    a, b, c = coefficients
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x


def check_muon() -> None:
    """Raises a ValueError if this torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"torch {torch.__version__} has no Muon; expected 2.9 or newer, or `optimizer` adamw."
        )
