"""Values of requests for each of their tokens, against a loop."""

from __future__ import annotations

import torch

from taps_hf.serving.sampling import expand_batch_to_tokens


def test_values_are_repeated_and_keep_their_dtype():
    counts = [2, 0, 3, 1]
    for x in (torch.tensor([0.7, 0.5, 0.0, 1.5]), torch.tensor([7, 5, 0, 15], dtype=torch.int32)):
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = expand_batch_to_tokens(x, ends, sum(counts), replace_from=0, replace_to=1)
        expected = [value or 1 for value, n in zip(x.tolist(), counts) for _ in range(n)]
        assert found.tolist() == expected
        assert found.dtype == x.dtype
