"""benchmarks/serve.py against a server that says little, at once."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import serve

DRAFTS = 3


class _Handler(BaseHTTPRequestHandler):
    """Two tokens an answer; three drafts of four tokens, of which the first drafter has one."""

    texts: ClassVar[list[str]] = []
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._say(json.dumps({"data": [{"id": "model"}]}))
            return
        asked = len(self.texts)
        self._say(
            "# HELP something\n"
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {DRAFTS * asked}.0\n'
            f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {2 * DRAFTS * asked}.0\n'
            f'taps_hf:drafted_tokens_total{{engine="0",drafter="math"}} {3 * asked}.0\n'
            f'taps_hf:drafted_tokens_total{{engine="1",drafter="chat"}} {9 * asked}.0\n'
        )

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        if "refuse" in text:
            self.send_error(400, "too long")
            return
        with self.lock:
            self.texts.append(text)
        events = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "one"}}]},
            {"choices": [{"delta": {"content": " two"}}]},
            {"choices": [], "usage": {"completion_tokens": 2}},
        ]
        self._say("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n")

    def _say(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url():
    _Handler.texts.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def questions(tmp_path) -> list[str]:
    files = []
    for name, count in (("a", 13), ("b", 6)):
        files.append(tmp_path / f"{name}.jsonl")
        rows = [json.dumps({"instruction": f"{name}{i}"}) for i in range(count)]
        files[-1].write_text("\n".join(rows))
    return [str(file) for file in files]


def test_questions_are_asked_once_of_each_server_and_counted(url, questions, tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--servers", f"plain={url}", f"ours={url}", "--prompts", *questions]
    given += ["--clients", "1", "3", "--rounds", "2", "--out", str(out)]
    assert serve.main(given) == 0
    rows = json.loads(out.read_text())
    assert [(row["server"], row["clients"]) for row in rows] == [
        (server, clients) for clients in (1, 1, 3, 3) for server in ("plain", "ours")
    ]
    for row in rows:
        assert (row["tokens"], row["drafts"], row["accepted"]) == (8, 4 * DRAFTS, 8 * DRAFTS)
        assert row["drafted"] == {"math": 12, "chat": 36}
        assert 0 < row["first"] <= row["seconds"]
    times = Counter(_Handler.texts)  # "plain" and "ours" are one server here
    assert len(times) == 1 + 4 * 4  # with what warms each up
    assert set(times.values()) == {2}
    said = capsys.readouterr().out
    assert said.count("| 3 | ours |") == 1
    assert "| 2.00 | math 25%, chat 75% |" in said


def test_of_several_rounds_medians_are_shown():
    rows = [
        serve.Measured(server, 2, seconds, 12, first=0.1, each=0.01)
        for plain, ours in ((1, 1), (2, 1), (3, 1))
        for server, seconds in (("plain", plain), ("ours", ours))
    ]
    assert "| 2 | plain | 6.0 | 1.00 (1.00 to 1.00) |" in serve.markdown(rows)
    assert "| 2 | ours | 12.0 | 2.00 (1.00 to 3.00) |" in serve.markdown(rows)


def test_files_take_turns_and_are_dealt_out(questions):
    every, counted = serve.mixed(questions, 6), serve.mixed([f"{questions[0]}:2", questions[1]], 2)
    assert [prompt.text for prompt in every[0]] == ["a0", "b0", "a6"]
    assert [prompt.text for prompt in counted[1]] == ["a3", "b1", "a9", "b3", "b5"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--servers", "a=ftp://here"], "expected http://host:port"),
        (["--servers", "a=http://127.0.0.1:9"], "does not say which model it serves"),
        (["--servers", "a"], "expected NAME=PATH"),
        (["--servers", "a=URL", "--clients", "0"], "`clients` is 0, expected at least 1"),
        (["--servers", "a=URL", "--rounds", "0"], "`rounds` is 0, expected at least 1"),
        (["--servers", "a=URL", "--rounds", "7", "--clients", "1"], "b.jsonl has 6 prompts"),
    ],
)
def test_what_is_refused(url, questions, capsys, given, message):
    given = [word.replace("URL", url) for word in given]
    assert serve.main([*given, "--prompts", *questions]) == 2
    assert message in capsys.readouterr().err


def test_an_error_of_the_server_ends_it(url, tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text('{"instruction": "fine"}\n{"instruction": "refuse me"}\n')
    given = ["--servers", f"a={url}", "--prompts", str(file), "--clients", "2"]
    assert serve.main(given) == 2
    assert "The server a answers 400" in capsys.readouterr().err
