from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taps_hf.evaluation.benchmarks import Question
from taps_hf.evaluation.records import (
    RecordOptions,
    RecordStore,
    generate_seeded,
    record,
    seed_of,
    states_of,
)
from taps_hf.target import LAST
from taps_hf.training.features import features_of

from ..tiny import tiny_target
from ..training.chat import CHATML, chat_tokenizer

QUESTIONS = [
    Question("a", "1", ("t5 t6", "t7")),
    Question("a", "2", ("t5 t8 t9 t10",)),
    Question("b", "1", ("t5", "t6", "t7")),
]


def tokenizer():
    return chat_tokenizer(CHATML)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_record_is_what_the_target_says_turn_after_turn(tmp_path, temperature, batch_size):
    target = tiny_target()
    options = RecordOptions(temperature, max_new_tokens=7, batch_size=batch_size)
    store = RecordStore(tmp_path, {})
    files = record(target, tokenizer(), QUESTIONS, options, store)
    found = {kept.key.rpartition("-")[0]: kept for kept in map(store.load, files)}
    assert len(found) == 6
    for question in QUESTIONS:
        said = []
        for turn, text in enumerate(question.turns):
            said.append({"role": "user", "content": text})
            prompt = tokenizer().apply_chat_template(
                said, add_generation_prompt=True, return_dict=False
            )
            kept = found[f"{question.benchmark}/{question.question_id}/{turn}/t{temperature:g}"]
            assert kept.tokens[: kept.answer_start].tolist() == prompt
            assert kept.max_length == len(prompt) + 7
            answer = kept.tokens[kept.answer_start :]
            if batch_size == 1 or not temperature:
                seed = seed_of(0, question.benchmark, question.question_id, turn)
                plain = generate_seeded(target, prompt, options, seed)[0]
                assert kept.tokens.tolist() == plain.tolist()
            expected = features_of(target, kept.tokens[None, :-1])[0]
            torch.testing.assert_close(kept.features, expected, rtol=2e-2, atol=2e-2)
            logits = target(kept.tokens[None, :-1]).logits[0, kept.answer_start - 1 :]
            entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
            torch.testing.assert_close(kept.entropies, entropy, rtol=2e-2, atol=2e-2)
            text = tokenizer().decode(answer, skip_special_tokens=True)
            said.append({"role": "assistant", "content": text})


def test_a_stopped_recording_goes_on(tmp_path, monkeypatch):
    target, options = tiny_target(), RecordOptions(max_new_tokens=5)
    whole = RecordStore(tmp_path / "whole", {"x": 1})
    expected = record(target, tokenizer(), QUESTIONS, options, whole)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate_seeded(*args, **kwargs)

    monkeypatch.setattr("taps_hf.evaluation.records.generate_seeded", counted)
    store = RecordStore(tmp_path / "stopped", {"x": 1})
    with pytest.raises(KeyboardInterrupt):
        record(target, tokenizer(), QUESTIONS, options, store)
    files = record(target, tokenizer(), QUESTIONS, options, store)
    assert len(calls) == 3 + 4
    assert [file.name for file in files] == [file.name for file in expected]
    for a, b in zip(files, expected):
        assert a.read_bytes() == b.read_bytes()
    with pytest.raises(ValueError, match="was recorded with"):
        RecordStore(tmp_path / "stopped", {"x": 2})


def test_features_can_be_kept_in_half_the_room(tmp_path):
    options = RecordOptions(max_new_tokens=5, feature_dtype=torch.bfloat16)
    store = RecordStore(tmp_path, {})
    (file,) = record(tiny_target(), tokenizer(), QUESTIONS[1:2], options, store)
    assert store.load(file).features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_bad_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
        RecordOptions(**wrong)


def test_layers_that_drafters_read_are_kept_and_computed_once(tmp_path, monkeypatch):
    target, options = tiny_target(), RecordOptions(max_new_tokens=5)
    store = RecordStore(tmp_path, {})
    files = record(target, tokenizer(), QUESTIONS, options, store)  # as earlier versions wrote them
    before = [store.load(file) for file in files]
    assert all(not kept.states for kept in before)
    passes = []

    def counted(kept, target, layers):
        passes.append(tuple(layers))
        return states_of(kept, target, layers)

    monkeypatch.setattr("taps_hf.evaluation.records.states_of", counted)
    for layers in [(0, -1), (0, 1), (1, 0, -1)]:
        assert record(target, tokenizer(), QUESTIONS, options, store, layers) == files
    assert passes == [(0,)] * len(files) + [(1,)] * len(files)
    assert {file.name for file in tmp_path.iterdir()} == {*(f.name for f in files), "settings.json"}
    for old, kept in zip(before, map(store.load, files)):
        assert kept.key == old.key
        assert torch.equal(kept.features, old.features)
        assert torch.equal(kept.entropies, old.entropies)
        expected = features_of(target, kept.tokens[None, :-1], layers=(0, 1))[0]
        found = torch.cat([kept.states[0], kept.states[1]], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_states_that_are_kept_are_not_computed(tmp_path):
    target, options = tiny_target(), RecordOptions(max_new_tokens=5)
    store = RecordStore(tmp_path, {})
    (file,) = record(target, tokenizer(), QUESTIONS[1:2], options, store, (1,))
    kept = store.load(file)
    marked = replace(kept, states={1: torch.full_like(kept.states[1], 7.0)})
    assert states_of(marked, None, (LAST, 1)).keys() == {LAST, 1}
    assert states_of(marked, None, (1,))[1].eq(7).all()
    found = states_of(marked, target, (0, 1))
    assert found.keys() == {LAST, 0, 1}
    assert found[1].eq(7).all()
    assert found[0].shape == kept.features.shape


def test_a_torn_completion_leaves_the_record_as_it_was(tmp_path, monkeypatch):
    target, options = tiny_target(), RecordOptions(max_new_tokens=5)
    store = RecordStore(tmp_path, {})
    (file,) = record(target, tokenizer(), QUESTIONS[1:2], options, store)
    before = file.read_bytes()

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("taps_hf.evaluation.records.save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        store.complete(file, target, (0,))
    assert file.read_bytes() == before
