from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from taps_hf.training.encoding import Example
from taps_hf.training.features import FeatureStore, features_of, fill_store
from taps_hf.training.steps import IGNORED
from taps_hf.training.trainer import (
    ExampleDataset,
    LengthSampler,
    collate,
    coverage,
    frequent_tokens,
    measures_of,
)

from ..tiny import tiny_target


def example(ids, start) -> Example:
    return Example(tuple(ids), tuple(i >= start for i in range(len(ids))))


EXAMPLES = [example([3, 4, 5, 6], 2), example([3, 7, 7, 7, 8, 2], 1), example([9, 5, 2], 0)]


def test_batches_are_padded_and_carry_features(tmp_path):
    target = tiny_target()
    stores = [FeatureStore(tmp_path / name, "tiny", 32) for name in "ab"]
    rows = [x.input_ids[:-1] for x in EXAMPLES]
    fill_store(stores[0], target, rows[:1])
    fill_store(stores[1], target, rows[1:])
    dataset = ExampleDataset(EXAMPLES, stores)
    batch = collate([dataset[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [
        [3, 4, 5, 6, 0, 0],
        [3, 7, 7, 7, 8, 2],
        [9, 5, 2, 0, 0, 0],
    ]
    none = IGNORED
    assert batch["labels"].tolist() == [
        [none, none, 5, 6, none, none],
        [none, none, 7, 7, 8, 2],
        [none, none, 2, none, none, none],
    ]
    # Laid flat, without the first two tokens of each row.
    assert batch["slots"].tolist() == [0, 1, 4, 5, 6, 7, 8]
    for row, ids in zip(batch["features"], rows):
        expected = features_of(target, torch.tensor([ids]))[0].bfloat16()
        torch.testing.assert_close(row[: len(ids)], expected, rtol=2e-2, atol=2e-2)
        assert not row[len(ids) :].any()
    assert set(ExampleDataset(EXAMPLES)[0]) == {"input_ids", "labels"}


def test_every_example_once_an_epoch_near_others_of_its_length():
    lengths = [(i * 37) % 200 for i in range(90)]
    sampler = LengthSampler(lengths, group=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(90))
    assert orders[0] == orders[2] != orders[1]
    assert list(LengthSampler(lengths, group=8, seed=2)) != orders[0]
    groups = [orders[0][i : i + 8] for i in range(0, 90, 8)]
    spreads = [max(lengths[i] for i in g) - min(lengths[i] for i in g) for g in groups]
    assert max(spreads) < 60


def test_measures_are_means_over_all_chains():
    # Of two rows at two depths: chains that could go on, and did.
    counts = np.array([[[10.0, 6.0], [5.0, 3.0]], [[30.0, 10.0], [3.0, 1.0]]])
    found = measures_of(EvalPrediction(counts, counts))
    assert found == {
        "top_1": 16 / 40,
        "deep_acceptance": 4 / 8,
        "accepted_length": 20 / 40,
        "chains": 40,
    }


def test_draft_vocabularies_hold_the_most_frequent_answers():
    # Answer tokens: 5, 6 | 7, 7, 7, 8, 2 | 9, 5, 2
    assert frequent_tokens(EXAMPLES, 3, 16).tolist() == [7, 2, 5]
    assert frequent_tokens(EXAMPLES, 8, 16).tolist() == [7, 2, 5, 6, 8, 9, 0, 1]
    assert coverage(EXAMPLES, torch.tensor([7, 2])) == 5 / 10
    for size in (0, 17):
        with pytest.raises(ValueError, match=f"`draft_vocab` is {size}"):
            frequent_tokens(EXAMPLES, size, 16)
