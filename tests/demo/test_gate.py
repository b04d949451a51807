from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("gradio")

from taps_hf.demo.gate import BodyLimit


def ask(headers: dict[str, str], pieces: Sequence[bytes] = (), kind: str = "http") -> bytes | int:
    """The body that reaches what is protected, or the status of a refusal.

    Reading more than `pieces` fails.
    """
    waiting, refused, reached = list(pieces), [], []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: dict[str, Any]) -> None:
        refused.append(message)

    async def protected(scope, receive, send) -> None:
        reached.extend([(await receive())["body"] for _ in pieces])

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": "POST", "headers": raw}
    asyncio.run(BodyLimit(protected, most=10)(scope, receive, send))
    return refused[0]["status"] if refused else b"".join(reached)


def test_large_bodies_are_refused_unread():
    assert ask({"content-length": "10"}, [b"12345", b"67890"]) == b"1234567890"
    assert ask({"content-length": "11"}) == 413
    assert ask({"content-length": str(2**70)}) == 413


def test_bodies_in_pieces_are_read_until_they_are_too_large():
    chunked = {"transfer-encoding": "chunked"}
    assert ask(chunked, [b"12345", b"67890"]) == b"1234567890"
    assert ask(chunked, [b"12345", b"678901"]) == 413
    assert ask(chunked, [b"12345678901", b"never", b"read"]) == 413


def test_what_has_no_body_passes():
    assert ask({}) == b""
    assert ask({}, kind="lifespan") == b""
