from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch

from taps_hf.target import LAST
from taps_hf.training.features import FeatureStore, features_of, fill_store, known_features

from ..tiny import FAMILIES, prompt, tiny_target

WIDTH = 32
ROWS = [tuple(prompt(length, seed=length)[0].tolist()) for length in (5, 9, 3, 7)]


def store_in(folder) -> FeatureStore:
    return FeatureStore(folder, "tiny", WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_the_head_reads(family):
    target = tiny_target(family)
    ids = torch.tensor([ROWS[1]])
    features = features_of(target, ids)
    expected = target(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, expected)


def test_a_filled_store_gives_each_row_its_own_features(tmp_path):
    target = tiny_target()
    store = store_in(tmp_path)
    fill_store(store, target, [*ROWS, ROWS[0]], batch_tokens=16)
    assert (len(store), store.num_tokens) == (4, 24)
    for reopened in (store, store_in(tmp_path)):
        for ids in ROWS:
            expected = features_of(target, torch.tensor([ids]))[0].bfloat16()
            torch.testing.assert_close(reopened.read(ids), expected, rtol=2e-2, atol=2e-2)
    assert (*ROWS[0], 1) not in store
    with pytest.raises(KeyError):
        store.read((1, 2))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_states_of_several_layers_lie_side_by_side(family):
    target = tiny_target(family)
    ids = torch.tensor([ROWS[1], ROWS[1]])
    states = target(ids, output_hidden_states=True).hidden_states
    found = features_of(target, ids, layers=(0, LAST))
    torch.testing.assert_close(found, torch.cat([states[1], states[-1]], dim=2))
    found = features_of(target, ids, layers=(LAST, 0))
    torch.testing.assert_close(found, torch.cat([states[-1], states[1]], dim=2))
    assert not target.base_model._forward_hooks
    with pytest.raises(ValueError, match=r"read the target's layers \[7\], expected 0 to"):
        features_of(target, ids, layers=(7,))


def test_a_store_of_several_layers_gives_those_that_are_asked_for(tmp_path):
    target = tiny_target()
    store = FeatureStore(tmp_path, "tiny", WIDTH, (1, LAST))
    fill_store(store, target, ROWS)
    fewer = store_in(tmp_path)  # of the last states, which it has too
    assert fewer.layers == store.layers == (1, LAST)
    for ids in ROWS:
        both = features_of(target, torch.tensor([ids]), layers=(1, LAST))[0].bfloat16()
        torch.testing.assert_close(fewer.read(ids), both, rtol=2e-2, atol=2e-2)
        assert fewer.read(ids, (LAST,)).equal(fewer.read(ids)[:, WIDTH:])
        assert fewer.read(ids, (LAST, 1)).equal(fewer.read(ids).roll(WIDTH, dims=1))
        assert known_features(target, [fewer], ids).equal(fewer.read(ids, (LAST,)))
    new = tuple(range(3))
    del store
    gc.collect()
    fill_store(fewer, target, [new])  # goes on with what it holds
    assert fewer.read(new).shape == (3, 2 * WIDTH)
    with pytest.raises(ValueError, match=r"layers \[1, -1\], expected .* layers \[0, -1\]"):
        FeatureStore(tmp_path, "tiny", WIDTH, (0, LAST))


def test_stores_of_earlier_versions_hold_the_last_states(tmp_path):
    store = store_in(tmp_path)
    fill_store(store, tiny_target(), ROWS[:2])
    meta = tmp_path / "meta.json"
    fields = json.loads(meta.read_text())
    assert fields.pop("layers") == [LAST]
    meta.write_text(json.dumps(fields))
    again = store_in(tmp_path)
    assert again.layers == (LAST,)
    assert again.read(ROWS[0]).equal(store.read(ROWS[0]))


def test_filling_goes_on_where_it_was(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    fill_store(store, tiny_target(), ROWS[:2])
    passes = []

    def noted(target, ids, **kwargs):
        passes.append(ids.shape)
        return features_of(target, ids, **kwargs)

    monkeypatch.setattr("taps_hf.training.features.features_of", noted)
    fill_store(store, tiny_target(), ROWS)
    assert passes == [(2, 7)]


def test_half_written_rows_are_overwritten(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    fill_store(store_in(whole), tiny_target(), ROWS[:1])
    shutil.copytree(whole, torn)
    for name, junk in [("features", 100), ("tokens", 6), ("lengths", 3)]:
        with (torn / f"{name}.bin").open("ab") as file:
            file.write(b"\7" * junk)
    for folder in (whole, torn):
        fill_store(store_in(folder), tiny_target(), ROWS)
    for name in ("features", "tokens", "lengths"):
        assert (whole / f"{name}.bin").read_bytes() == (torn / f"{name}.bin").read_bytes()


def test_two_writers_do_not_mix(tmp_path):
    one, two = store_in(tmp_path), store_in(tmp_path)
    fill_store(one, tiny_target(), ROWS[:1])
    with pytest.raises(ValueError, match="held by another process"):
        fill_store(two, tiny_target(), ROWS)
    del one
    gc.collect()
    fill_store(two, tiny_target(), ROWS)  # and knows what the first has written
    assert len(two) == len(store_in(tmp_path)) == 4


def test_misfits_are_refused(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    with pytest.raises(ValueError, match="holds features of"):
        FeatureStore(tmp_path, "other", WIDTH)
    with pytest.raises(ValueError, match=r"shape \(2, 32\) were given, expected \(3, 32\)"):
        store.append([((1, 2, 3), torch.zeros(2, WIDTH))])
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(ValueError, match="room for"):
        fill_store(store, tiny_target(), ROWS)
    assert len(store) == 0


def test_other_folders_are_left_as_they_are(tmp_path):
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "features.bin").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        store_in(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features.bin", "lock"]
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("name", ["features", "tokens"])
def test_a_store_that_was_cut_short_is_refused(tmp_path, name):
    fill_store(store_in(tmp_path), tiny_target(), ROWS)
    file = tmp_path / f"{name}.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}\.bin has \d+ bytes, expected \d+ at least"):
        store_in(tmp_path)
