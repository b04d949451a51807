"""What is asked of vLLM, by a stand-in for it; tests/serving runs the real one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from typing import Any

import pytest
import torch
from safetensors import safe_open

from taps_hf.cli import main
from taps_hf.loading import EMBEDDED
from taps_hf.training.engines.base import RegenerateOptions
from taps_hf.training.engines.vllm import VllmEngine, bytes_of_a_token

from ...tiny import tiny_target
from ..chat import CHATML, chat_tokenizer

OPTIONS = RegenerateOptions(
    max_prompt_tokens=20, max_new_tokens=5, temperature=0.7, batch_size=3, chunk_size=4
)


class Llm:
    """Answers `max_tokens` times the length of the prompt."""

    made: list[Llm]

    def __init__(self, model: str, **settings: Any) -> None:
        if settings.pop("refused", False):
            raise RuntimeError("no such\nthing")
        self.model, self.settings = model, settings
        self.given: list[tuple[list[int], Any]] = []
        self.weights: set[str] = set()
        if model.startswith("/") and "taps-hf-target-" in model:
            with safe_open(f"{model}/model.safetensors", "pt") as file:
                self.weights = set(file.keys())
        Llm.made.append(self)

    def generate(self, prompts, params, use_tqdm):
        self.given += [(p["prompt_token_ids"], how) for p, how in zip(prompts, params, strict=True)]
        return [_output([len(ids)] * how.max_tokens) for ids, how in self.given[-len(prompts) :]]


def _output(tokens: list[int]) -> Any:
    return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(tokens))])


@pytest.fixture
def made(monkeypatch) -> list[Llm]:
    vllm, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = Llm, types.SimpleNamespace
    platforms.current_platform = types.SimpleNamespace(device_type="cpu")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "as before the test")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    Llm.made = []
    return Llm.made


def engine(options: RegenerateOptions = OPTIONS, name: str = "folder", **settings) -> VllmEngine:
    return VllmEngine(name, tiny_target(), "cpu", options, {7, 2}, settings)


def test_it_is_asked_for_what_ours_does(made):
    found = engine(max_num_batched_tokens=64, enable_prefix_caching=True)
    assert made == []
    found.start()
    (llm,) = made
    assert llm.model == "folder"
    assert llm.settings["dtype"] == "float32"
    assert llm.settings["max_model_len"] == 25
    assert llm.settings["max_num_seqs"] == 3
    assert llm.settings["max_num_batched_tokens"] == 64
    assert llm.settings["enable_prefix_caching"] is True  # what the user says comes first
    assert llm.settings["kv_cache_memory_bytes"] >= 3 * 25 * 2 * 2 * 2 * 8 * 4
    answers = found.answer([[5, 6], [7, 8, 9]], 0)
    assert [answer.tokens for answer in answers] == [[2] * 5, [3] * 5]
    assert all(answer.features is None for answer in answers)
    assert found.answer([], 4) == []
    for ids, how in llm.given:
        assert ids in ([5, 6], [7, 8, 9])
        assert (how.temperature, how.max_tokens, how.ignore_eos) == (0.7, 5, True)
        assert how.stop_token_ids == [2, 7]


def test_random_numbers_follow_from_row_and_seed(made):
    def seeds(first: int, **changes: Any) -> list[int]:
        options = RegenerateOptions(**{**vars(OPTIONS), **changes})
        found = engine(options)
        found.start()
        found.answer([[5]] * 4, first)
        return [how.seed for _, how in made[-1].given]

    assert len({*seeds(0), *seeds(4), *seeds(0, seed=1)}) == 12
    assert seeds(4) == seeds(4)
    assert all(0 <= seed < 2**63 for seed in seeds(0))
    assert seeds(0, temperature=0.0) == [None] * 4


def test_the_embedded_target_is_written_for_it_and_removed(made, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine(name=EMBEDDED).start()
    assert "model.norm.weight" in made[0].weights
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot run the target embedded: no such"):
        engine(name=EMBEDDED, refused=True).start()
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_token_is_that_of_a_cache():
    target = tiny_target("qwen2", torch.bfloat16)
    cache = target(torch.tensor([[5, 6, 7]])).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert 3 * bytes_of_a_token(target.config, torch.bfloat16) == held


@pytest.fixture
def command(tmp_path) -> list[str]:
    target, data = tmp_path / "target", tmp_path / "questions.jsonl"
    tiny_target().save_pretrained(target)
    chat_tokenizer(CHATML).save_pretrained(target)
    rows = [{"instruction": f"t{5 + i}", "output": "t5"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["regenerate", "--device", "cpu", "--target", str(target), "--data", str(data)]
    return [*given, "--out", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "3"]


def test_the_command_goes_on_with_the_same_engine_only(made, command, tmp_path, capsys):
    vllm = [*command, "--engine", "vllm", "--dtype", "float32"]
    assert main([*vllm, "--engine-options", '{"refused": true}']) == 2
    assert "vLLM cannot run the target" in capsys.readouterr().err
    for _ in range(2):
        assert main([*vllm, "--features", str(tmp_path / "features")]) == 0
    assert len(made) == 1  # there was nothing left to do
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert len(lines) == 6
    for line in lines:
        start = line["answer_start"]
        assert line["input_ids"][start:] == [start] * 3
    for other in ([], ["--engine", "vllm", "--engine-options", '{"enforce_eager": true}']):
        assert main([*command, "--dtype", "float32", *other]) == 2
        assert "was begun with" in capsys.readouterr().err


def test_it_runs_targets_whose_weights_nobody_else_loads(made, command, tmp_path):
    assert main([*command, "--engine", "vllm"]) == 0
    assert made[0].settings["dtype"] == "bfloat16"
    assert made[0].model == str(tmp_path / "target")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--engine-options", "{}"], "`engine` is transformers; expected vllm"),
        (["--engine", "vllm", "--engine-options", "{"], "expected JSON"),
        (["--engine", "vllm", "--engine-options", "[1]"], "expected a JSON object"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    made, command, tmp_path, capsys, more, said
):
    before = sorted(tmp_path.iterdir())
    assert main([*command, *more]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_where_there_is_no_vllm_it_says_how_to_get_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before = sorted(tmp_path.iterdir())
    assert main([*command, "--engine", "vllm"]) == 2
    said = capsys.readouterr().err
    assert "not installed here: pip install" in said
    assert "taps-hf[vllm]" in said
    assert sorted(tmp_path.iterdir()) == before


def test_another_device_is_refused(made, monkeypatch):
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        VllmEngine("folder", tiny_target(), "cuda:1", OPTIONS, {2})
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", "cuda")
    with pytest.raises(ValueError, match="installed here runs on cuda"):
        engine().start()
