from __future__ import annotations

import copy
import json

import pytest
import torch

from taps_hf.training.conversations import DataReport, DataSource, read_mixture
from taps_hf.training.encoding import encode_rows
from taps_hf.training.features import FeatureStore, features_of
from taps_hf.training.regenerate import RegenerateOptions, answer_batch, regenerate

from ..tiny import FAMILIES, prompt, tiny_target
from .chat import CHATML, chat_tokenizer

PROMPTS = [prompt(length, seed=length)[0].tolist() for length in (3, 9, 5, 12, 4)]
END = {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family):
    target = tiny_target(family)
    found = answer_batch(target, PROMPTS, 15, END, keep_features=True)
    lengths = set()
    for ids, answer in zip(PROMPTS, found):
        ids_tensor = torch.tensor([ids])
        plain = target.generate(
            ids_tensor,
            attention_mask=torch.ones_like(ids_tensor),
            do_sample=False,
            max_new_tokens=15,
            eos_token_id=2,
            pad_token_id=0,
        )[0].tolist()
        assert [*ids, *answer.tokens] == plain
        lengths.add(len(answer.tokens))
        expected = features_of(target, torch.tensor([plain[:-1]]))[0]
        torch.testing.assert_close(answer.features.float(), expected, rtol=2e-2, atol=5e-2)
    assert family != "llama" or len(lengths) > 1  # rows did leave the batch


def test_sampled_answers_follow_the_targets_distribution():
    target, temperature, count = tiny_target(), 2.0, 4000
    with torch.no_grad():
        logits = target(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(0)
    generator = torch.Generator().manual_seed(0)
    found = answer_batch(target, [PROMPTS[0]] * count, 1, END, temperature, generator)
    drawn = torch.tensor([answer.tokens[0] for answer in found])
    frequency = torch.bincount(drawn, minlength=16) / count
    assert (frequency - expected).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.fixture
def questions(tmp_path) -> DataSource:
    rows = [{"instruction": f"t{5 + i % 9} t{5 + i % 7}", "output": "t5"} for i in range(9)]
    rows += [{"instruction": "t5 " * 40, "output": "t5"}, {"instruction": "t5"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(file))


def named_target():
    target = copy.copy(tiny_target())
    target.generation_config = copy.deepcopy(target.generation_config)
    target.generation_config.eos_token_id = [2]
    return target


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_run_goes_on_to_the_same_answers(questions, tmp_path, monkeypatch, temperature):
    options = RegenerateOptions(
        max_prompt_tokens=20, max_new_tokens=6, temperature=temperature, batch_size=2, chunk_size=4
    )
    tokenizer, target = chat_tokenizer(CHATML), named_target()
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    store = FeatureStore(tmp_path / "features", "tiny", 32)
    report = regenerate(target, tokenizer, [questions], whole, options, store)
    assert report.used == 9
    assert sum(report.problems.values()) == 2
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(*args, **kwargs)

    monkeypatch.setattr("taps_hf.training.regenerate.answer_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, tokenizer, [questions], stopped, options)
    with stopped.open("a") as file:
        file.write('{"messages": [{"half a li')
    assert regenerate(target, tokenizer, [questions], stopped, options).problems == report.problems
    assert stopped.read_text() == whole.read_text()
    before = len(calls)
    regenerate(target, tokenizer, [questions], stopped, options)
    assert len(calls) == before  # there was nothing left to do

    rows = [json.loads(line) for line in whole.open()]
    assert len(rows) == 9
    for row in rows:
        assert (row["finish_reason"] == "stop") == (row["input_ids"][-1] == 2)
        assert row["input_ids"][:-1] in store
    read = DataReport()
    examples = encode_rows(tokenizer, read_mixture([DataSource(str(whole))], read), 100, read, [2])
    assert len(examples) == read.used == 9

    with pytest.raises(ValueError, match="was begun with"):
        regenerate(target, tokenizer, [questions], whole, RegenerateOptions())
    (tmp_path / "whole.jsonl.state.json").unlink()
    with pytest.raises(ValueError, match="expected a new file"):
        regenerate(target, tokenizer, [questions], whole, options)


def test_what_others_wrote_is_never_cut_off(questions, tmp_path):
    options = RegenerateOptions(max_prompt_tokens=20, max_new_tokens=6, batch_size=4, chunk_size=4)
    tokenizer, target, out = chat_tokenizer(CHATML), named_target(), tmp_path / "answers.jsonl"
    state = tmp_path / "answers.jsonl.state.json"

    def refused(message: str) -> None:
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(ValueError, match=message):
            regenerate(target, tokenizer, [questions], out, options)
        assert before is None or out.read_bytes() == before

    out.write_text("my thesis")
    refused("expected a new file")
    out.unlink()
    regenerate(target, tokenizer, [questions], out, options)
    written = out.read_bytes()
    for tail in (b'{"messages": [], "index": 0}\n', b"a line of mine", b"[1]\n"):
        out.write_bytes(written + tail)
        refused("something after byte")
    out.write_bytes(written.replace(b"user", b"USER", 1))
    refused("is not as it was left")
    out.write_bytes(written[:-1])
    refused("is not as it was left")
    out.unlink()
    refused("is not as it was left")
    out.mkdir()
    refused("is a folder")
    out.rmdir()
    for content in ("{}", "half {", "[1]"):
        state.write_text(content)
        refused("state of answers.jsonl")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"temperature": -1.0}])
def test_bad_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
        RegenerateOptions(**wrong)
