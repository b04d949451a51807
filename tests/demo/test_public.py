"""The demo as a public page: a crowd, what it may ask for, and what it may not read."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

pytest.importorskip("gradio")
pytest.importorskip("altair")

import gradio as gr
import httpx

from taps_hf.demo.page import PageOptions, serve

from .crowd import Ask, crowd, function
from .written import plain_answer

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("CROWD_SECONDS", 10))
LONG = 300  # seconds from which on memory has had the time to settle

# Some mean the same to the tiny models' tokenizer: lengths and seeds tell their answers apart.
SERVED = [
    *(Ask(f"t{i} t{15 - i}", 24, seed=100 + i) for i in range(6)),
    *(Ask("t5 " * 150, 100, seed=200 + i) for i in range(3)),
    Ask("\x00\x01\x1b[31m\x07\x7f\u0085 t5", 25, seed=300),
    Ask("\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u202c", 26, seed=301),
    Ask("\u200d\ufeff\U0010ffff \U0001f600 t7", 27, seed=302),
    *(Ask(f"t{i}", 28 + i) for i in range(4)),
]
REFUSED = {
    Ask(""): "The prompt is empty",
    Ask(" \n\t"): "The prompt is empty",
    Ask("t5 " * 400): "The prompt has 402 tokens",
    Ask("x" * 10_000): "The prompt has 10,000 characters",
    Ask("x" * 2**20): "The request has more than 163,840 bytes",
}


@dataclass
class Served:
    """A page in a process of its own, with what it has written to its log."""

    url: str
    process: psutil.Process
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def memory(self) -> float:
        """Resident, in MiB."""
        return self.process.memory_info().rss / 2**20


@pytest.fixture(scope="module")
def served(tiny_spec, tmp_path_factory) -> Iterator[Served]:
    """As a Space runs it, but for this machine only: nobody chooses models."""
    drafters = [f"{name}={path}" for name, path in tiny_spec.drafters]
    command = [sys.executable, ROOT / "app.py", "--target", tiny_spec.target, "--drafters"]
    command += [*drafters, "--no-choose-models", "--concurrency", "2", "--queue-size", "8"]
    log = tmp_path_factory.mktemp("served") / "log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1"],
            stdout=sink,
            stderr=sink,
            env=environment,
            cwd=ROOT,
        ) as process,
    ):
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield Served(found[0], psutil.Process(process.pid), log)
        finally:
            process.terminate()


def test_a_crowd(served, tiny_spec):
    """Twenty at once: each gets their own answer or is told why not, and nothing goes wrong.

    CROWD_SECONDS=600 has them come for ten minutes; `-rP` shows what came of it.
    """
    expected = {ask: plain_answer(tiny_spec, ask.prompt, ask.length, ask.seed) for ask in SERVED}
    assert len(set(expected.values())) == len(SERVED)  # so that no mixture goes unseen
    outcomes, memory = Counter(), [served.memory]
    for seed in (0, 1000):
        visits = asyncio.run(crowd(served.url, [*SERVED, *REFUSED], 20, SECONDS / 2, seed))
        outcomes += Counter(visit.outcome for visit in visits)
        memory.append(served.memory)
        for visit in visits:
            if visit.outcome == "served":
                assert visit.text == expected[visit.ask]
            elif visit.outcome == "refused":
                assert REFUSED[visit.ask] in visit.text
            elif visit.outcome == "told to wait":
                assert "Queue is full" in visit.text
    print(dict(outcomes), f"MiB at the start, in the middle, at the end: {memory}")
    assert outcomes["served"]
    assert not re.search("error|exception|traceback", served.log, re.IGNORECASE)
    if SECONDS >= LONG:
        assert memory[2] < 1.05 * memory[1]


@pytest.fixture(scope="module")
def page(tiny_spec) -> Iterator[gr.Blocks]:
    started = serve(PageOptions(tiny_spec, choose_models=False), wait=False)
    yield started
    started.close()


@pytest.fixture
def client(page) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.local_url, timeout=60) as started:
        yield started


def api(page: gr.Blocks, method: str) -> list[str]:
    """Paths of everything that takes requests."""
    return [
        route.path
        for router in page.app.routes
        for route in getattr(getattr(router, "original_router", router), "routes", [router])
        if method in (getattr(route, "methods", None) or ())
    ]


@pytest.fixture(params=["absolute", "of the model", "relative"])
def secret(request, tiny_spec, tmp_path) -> tuple[str, str]:
    """The name of a file and what is in it."""
    if request.param == "of the model":
        path = Path(tiny_spec.target) / "config.json"
        return str(path), path.read_text()
    if request.param == "relative":
        return "pyproject.toml", (ROOT / "pyproject.toml").read_text()
    path = tmp_path / "secret.txt"
    path.write_text("nobody's business")
    return str(path), path.read_text()


def test_no_address_reads_a_file(page, client, secret, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, content = secret
    up = "/".join([".."] * 30) + str(Path(name).resolve())
    spellings = [name, f"/{name}", f"file://{name}", up, up.replace("/", "%2f"), quote(name, "")]
    asked = 0
    for path in api(page, "GET"):
        for spelling in spellings if "{" in path else []:
            address = spelling.join(re.split(r"\{[^}]*\}", path))
            with client.stream("GET", address) as answer:  # some never end
                start = next(answer.iter_text(), "")
            assert content[:15] not in start, address
            asked += 1
    assert asked > 50


def test_no_event_reads_a_file(page, client, secret, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, content = secret
    file = {"path": name, "url": None, "meta": {"_type": "gradio.FileData"}}
    for number, event in page.fns.items():
        if event.fn is None:
            continue
        for value in (name, file, [file], {"target": name, "drafters": [["math", name]]}):
            body = {"data": [value] * len(event.inputs), "fn_index": number, "session_hash": "me"}
            if event.queue:
                answer = client.post("/gradio_api/queue/join", json=body)
                with client.stream("GET", "/gradio_api/queue/data?session_hash=me") as stream:
                    said = "".join(stream.iter_text())
                assert answer.is_success
                assert "process_completed" in said
            else:
                said = client.post("/gradio_api/run/predict", json=body).text
            assert json.dumps(content[:15]).strip('"') not in said


def test_the_queue_is_the_only_way_to_the_models(page, client):
    config = client.get("/config").json()
    for button in ("generate", "compare"):
        body = {"data": Ask("t5").data, "fn_index": function(config, button, "click")}
        answer = client.post("/gradio_api/run/predict", json={**body, "session_hash": "me"})
        assert answer.status_code == 404
        assert "join the queue" in answer.text


def test_the_page_does_not_say_where_its_models_are(client, tiny_spec):
    folder = str(Path(tiny_spec.target).parent)
    for address in ("/", "/config", "/gradio_api/info"):
        assert folder not in client.get(address).text


def test_nothing_is_uploaded(client):
    answer = client.post("/gradio_api/upload", files={"files": ("name.txt", b"some bytes")})
    assert answer.status_code == 413


def test_requests_have_a_largest_size(client):
    """It has room for any prompt that is not too long, and for no other that is much longer."""
    generate = function(client.get("/config").json(), "generate", "click")
    for prompt, status in (("\U0001f600" * 8192, 200), ("\U0001f600" * 16384, 413)):
        body = {"data": Ask(prompt).data, "fn_index": generate, "session_hash": "me"}
        answer = client.post(
            "/gradio_api/queue/join",
            content=json.dumps(body).encode(),  # with every character escaped
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == status
