from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from taps_hf.cli import main
from taps_hf.target import LAST
from taps_hf.training.conversations import DataReport, DataSource, SourceRow, read_mixture
from taps_hf.training.encoding import encode_rows
from taps_hf.training.features import FeatureStore, features_of
from taps_hf.training.regenerate import RegenerateOptions, answer_batch, regenerate

from ..tiny import FAMILIES, prompt, tiny_target
from .chat import CHATML, chat_tokenizer

PROMPTS = [prompt(length, seed=length)[0].tolist() for length in (3, 9, 5, 12, 4)]
END = {2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(LAST,), (0,), (1, LAST)])
def test_greedy_answers_are_those_of_generate(family, layers):
    target = tiny_target(family)
    found = answer_batch(target, PROMPTS, 15, END, layers=layers)
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
        expected = features_of(target, torch.tensor([plain[:-1]]), layers=layers)[0]
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


def rows_of(source: DataSource) -> list[SourceRow]:
    return read_mixture([source], DataReport())


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
    report = regenerate(target, tokenizer, rows_of(questions), whole, options, store)
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
        regenerate(target, tokenizer, rows_of(questions), stopped, options)
    with stopped.open("a") as file:
        file.write('{"messages": [{"half a li')
    assert (
        regenerate(target, tokenizer, rows_of(questions), stopped, options).problems
        == report.problems
    )
    assert stopped.read_text() == whole.read_text()
    before = len(calls)
    regenerate(target, tokenizer, rows_of(questions), stopped, options)
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
        regenerate(target, tokenizer, rows_of(questions), whole, RegenerateOptions())
    (tmp_path / "whole.jsonl.state.json").unlink()
    with pytest.raises(ValueError, match="expected a new file"):
        regenerate(target, tokenizer, rows_of(questions), whole, options)


@pytest.mark.parametrize("done", [0, 4])
def test_runs_that_earlier_versions_began_go_on(questions, tmp_path, done):
    """They noted no digest, and the state before there was a file."""
    options = RegenerateOptions(max_prompt_tokens=20, max_new_tokens=6, batch_size=4, chunk_size=4)
    given = (named_target(), chat_tokenizer(CHATML), rows_of(questions))
    out, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    regenerate(*given, whole, options)
    lines = whole.read_bytes().splitlines(keepends=True)
    first = sum(json.loads(line)["index"] < done for line in lines)  # other rows were left out
    state = json.loads((tmp_path / "whole.jsonl.state.json").read_text())
    state |= {"done": done, "bytes": sum(map(len, lines[:first]))}
    del state["sha256"]
    (tmp_path / "answers.jsonl.state.json").write_text(json.dumps(state))
    if done:
        out.write_bytes(b"".join(lines[: first + 1])[:-5])
        half = out.read_bytes()
        out.write_bytes(half[: state["bytes"] - 1])
        with pytest.raises(ValueError, match="is not as it was left"):
            regenerate(*given, out, options)
        out.write_bytes(half)
    regenerate(*given, out, options)
    assert out.read_bytes() == whole.read_bytes()
    assert "sha256" in json.loads((tmp_path / "answers.jsonl.state.json").read_text())


def test_the_command_keeps_the_states_that_eagle3_reads(questions, tmp_path, capsys):
    target = tmp_path / "target"
    tiny_target().save_pretrained(target)
    chat_tokenizer(CHATML).save_pretrained(target)
    given = ["regenerate", "--device", "cpu", "--target", str(target), "--data", questions.name]
    given += ["--max-new-tokens", "3", "--out", str(tmp_path / "answers.jsonl"), "--layer-ids"]
    store = ["--features", str(tmp_path / "features")]
    for wrong, message in [
        (["1"], "but no `features`"),
        (["0", *store], r"`layer_ids` is [0], expected numbers from 1"),
        (["3", *store], "layers [2], expected 0 to 1"),
        (store, "has 2 layers, too few"),
    ]:
        assert main([*given, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main([*given, "1", "2", *store]) == 0
    kept = FeatureStore(tmp_path / "features", str(target), 32, (LAST,))
    assert kept.layers == (0, 1, LAST)
    assert len(kept) > 0


def test_bad_files_are_refused_before_a_model_is_loaded(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("taps_hf.training.commands.load_target", None)
    given = ["regenerate", "--device", "cpu", "--data", questions.name, "--out"]
    for more, message in [
        ([questions.name], "expected a new file"),
        ([str(tmp_path)], "is a folder"),
        ([f"{questions.name}/a"], "questions.jsonl is no folder"),
        ([str(tmp_path / "new.jsonl"), "--features", str(tmp_path)], "holds other things"),
        ([str(tmp_path / "new.jsonl"), "--data", "none.jsonl"], "none.jsonl does not exist"),
    ]:
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [Path(questions.name)]


def test_what_others_wrote_is_never_cut_off(questions, tmp_path):
    options = RegenerateOptions(max_prompt_tokens=20, max_new_tokens=6, batch_size=4, chunk_size=4)
    tokenizer, target, out = chat_tokenizer(CHATML), named_target(), tmp_path / "answers.jsonl"
    state = tmp_path / "answers.jsonl.state.json"

    def refused(message: str) -> None:
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(ValueError, match=message):
            regenerate(target, tokenizer, rows_of(questions), out, options)
        assert before is None or out.read_bytes() == before

    out.write_text("my thesis")
    refused("expected a new file")
    out.unlink()
    regenerate(target, tokenizer, rows_of(questions), out, options)
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
