"""`taps-hf regenerate --engine vllm`: our own engine's answers and features, and killed at work."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from taps_hf.cli import main
from taps_hf.target import LAST
from taps_hf.training.features import FeatureStore, features_of

from ..training.chat import CHATML, chat_tokenizer
from .served import SETTINGS, needs_vllm, save_small_target

pytestmark = needs_vllm
QUESTIONS = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Arguments that name a small target and questions."""
    folder = tmp_path_factory.mktemp("small")
    model = save_small_target(folder / "target")
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(folder / "target")
    chat_tokenizer(CHATML).save_pretrained(folder / "target")
    choose = random.Random(0)
    words = [f"t{i}" for i in range(5, 15)]
    rows = [
        {"instruction": " ".join(choose.choices(words, k=choose.randint(1, 9))), "output": "t5"}
        for _ in range(QUESTIONS)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["regenerate", "--device", "cpu", "--dtype", "float32", "--data", str(data)]
    given += ["--target", str(folder / "target"), "--max-prompt-tokens", "64"]
    return [*given, "--engine-options", EAGER]


EAGER = '{"enforce_eager": true}'  # nothing is compiled for texts this short


def through_vllm(arguments: list[str]) -> subprocess.Popen:
    """The command in a process of its own, as users start it."""
    environment = {**os.environ, **SETTINGS}
    del environment["VLLM_CPU_KVCACHE_SPACE"]  # it asks for what it needs
    return subprocess.Popen(
        [sys.executable, "-m", "taps_hf.cli", *arguments, "--engine", "vllm"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(arguments: list[str]) -> None:
    process = through_vllm(arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-8000:]


def ours(arguments: list[str]) -> None:
    place = arguments.index("--engine-options")
    assert main([*arguments[:place], *arguments[place + 2 :]]) == 0


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def test_greedy_answers_and_features_are_those_of_our_engine(small, tmp_path):
    """Some end, some are cut; batches smaller than chunks, chunks smaller than the data."""
    more = ["--max-new-tokens", "40", "--batch-size", "5", "--chunk-size", "16"]
    layers = ["--layer-ids", "2", "5"]
    for name, answer in (("vllm", run), ("ours", ours)):
        kept = ["--features", str(tmp_path / f"{name}-features"), *layers]
        answer([*small, *more, *kept, "--out", str(tmp_path / f"{name}.jsonl")])
    found, expected = (lines_of(tmp_path / f"{name}.jsonl") for name in ("vllm", "ours"))
    assert found == expected
    assert {line["finish_reason"] for line in found} == {"stop", "length"}
    target = small[small.index("--target") + 1]
    stores = [
        FeatureStore(tmp_path / f"{name}-features", target, 64, (1, 4, LAST))
        for name in ("vllm", "ours")
    ]
    for line in found:
        ids = line["input_ids"][:-1]
        there, here = (store.read(ids).float() for store in stores)
        torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)


def test_a_run_that_is_killed_goes_on_to_the_same_sampled_answers(small, tmp_path):
    more = ["--max-new-tokens", "200", "--temperature", "0.8", "--chunk-size", "6"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run([*small, *more, "--out", str(whole)])
    process = through_vllm([*small, *more, "--out", str(killed)])
    while process.poll() is None and not (killed.exists() and killed.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(lines_of(killed)) < QUESTIONS, "it was to be killed at work"
    run([*small, *more, "--out", str(killed)])
    assert killed.read_bytes() == whole.read_bytes()
    answers = [tuple(line["input_ids"][line["answer_start"] :]) for line in lines_of(whole)]
    assert len(set(answers)) == QUESTIONS


def test_sampled_answers_follow_the_targets_distribution(small, tmp_path):
    """The first token of many answers to one question."""
    count, temperature = 4000, 2.0
    data, out = tmp_path / "one.jsonl", tmp_path / "answers.jsonl"
    data.write_text('{"instruction": "t5 t9 t7", "output": "t5"}\n' * count)
    arguments = [*small, "--temperature", str(temperature), "--max-new-tokens", "1"]
    arguments[arguments.index("--data") + 1] = str(data)
    run([*arguments, "--batch-size", "200", "--chunk-size", "3000", "--out", str(out)])
    lines = lines_of(out)
    prompt = lines[0]["input_ids"][:-1]
    model = save_small_target(tmp_path / "again")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / temperature).softmax(0)
    drawn = torch.tensor([line["input_ids"][-1] for line in lines])
    frequency = torch.bincount(drawn, minlength=len(expected)) / count
    assert (frequency - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert expected.max() < 0.9  # else greedy answers would pass


@pytest.mark.real
def test_the_embedded_target_answers_as_it_does_here(tmp_path, load_real, real_folder):
    rows = [
        "Tom has 3 boxes with 15 pens each. He gives away 9 pens. How many pens are left?",
        "What is a good way to begin learning the guitar?",
        "Name three colours of the rainbow.",
        "A train travels 60 miles an hour for 3 hours. How far is that?",
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"instruction": r, "output": "x"}) + "\n" for r in rows))
    arguments = ["regenerate", "--device", "cpu", "--dtype", "float32", "--data", str(data)]
    arguments += ["--max-new-tokens", "48", "--engine-options", EAGER]
    store = tmp_path / "features"
    run([*arguments, "--features", str(store), "--out", str(tmp_path / "vllm.jsonl")])
    same = ["--target", str(real_folder)]  # which takes a second to load
    ours([*arguments, *same, "--out", str(tmp_path / "ours.jsonl")])
    found = lines_of(tmp_path / "vllm.jsonl")
    assert found == lines_of(tmp_path / "ours.jsonl")
    assert len(found) == len(rows)
    target = load_real()
    kept = FeatureStore(store, target.config.name_or_path, target.config.hidden_size)
    for line in found:
        ids = line["input_ids"][:-1]
        expected = features_of(target, torch.tensor([ids]))[0]
        torch.testing.assert_close(kept.read(ids).float(), expected, rtol=2e-2, atol=5e-2)


def test_what_vllm_refuses_is_said_in_one_line(small, tmp_path):
    """The small target reads 512 tokens; nothing is bound to the file."""
    process = through_vllm([*small, "--max-new-tokens", "900", "--out", str(tmp_path / "a.jsonl")])
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "taps-hf: vLLM cannot run the target" in said.splitlines()[-1]
    assert "max_model_len" in said.splitlines()[-1]
    assert not (tmp_path / "a.jsonl.state.json").exists()
