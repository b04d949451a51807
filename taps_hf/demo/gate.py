"""What reaches the page at all: bodies of requests have a largest size."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware that refuses large bodies before anything reads them into memory.

    gradio would also keep them: the last prompt of each of the sessions that it remembers.

    Args:
        app: what is protected.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        length = int(headers.get("content-length", 0))
        if "transfer-encoding" in headers:  # it comes in pieces of any number
            length, receive = await self._read(receive)
        if length > self.most:
            # As gradio words its own refusals, so that its script understands.
            message = {"detail": f"The request has more than {self.most:,} bytes."}
            await JSONResponse(message, 413)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _read(self, receive: Receive) -> tuple[int, Receive]:
        """Read a body until it is too long; returns bytes read, and what gives them out again."""
        read: list[Message] = []
        length, more = 0, True
        while more and length <= self.most:
            read.append(await receive())
            length += len(read[-1].get("body", b""))
            more = read[-1].get("more_body", False)

        async def again() -> Message:
            return read.pop(0) if read else await receive()

        return length, again
