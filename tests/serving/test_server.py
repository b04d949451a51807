"""vLLM's OpenAI-compatible server with composed drafters: a client whose connection breaks."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from taps_hf.formats.composition import Drafting

from ..saved import letter_tokenizer
from .served import LENGTH, SETTINGS, compose_small, drafted_by, needs_vllm, save_small_target

pytestmark = needs_vllm
LONGEST, NEW_TOKENS, PATIENCE = 512, 48, 600
_ENDED = "vllm:request_success_totallength"
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8]]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("server") / "small"
    target = save_small_target(folder)
    letter_tokenizer().save_pretrained(folder)
    return target


@pytest.fixture(scope="module")
def port(tmp_path_factory, target) -> Iterator[int]:
    """Of a server, which is ended afterwards."""
    folder = tmp_path_factory.mktemp("composed")
    compose_small(folder / "both", target, Drafting("request"))
    with socket.socket() as found:  # a port that nobody has
        found.bind(("127.0.0.1", 0))
        number = found.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(number)),
        *("--model", target.config.name_or_path, "--served-model-name", "small"),
        *("--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", "4"),
        *("--enforce-eager", "--no-enable-prefix-caching"),
        *("--per-request-spec-decode-metrics", "summary", "--speculative-config"),
        json.dumps(drafted_by(folder / "both", "eagle")),
    ]
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        _wait_for(server, number, log)
        yield number
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(server: subprocess.Popen, port: int, log: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            if _ask(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass  # it does not listen yet
        failed = server.poll() is not None or time.monotonic() - started > PATIENCE
        assert not failed, log.read_text()[-8000:]
        time.sleep(0.5)


def _ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _question(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    fixed = {"model": "small", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**fixed, "prompt": prompt, "max_tokens": tokens, **more}


def _answer(port: int, prompt: list[int]) -> dict[str, Any]:
    status, answer = _ask(port, "POST", "/v1/completions", _question(prompt, NEW_TOKENS))
    assert status == 200, answer
    return json.loads(answer)


def _complete(port: int, prompt: list[int]) -> list[int]:
    return _answer(port, prompt)["choices"][0]["token_ids"]


def _break_off(port: int, prompt: list[int]) -> None:
    """Ask for a long answer, and close the connection after its first pieces."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    question = _question(prompt, LONGEST - len(prompt), stream=True)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(question), headers)
    open_socket, answer = connection.sock, connection.getresponse()
    pieces = 0
    while pieces < 3:
        pieces += answer.readline().startswith(b"data:")
    open_socket.shutdown(socket.SHUT_RDWR)
    answer.close()
    connection.close()


def _metrics(port: int) -> dict[str, float]:
    """By name and labels but the model's; those of all drafters by their name alone, summed."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(_ask(port, "GET", "/metrics")[1]):
        for sample in family.samples:
            name = sample.name + sample.labels.get("finished_reason", "")
            found[name] = found.get(name, 0) + sample.value
    return found


def _plain(target: PreTrainedModel, prompt: list[int]) -> list[int]:
    out = target.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(prompt) :].tolist()


def _settled(port: int, ended: float) -> dict[str, float]:
    """Metrics, when nothing runs any more and so many answers are counted, or more."""
    started = time.monotonic()
    while True:
        metrics = _metrics(port)
        if not metrics["vllm:num_requests_running"] and metrics[_ENDED] >= ended:
            return metrics
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.2)


def test_others_go_on_when_a_client_breaks_off(port, target):
    expected, ended, attempts = [_plain(target, prompt) for prompt in PROMPTS], 0, 0
    while attempts < 5 and ended != len(PROMPTS):
        attempts += 1
        before = _metrics(port)[_ENDED]
        with ThreadPoolExecutor(2) as others:
            answers = [others.submit(_complete, port, prompt) for prompt in PROMPTS]
            _break_off(port, [6, 2, 8])
            found = [answer.result() for answer in answers]
        assert found == expected
        metrics = _settled(port, before + len(PROMPTS))
        # Where this process has stood still, the answer may be at its end before anybody leaves.
        ended = metrics[_ENDED] - before
    assert ended == len(PROMPTS)  # only the others' answers came to their end
    for kind, theirs in (("drafted", "draft"), ("accepted", "accepted")):
        ours = metrics[f"taps_hf:{kind}_tokens_total"]
        # vLLM counts a step after it has forgotten those who left in it: once an attempt.
        more = ours - metrics[f"vllm:spec_decode_num_{theirs}_tokens_total"]
        assert 0 <= more <= LENGTH * attempts


def test_a_prompt_that_is_too_long_is_refused_and_the_next_answered(port, target):
    status, said = _ask(port, "POST", "/v1/completions", _question([4] * (LONGEST + 1), 1))
    assert (status, str(LONGEST) in said) == (400, True)
    assert _complete(port, PROMPTS[0]) == _plain(target, PROMPTS[0])


def test_what_vllm_says_of_a_request(port):
    """How much was drafted and accepted, and nothing that could tell by whom: docs/serving.md."""
    said = _answer(port, PROMPTS[0])["metrics"]["speculative_decoding"]
    steps = sum(said["acceptance_histogram"])
    assert 0 < said["num_draft_tokens"] <= LENGTH * steps
    # The first token needs no draft; the last draft may go beyond the end.
    beyond = steps + said["num_accepted_draft_tokens"] - (NEW_TOKENS - 1)
    assert 0 <= beyond <= LENGTH
