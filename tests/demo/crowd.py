"""Many visitors at once, without browsers: what the page's script sends, and what comes back."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from .written import Tags

_API = "/gradio_api"
_PATIENCE = 120  # seconds without a word from the server, after which a visit has failed
_CYCLE = r'class="tok [^"]* first"'  # the mark of the first token of each


@dataclass(frozen=True)
class Ask:
    """What a visitor asks for, by `merged`.

    Args:
        prompt: as typed.
        length: of the answer.
        seed: of sampling at temperature 1; None for a greedy answer.
    """

    prompt: str
    length: int = 24
    seed: int | None = None

    @property
    def data(self) -> list[Any]:
        """What the page sends. The first is the server's own: which models answer."""
        sampling = [0, 0] if self.seed is None else [1, self.seed]
        return [None, self.prompt, ["math", "chat"], "merged", *sampling, self.length, 4, 12]


@dataclass(frozen=True)
class Visit:
    """What became of one.

    Args:
        ask: what was asked.
        outcome: `served`, `refused`, `told to wait` or `left` in mid-answer.
        text: the answer, or what the visitor was told.
    """

    ask: Ask
    outcome: str
    text: str


def function(config: dict[str, Any], elem_id: str, event: str) -> int:
    """The number by which the server knows what it does upon an event of a component."""
    ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    (found,) = (
        d["id"]
        for d in config["dependencies"]
        if d["backend_fn"] and any((ids.get(i), e) == (elem_id, event) for i, e in d["targets"])
    )
    return found


async def crowd(
    url: str, asks: Sequence[Ask], visitors: int, seconds: float, seed: int
) -> list[Visit]:
    """Visitors who come again and again, one of two leaving in mid-answer.

    Args:
        url: of the page.
        asks: what they ask for, by turns at random.
        visitors: at once.
        seconds: after which nobody comes again; who is there is still served.
        seed: of the turns.

    Raises:
        AssertionError, httpx.HTTPError: for what no visitor should see.
    """
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client:
        config = (await client.get("/config")).json()

        async def come_again(number: int) -> list[Visit]:
            turns, visits = random.Random(seed + number), []
            while time.monotonic() < until:
                visits.append(
                    await _visit(client, config, turns.choice(asks), leaving=turns.random() < 0.5)
                )
                if visits[-1].outcome == "told to wait":
                    await asyncio.sleep(0.5)
            return visits

        visits = await asyncio.gather(*map(come_again, range(visitors)))
    return [visit for one in visits for visit in one]


async def _visit(
    client: httpx.AsyncClient, config: dict[str, Any], ask: Ask, leaving: bool
) -> Visit:
    session = uuid.uuid4().hex
    generate, show = (
        function(config, *of) for of in (("generate", "click"), ("cycle-slider", "change"))
    )
    async with _present(client, session):
        body = {"data": ask.data, "fn_index": generate, "session_hash": session}
        joined = await client.post(f"{_API}/queue/join", json=body)
        if joined.status_code == 503:
            return Visit(ask, "told to wait", joined.json()["detail"])
        if joined.status_code == 413:
            return Visit(ask, "refused", joined.json()["detail"])
        joined.raise_for_status()
        async with aclosing(_messages(client, session)) as messages:
            async for message in messages:
                if message["msg"] == "process_generating" and leaving:
                    return Visit(ask, "left", "")
                if message["msg"] == "process_completed":
                    break
        assert message["success"], message
        _, notice, answer, *_ = message["output"]["data"]
        if notice:
            return Visit(ask, "refused", Tags(notice).text)
        body = {"data": [None, 1], "fn_index": show, "session_hash": session}
        shown = await client.post(f"{_API}/run/predict", json=body)
        shown.raise_for_status()
        (cycle,) = shown.json()["data"]
        # The page has kept this very answer for this visitor.
        assert f"Cycle 1 of {len(re.findall(_CYCLE, answer))}." in Tags(cycle).text
        return Visit(ask, "served", Tags(answer).text)


@asynccontextmanager
async def _present(client: httpx.AsyncClient, session: str) -> AsyncIterator[None]:
    """While somebody has the page open."""
    async with client.stream("GET", f"{_API}/heartbeat/{session}") as beats:
        beats.raise_for_status()
        yield


async def _messages(client: httpx.AsyncClient, session: str) -> AsyncIterator[dict[str, Any]]:
    """What the server says about a visitor's request, until they stop listening."""
    async with client.stream("GET", f"{_API}/queue/data?session_hash={session}") as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))
