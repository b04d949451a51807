"""A fault of vLLM 0.32.0 on CPUs, mended where our drafters are served.

To verify drafts of sampled requests vLLM repeats each request's temperature (and top-k and top-p)
for every draft token. On a CPU `utils/cpu_triton_utils._expand_kernel_impl` writes them into a
copy that has become integers, and what is used is memory that nobody has written. So with any
drafter at all, its own included, sampled texts are noise there. Greedy ones are not concerned.
"""

from __future__ import annotations

import torch


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
