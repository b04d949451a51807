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
from taps_hf.training.engines.base import Answer, AnswerEngine
from taps_hf.training.engines.batched import BatchedEngine
from taps_hf.training.features import FeatureStore, features_of
from taps_hf.training.regenerate import RegenerateOptions, regenerate

from ..tiny import tiny_target
from .chat import CHATML, chat_tokenizer


class OneByOne(AnswerEngine):
    """An engine as simple as can be, which gives no features."""

    name = "one by one"

    def __init__(self, target, options: RegenerateOptions) -> None:
        self.target, self.options = target, options
        self.starts, self.calls = 0, 0

    def start(self) -> None:
        self.starts += 1

    def answer(self, prompts, first):
        assert self.starts == 1
        self.calls += 1
        more = {}
        if self.options.temperature:
            more = {"temperature": self.options.temperature, "top_k": 0}
        answers = []
        for i, ids in enumerate(prompts):
            torch.manual_seed(1000 * first + i)
            given = torch.tensor([ids])
            tokens = self.target.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=bool(more),
                max_new_tokens=self.options.max_new_tokens,
                eos_token_id=2,
                pad_token_id=0,
                **more,
            )
            answers.append(Answer(tokens[0, len(ids) :].tolist(), None))
        return answers


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


def batched(target, options: RegenerateOptions) -> BatchedEngine:
    return BatchedEngine(target, options, {2}, (LAST,))


class Stopped(AnswerEngine):
    """Another engine, until it has answered so often."""

    def __init__(self, engine: AnswerEngine, calls: int) -> None:
        self.engine, self.left = engine, calls

    @property
    def asked(self):
        return self.engine.asked

    def start(self) -> None:
        self.engine.start()

    def answer(self, prompts, first):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.engine.answer(prompts, first)


@pytest.mark.parametrize("engine", [batched, OneByOne])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_run_goes_on_to_the_same_answers(questions, tmp_path, engine, temperature):
    options = RegenerateOptions(
        max_prompt_tokens=20, max_new_tokens=6, temperature=temperature, batch_size=2, chunk_size=4
    )
    tokenizer, target = chat_tokenizer(CHATML), named_target()
    given = (target, tokenizer, rows_of(questions))
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    stores = [FeatureStore(tmp_path / name, "tiny", 32) for name in ("features", "others")]
    report = regenerate(*given, whole, options, stores[0], engine(target, options))
    assert report.used == 9
    assert sum(report.problems.values()) == 2

    for calls in (0, 1, 0, 1):
        with pytest.raises(KeyboardInterrupt):
            regenerate(*given, stopped, options, stores[1], Stopped(engine(target, options), calls))
        with stopped.open("a") as file:
            file.write('{"messages": [{"half a li')
    again = regenerate(*given, stopped, options, stores[1], engine(target, options))
    assert again.problems == report.problems
    assert stopped.read_text() == whole.read_text()
    written = [(store.folder / "features.bin").read_bytes() for store in stores]
    assert written[0] == written[1]
    regenerate(*given, stopped, options, stores[1], Stopped(engine(target, options), 0))  # no more

    rows = [json.loads(line) for line in whole.open()]
    assert len(rows) == 9
    for row in rows:
        assert (row["finish_reason"] == "stop") == (row["input_ids"][-1] == 2)
        ids = row["input_ids"][:-1]
        assert row["answer_start"] + options.max_new_tokens >= len(row["input_ids"])
        expected = features_of(target, torch.tensor([ids]))[0]
        torch.testing.assert_close(stores[0].read(ids).float(), expected, rtol=2e-2, atol=5e-2)
    read = DataReport()
    examples = encode_rows(tokenizer, read_mixture([DataSource(str(whole))], read), 100, read, [2])
    assert len(examples) == read.used == 9

    with pytest.raises(ValueError, match="was begun with"):
        regenerate(target, tokenizer, rows_of(questions), whole, RegenerateOptions())
    other = OneByOne if engine is batched else batched
    with pytest.raises(ValueError, match="was begun with"):
        regenerate(*given, whole, options, stores[0], other(target, options))
    (tmp_path / "whole.jsonl.state.json").unlink()
    with pytest.raises(ValueError, match="expected a new file"):
        regenerate(target, tokenizer, rows_of(questions), whole, options)


def test_an_engine_that_cannot_start_binds_no_file(questions, tmp_path):
    """The next attempt may ask another one, or give it other options."""

    class Broken(OneByOne):
        def start(self) -> None:
            raise ValueError("out of order")

    options = RegenerateOptions(max_prompt_tokens=20, max_new_tokens=6)
    target, out = named_target(), tmp_path / "answers.jsonl"
    given = (target, chat_tokenizer(CHATML), rows_of(questions), out, options)
    with pytest.raises(ValueError, match="out of order"):
        regenerate(*given, engine=Broken(target, options))
    assert regenerate(*given).used == 9
    finished = OneByOne(target, options)
    with pytest.raises(ValueError, match="was begun with"):
        regenerate(*given, engine=finished)
    assert finished.starts == 0


def test_layers_are_kept_of_answers_without_features(questions, tmp_path):
    options = RegenerateOptions(max_prompt_tokens=20, max_new_tokens=6, chunk_size=4)
    target, out = named_target(), tmp_path / "answers.jsonl"
    store = FeatureStore(tmp_path / "features", "tiny", 32, (1, LAST))
    given = (target, chat_tokenizer(CHATML), rows_of(questions), out, options, store)
    regenerate(*given, OneByOne(target, options))
    rows = [json.loads(line) for line in out.open()]
    assert len(rows) == 9
    for row in rows:
        ids = row["input_ids"][:-1]
        expected = features_of(target, torch.tensor([ids]), layers=(1, LAST))[0]
        torch.testing.assert_close(store.read(ids).float(), expected, rtol=1e-2, atol=1e-2)


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
