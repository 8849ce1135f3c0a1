"""A small OpenAI-compatible server, and a proxy before it that breaks what it is told to break, by a seeded plan.

The server answers from the two captions in the prompt, so that every answer can be checked against its own job.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Reply = tuple[int, dict[str, str], bytes]
JSON = {"Content-Type": "application/json"}


def sentence(first: str, second: str, seed: int, picture: str = "") -> str:
    """What the server says of two captions; the fields of a job."""
    return f"The first image shows {first}, while the second shows {second}, said by {seed}."


class Local(ThreadingHTTPServer):
    """An HTTP server on a port of its own, whose `close` also cuts the connections it has, as a crash would."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = self.server_address[1]
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reply(self, handler: _Handler, body: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self.shutdown()
            self.server_close()
            with self.lock:
                for connection in self.connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Local

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_POST(self) -> None:
        self.server.reply(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_GET = do_POST

    def send(self, reply: Reply, only: int | None = None) -> None:
        """The whole reply, or the first bytes of its body and then nothing more."""
        status, headers, body = reply
        lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in headers.items()), f"Content-Length: {len(body)}"]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body[:only])
        if only is not None:
            self.close_connection = True

    def reset(self) -> None:
        """Cut the connection without a goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Tests look at `seen`."""


class Server(Local):
    """/v1/models, /v1/chat/completions and /v1/completions of one model.

    delay: seconds an answer takes. seen: path, headers and body of each request; most: how many were there at once;
    instead: called with (path, headers, body) first; a reply it gives is sent in place of the answer.
    """

    def __init__(self, port: int = 0, delay: float = 0.0, models: tuple[str, ...] = ("small",)) -> None:
        self.delay, self.models = delay, models
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.now = self.most = 0
        self.instead: Callable[[str, dict[str, str], dict[str, Any]], Reply | None] = lambda *_: None
        super().__init__(port)

    def reply(self, handler: _Handler, body: bytes) -> None:
        asked = json.loads(body) if body else {}
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self.lock:
            self.seen.append((handler.path, headers, asked))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.delay)
        answer = self.instead(handler.path, headers, asked) or self._answer(handler.path, asked)
        with self.lock:
            self.now -= 1
        handler.send(answer)

    def _answer(self, path: str, asked: dict[str, Any]) -> Reply:
        if path == "/v1/models":
            return as_json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return as_json({"detail": "Not Found"}, 404)
        if asked["model"] not in self.models:
            return as_json({"error": {"message": f"The model `{asked['model']}` does not exist."}}, 404)
        chat = path == "/v1/chat/completions"
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        first, second = re.findall(r"Picture 1: (.*)\nPicture 2: (.*)", prompt)[-1]
        text = sentence(first, second, asked["seed"])
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": " " + text}
        return as_json({"id": "a", "object": "b", "created": 0, "model": asked["model"] + "-0125", "choices": [choice]})

    def jobs_asked(self) -> Counter[str]:
        """How often each job reached the server, by its id without place and try; the easy prompt is not one."""
        return Counter({name: times for name, times in self._asked().items() if name != "easy"})

    def easy_asked(self) -> int:
        """How often it was asked the easy prompt, which tells a server at fault from a prompt that is."""
        return self._asked()["easy"]

    def _asked(self) -> Counter[str]:
        return Counter(headers["x-request-id"].split("-")[0] for path, headers, _ in self.seen if "complet" in path)


class FaultyProxy(Local):
    """Passes requests on to a server, or does one of FAULTS to them, as a plan drawn from a seed says.

    share: how many of the requests meet a fault, drawn by their X-Request-Id, so that it does not matter in what order
    they come. done: how often each fault was met.
    """

    def __init__(self, server: Server, faults: tuple[str, ...], share: float, seed: int, hang: float) -> None:
        self.upstream, self.faults, self.share, self.hang = server, faults, share, hang
        self.seed = seed
        self.done: Counter[str] = Counter()
        super().__init__()

    def reply(self, handler: _Handler, body: bytes) -> None:
        fault = self._draw(handler.headers.get("X-Request-Id", ""))
        with self.lock:
            self.done[fault] += 1
        if fault in BEFORE:  # the server never hears of the request
            return BEFORE[fault](handler)
        passed = http.client.HTTPConnection("127.0.0.1", self.upstream.port)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection")}
        passed.request(handler.command, handler.path, body, headers)
        response = passed.getresponse()
        found: Reply = (response.status, JSON, response.read())
        passed.close()
        if fault == "hang":
            self.closing.wait(self.hang)
        if fault in AFTER:  # the server has answered, and the answer is lost
            return AFTER[fault](handler, found)
        handler.send(found)
        return None

    def _draw(self, name: str) -> str:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return self.faults[rng.integers(len(self.faults))] if rng.random() < self.share else "none"


def as_json(content: Any, status: int = 200, **headers: str) -> Reply:
    return (
        status,
        JSON | {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps(content).encode(),
    )


HTML = (200, {"Content-Type": "text/html"}, b"<html><body>Sign in to the hotel's network</body></html>")
BEFORE: dict[str, Callable[[_Handler], None]] = {
    "429": lambda handler: handler.send(as_json({"error": {"message": "slow down"}}, 429)),
    "429 with Retry-After": lambda handler: handler.send(as_json({"error": "slow down"}, 429, Retry_After="0.05")),
    "500": lambda handler: handler.send((500, {}, b"oops")),
    "503": lambda handler: handler.send(as_json({"message": "loading the model"}, 503)),
    "reset": lambda handler: handler.reset(),
    "html": lambda handler: handler.send(HTML),
    "no choices": lambda handler: handler.send(as_json({"choices": []})),
    "wrong shape": lambda handler: handler.send(as_json([{"text": "What a nice picture this is."}])),
    "an error in a 200": lambda handler: handler.send(as_json({"error": {"message": "worker died", "code": 502}})),
    "no text": lambda handler: handler.send(as_json({"choices": [{"message": {"content": None}, "text": None}]})),
}
AFTER: dict[str, Callable[[_Handler, Reply], None]] = {
    "hang": lambda handler, reply: handler.reset(),
    "reset after": lambda handler, reply: handler.reset(),
    "half a body": lambda handler, reply: handler.send(reply, only=len(reply[2]) // 2),
    "half of the JSON": lambda handler, reply: handler.send((200, JSON, reply[2][: len(reply[2]) // 2])),
    "no JSON": lambda handler, reply: handler.send((200, JSON, b"The first image shows more than the second one.")),
}
FAULTS = (*BEFORE, *AFTER)


@contextlib.contextmanager
def closing(*servers: Local) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            server.close()
