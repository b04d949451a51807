from __future__ import annotations

import gc
import shutil

import pytest
import torch

from taps_hf.training.features import FeatureStore, features_of, fill_store

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
