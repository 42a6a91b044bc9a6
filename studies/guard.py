"""What stands before every route: size limits, closed doors of Gradio, and headers; plain ASGI."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 16 * 1024
"""Bytes of a request's body; a vote has a few hundred."""
LARGEST_QUERY = 4 * 1024
PAGES = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/admin/status"})
FOLDERS = ("/api/", "/clip/", "/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
"""What is open besides. Of Gradio's own routes only those that draw the page: its file and proxy routes would serve
foreign content, and its queue, uploads and calls are not used."""
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; frame-ancestors 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-robots-tag": "noindex",
}


class Guard:
    """Refuses what no rater's browser sends, and adds the headers that keep the page to itself."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets
        if refused := _refuse(scope):
            await _answer(send, *refused)
            return
        path = scope["path"]
        started = False
        size = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise _TooLargeError
            return message

        async def headed(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                if not path.startswith("/assets/"):  # Gradio's own code may be cached, nothing of the study
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in present)]
            await send(message)

        try:
            await self.app(scope, limited, headed)
        except _TooLargeError:
            if not started:
                await _answer(send, 413, "too large")


class _TooLargeError(Exception):
    pass


def _refuse(scope: Scope) -> tuple[int, str] | None:
    path, method = scope["path"], scope["method"]
    if len(scope.get("query_string", b"")) > LARGEST_QUERY or len(path) > LARGEST_QUERY:
        return 414, "too long"
    if method not in ("GET", "HEAD", "POST"):
        return 405, "method"
    if method == "POST" and not path.startswith("/api/"):
        return 404, "closed"
    if path not in PAGES and (not path.startswith(FOLDERS) or ".." in path or "\\" in path):
        return 404, "closed"
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value) > LARGEST_BODY):
            return 413, "too large"
    return None


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
