r"""Times running servers under several numbers of clients, with the same mixed traffic, in turn.

    python benchmarks/serve.py --servers plain=http://localhost:8000 ours=http://localhost:8001 \
        --prompts gsm8k.jsonl:16 mt_bench.jsonl:16 --clients 1 2 4 8 16 --out serve.json

Servers are vLLM's, or others with its OpenAI-compatible API and metrics. What is measured, and how:
README.md beside this file.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prompts import Prompt, read_prompts
from settings import command

from taps_hf.checks import COUNT, named_paths
from taps_hf.command import Parser, run_command
from taps_hf.files import check_writable, write_json

_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
_DRAFTER = re.compile(r'drafter="([^"]*)"')
_DRAFTS, _ACCEPTED = (
    f"vllm:spec_decode_num_{kind}_total" for kind in ("drafts", "accepted_tokens")
)
_OURS = "taps_hf:drafted_tokens_total"
_TIMEOUT = 600
_WARM_UP = "Say one word."


@dataclass(frozen=True)
class Answer:
    """How one request went.

    Args:
        first: seconds until the first token.
        seconds: until the last.
        tokens: so many.
    """

    first: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What one server did for so many clients.

    Args:
        server: its name.
        clients: how many asked at once.
        seconds: for all requests together.
        tokens: of all answers.
        first: median seconds until the first token.
        each: median seconds from one token to the next.
        drafts, accepted: that were verified, and their accepted tokens, by vLLM's metrics.
        drafted: tokens of each drafter, by those of our plugin.
    """

    server: str
    clients: int
    seconds: float
    tokens: int
    first: float
    each: float
    drafts: int = 0
    accepted: int = 0
    drafted: dict[str, int] = field(default_factory=dict)


