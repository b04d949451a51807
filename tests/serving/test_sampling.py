"""Values of requests for each of their tokens, against a loop; and sampling without drafts."""

from __future__ import annotations

from typing import Any

import torch

from taps_hf.serving.sampling import PlainWithoutDrafts, expand_batch_to_tokens


def test_values_are_repeated_and_keep_their_dtype():
    counts = [2, 0, 3, 1]
    for x in (torch.tensor([0.7, 0.5, 0.0, 1.5]), torch.tensor([7, 5, 0, 15], dtype=torch.int32)):
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = expand_batch_to_tokens(x, ends, sum(counts), replace_from=0, replace_to=1)
        expected = [value or 1 for value, n in zip(x.tolist(), counts) for _ in range(n)]
        assert found.tolist() == expected
        assert found.dtype == x.dtype


def test_who_samples_is_who_has_to():
    """The rejection sampler where anything was drafted, the plain one where nothing was."""

    class Whole(torch.nn.Module):
        def forward(self, *args: Any) -> tuple[Any, ...]:
            return ("rejection", *args)

        @staticmethod
        def sampler(**given: Any) -> dict[str, Any]:
            return given

    class Metadata:
        max_spec_len = 1

    sampler = PlainWithoutDrafts(Whole())
    given = (Metadata, None, "logits", "asked")
    assert sampler(*given) == ("rejection", *given)
    Metadata.max_spec_len = 0
    plain = {"logits": "logits", "sampling_metadata": "asked", "predict_bonus_token": True}
    assert sampler(*given) == plain
