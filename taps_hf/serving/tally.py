"""Whose tokens were drafted and accepted, counted where drafting runs."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from .counters import Counters

_PERIOD = 1.0  # seconds between copies of counts from a device that is not the CPU


class Tally:
    """Counts on the device, now and then copied to where they are asked for.

    Args:
        names: of the drafters.
        vllm_config: vLLM's.
        device: where drafting runs.
    """

    def __init__(self, names: tuple[str, ...], vllm_config: Any, device: torch.device) -> None:
        self._counts = torch.zeros(2, len(names), dtype=torch.int64, device=device)
        self._drafters = torch.arange(len(names), device=device)
        self._copied = 0.0
        self._shared: Counters | None = None
        if get_tensor_model_parallel_rank() == 0:  # all ranks of an engine draft the same
            engine = vllm_config.parallel_config.data_parallel_index
            self._shared = Counters(names, engine)

    def add(self, picks: torch.Tensor, drafted: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count drafts that were verified.

        Args:
            picks: (n, L) int64: whose each token was.
            drafted, accepted: (n,) integers: how many of the first of them were verified and
                accepted.
        """
        ours = picks[..., None] == self._drafters
        at = torch.arange(picks.shape[1], device=picks.device)
        for row, counted in enumerate((drafted, accepted)):
            self._counts[row] += (ours & (at < counted[:, None])[..., None]).sum(dim=(0, 1))
        now = time.monotonic()
        on_cpu = self._counts.device.type == "cpu"
        if self._shared is not None and (on_cpu or now - self._copied > _PERIOD):
            self._shared.counts[:] = self._counts.cpu().numpy()
            self._copied = now