class Server:
    """One that is running.

    Args:
        name: in tables.
        url: http://host:port.

    Raises:
        ValueError: if it does not answer as such a server does.
    """

    def __init__(self, name: str, url: str) -> None:
        found = urlsplit(url)
        if found.scheme != "http" or not found.hostname:
            raise ValueError(f"The server {name} is {url!r}, expected http://host:port.")
        self.name, self._host, self._port = name, found.hostname, found.port or 80
        try:
            self._model = json.loads(self._get("/v1/models"))["data"][0]["id"]
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            raise ValueError(
                f"The server {name} ({url}) does not say which model it serves ({error!r}); "
                "expected one with OpenAI's API, running."
            ) from error

    def ask(self, text: str, max_tokens: int) -> Answer:
        """Have one question answered, greedily, token by token.

        Raises:
            ValueError: if the server refuses.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start, first, tokens = time.perf_counter(), None, 0
        for event in self._stream("/v1/chat/completions", body):
            said = any(choice["delta"].get("content") for choice in event.get("choices", []))
            if first is None and said:
                first = time.perf_counter() - start
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
        if first is None or not tokens:
            raise ValueError(f"The server {self.name} answered {text!r:.60} with nothing.")
        return Answer(first, time.perf_counter() - start, tokens)

    def counts(self) -> dict[str, float]:
        """Its metrics, those that differ in labels together; ours by drafter."""
        found: dict[str, float] = defaultdict(float)
        for sample in _SAMPLE.finditer(self._get("/metrics")):
            name, labels = sample["name"], sample["labels"] or ""
            if name == _OURS and (drafter := _DRAFTER.search(labels)):
                name = f"{name} {drafter[1]}"
            found[name] += float(sample["value"])
        return found

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode("utf-8")
        finally:
            connection.close()

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                said = response.read().decode("utf-8", "replace")
                raise ValueError(f"The server {self.name} answers {response.status}: {said:.200}")
            for line in response:
                data = line.decode("utf-8").strip().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)
        finally:
            connection.close()


def measure(server: Server, prompts: Sequence[Prompt], clients: int, max_tokens: int) -> Measured:
    """Have so many clients ask all prompts, each the next one as soon as it has its answer."""
    before = server.counts()
    pending, lock = iter(prompts), threading.Lock()
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def client() -> None:
        try:
            while not errors:
                with lock:
                    prompt = next(pending, None)
                if prompt is None:
                    return
                answers.append(server.ask(prompt.text, max_tokens))
        except BaseException as error:  # raised below, where somebody sees it
            errors.append(error)

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    after = server.counts()
    more = {name: int(value - before.get(name, 0)) for name, value in after.items()}
    return Measured(
        server.name,
        clients,
        seconds,
        sum(answer.tokens for answer in answers),
        statistics.median(answer.first for answer in answers),
        statistics.median(
            (answer.seconds - answer.first) / max(answer.tokens - 1, 1) for answer in answers
        ),
        more.get(_DRAFTS, 0),
        more.get(_ACCEPTED, 0),
        {name.split(" ", 1)[1]: n for name, n in more.items() if name.startswith(f"{_OURS} ")},
    )


def mixed(specs: Sequence[str], times: int = 1) -> list[list[Prompt]]:
    """Prompts for so many measurements, none twice: what a server has cached it does not compute.

    Args:
        specs: of files, FILE or FILE:COUNT, COUNT for each measurement.
        times: how many measurements there are.

    Returns:
        For each the prompts of all files in turn: traffic of all kinds at all times.

    Raises:
        ValueError: if a file has not so many.
    """
    files = [read_prompts(spec, times) for spec in specs]
    for spec, found in zip(specs, files):
        if len(found) < times:
            raise ValueError(
                f"{Path(spec).name} has {len(found)} prompts, expected one at least for each of "
                f"{times} measurements."
            )
    shares = [[found[at::times][: len(found) // times] for found in files] for at in range(times)]
    return [
        [prompt for each in itertools.zip_longest(*share) for prompt in each if prompt is not None]
        for share in shares
    ]


def markdown(rows: Sequence[Measured]) -> str:
    """A table, the first server's tokens per second being 1 in each round; medians of rounds."""
    lines = [
        "| clients | server | tokens/s together | x first | first token, ms | per token, ms | "
        "accepted a draft | drafted by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found: dict[tuple[int, str], list[Measured]] = defaultdict(list)
    for row in rows:
        found[row.clients, row.server].append(row)
    for (clients, server), rounds in found.items():
        base = found[clients, rows[0].server]
        rates = [row.tokens / row.seconds for row in rounds]
        ratios = sorted(rate / (first.tokens / first.seconds) for rate, first in zip(rates, base))
        times = f"{statistics.median(ratios):.2f}"
        if len(ratios) > 1:
            times += f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        drafts = sum(row.drafts for row in rounds)
        accepted = f"{sum(row.accepted for row in rounds) / drafts:.2f}" if drafts else "-"
        drafted: dict[str, int] = defaultdict(int)
        for name, n in (item for row in rounds for item in row.drafted.items()):
            drafted[name] += n
        whole = sum(drafted.values())
        by = ", ".join(f"{name} {n / whole:.0%}" for name, n in drafted.items() if whole)
        first, each = (
            statistics.median(getattr(row, name) for row in rounds) * 1000
            for name in ("first", "each")
        )
        lines.append(
            f"| {clients} | {server} | {statistics.median(rates):.1f} | {times} | {first:.0f} | "
            f"{each:.1f} | {accepted} | {by or '-'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", required=True, metavar="NAME=URL")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE[:COUNT]")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, help="JSON file of what was measured")
    options = parser.parse_args(argv)
    return run_command("serve.py", lambda: _run(options, argv))


def _run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    for name, values in (
        ("clients", options.clients),
        ("rounds", [options.rounds]),
        ("max_new_tokens", [options.max_new_tokens]),
    ):
        for value in values:
            if value not in COUNT:
                raise ValueError(f"`{name}` is {value}, expected {COUNT}.")
    if options.out is not None:
        check_writable(options.out)
    turns = [clients for clients in options.clients for _ in range(options.rounds)]
    prompts = mixed(options.prompts, len(turns))
    named = named_paths(options.servers, "servers")
    servers = [Server(name, url) for name, url in named.items()]
    for server in servers:  # compiles and warms up what the first request finds cold
        server.ask(_WARM_UP, options.max_new_tokens)
    rows: list[Measured] = []
    for turn, clients in enumerate(turns):
        shift = turn % len(servers)  # none is always the first
        found = [
            measure(server, prompts[turn], clients, options.max_new_tokens)
            for server in servers[shift:] + servers[:shift]
        ]
        rows += sorted(found, key=lambda row: list(named).index(row.server))
        if options.out is not None:
            write_json(options.out, [asdict(row) for row in rows])
    print(f"    {command(argv, 'serve.py')}\n\n{markdown(rows)}")


if __name__ == "__main__":
    sys.exit(main())
