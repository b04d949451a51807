"""How vLLM 0.32.0 samples where our drafters are served: a fault on CPUs mended, and time saved.

To verify drafts of sampled requests vLLM repeats each request's temperature (and top-k and top-p)
for every draft token. On a CPU `utils/cpu_triton_utils._expand_kernel_impl` writes them into a
copy that has become integers, and what is used is memory that nobody has written. So with any
drafter at all, its own included, sampled texts are noise there. Greedy ones are not concerned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """As vLLM's function of this name says that it does.

    Args:
        x: (requests,).
        cu_num_tokens: (requests,) integers: tokens of a request and of those before it.
        num_tokens: of all.
        replace_from, replace_to: a value of `x`, and what it becomes.

    Returns:
        (num_tokens,), of the dtype of `x`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


def mend() -> None:
    """Have vLLM's rejection sampler use it, in this process."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


class PlainWithoutDrafts(nn.Module):
    """vLLM's rejection sampler; where nothing has been drafted its plain sampler, alone.

    That samples the same; the other copies logits and asks for distributions of no tokens.

    Args:
        whole: vLLM's own.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self,
        metadata: Any,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: Any,
    ) -> Any:
        """As vLLM's."""
        if metadata.max_spec_len:
            return self.whole(metadata, draft_probs, logits, sampling_metadata)
        return self.whole.sampler(
            logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True
        )
