"""benchmarks/serve.py against a server that says little, at once."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import serve

DRAFTS = 3


class _Handler(BaseHTTPRequestHandler):
    """Two tokens an answer; three drafts of four tokens, of which the first drafter has one."""

    asked = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._say(json.dumps({"data": [{"id": "model"}]}))
            return
        asked = type(self).asked
        self._say(
            "# HELP something\n"
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {DRAFTS * asked}.0\n'
            f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {2 * DRAFTS * asked}.0\n'
            f'taps_hf:drafted_tokens_total{{engine="0",drafter="math"}} {3 * asked}.0\n'
            f'taps_hf:drafted_tokens_total{{engine="1",drafter="chat"}} {9 * asked}.0\n'
        )

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "refuse" in asked["messages"][0]["content"]:
            self.send_error(400, "too long")
            return
        with self.lock:
            type(self).asked += 1
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
    _Handler.asked = 0
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
    for name, count in (("a", 3), ("b", 1)):
        files.append(tmp_path / f"{name}.jsonl")
        rows = [json.dumps({"instruction": f"{name}{i}"}) for i in range(count)]
        files[-1].write_text("\n".join(rows))
    return [str(file) for file in files]


def test_all_questions_are_asked_once_and_counted(url, questions, tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--servers", f"plain={url}", f"ours={url}", "--prompts", *questions]
    assert serve.main([*given, "--clients", "1", "3", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["server"], row["clients"]) for row in rows] == [
        ("plain", 1),
        ("ours", 1),
        ("plain", 3),
        ("ours", 3),
    ]
    for row in rows:
        assert (row["tokens"], row["drafts"], row["accepted"]) == (8, 4 * DRAFTS, 8 * DRAFTS)
        assert row["drafted"] == {"math": 12, "chat": 36}
        assert 0 < row["first"] <= row["seconds"]
    assert _Handler.asked == 2 + 4 * 4  # the first warms each server up
    said = capsys.readouterr().out
    assert "| 3 | ours |" in said
    assert "| 2.00 | math 25%, chat 75% |" in said


def test_files_take_turns(questions):
    assert [prompt.text for prompt in serve.mixed(questions)] == ["a0", "b0", "a1", "a2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--servers", "a=ftp://here"], "expected http://host:port"),
        (["--servers", "a=http://127.0.0.1:9"], "does not say which model it serves"),
        (["--servers", "a"], "expected NAME=PATH"),
        (["--servers", "a=URL", "--clients", "0"], "`clients` is 0, expected at least 1"),
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
