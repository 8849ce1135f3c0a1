"""A small OpenAI-compatible server that answers from the captions in the prompt, or does what a test says instead."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
RESET: Reply = (0, {}, b"")  # no answer; the connection is cut
HTML: Reply = (200, {"Content-Type": "text/html"}, b"<html><body>Sign in to the hotel's network</body></html>")
HALF: Reply = (200, {"Content-Type": "application/json", "Content-Length": "900"}, b'{"choices": [{"m')  # cut short


def sentence(first: str, second: str, seed: int, picture: str = "") -> str:
    """What the server says of two captions; the fields of a job."""
    return f"The first image shows {first}, while the second shows {second}, said by {seed}."


def as_json(content: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json"} | named, json.dumps(content).encode()


def saying(content: Any, finish: str | None = "stop", **message: Any) -> Reply:
    """An answer of both endpoints."""
    choice = {"index": 0, "finish_reason": finish, "text": content, "message": {"content": content, **message}}
    return as_json({"id": "a", "object": "b", "created": 0, "model": "small-0125", "choices": [choice]})


class Server(ThreadingHTTPServer):
    """/v1/models, /v1/chat/completions and /v1/completions on a port of its own.

    seen: path, headers and body of each request; most: how many were there at once; instead: called with (path,
    headers, body) first; a reply it gives is sent in place of the answer.
    """

    request_queue_size = 128

    def __init__(self, models: tuple[str, ...] = ("small",)) -> None:
        self.models = models
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.instead: Callable[[str, dict[str, str], dict[str, Any]], Reply | None] = lambda *_: None
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        with self.lock:
            self.seen.append((path, headers, body))
            self.now += 1
            self.most = max(self.most, self.now)
        reply = self.instead(path, headers, body)
        with self.lock:
            self.now -= 1
        return reply or self._answer(path, body)

    def _answer(self, path: str, body: dict[str, Any]) -> Reply:
        if path == "/v1/models":
            return as_json({"data": [{"id": name} for name in self.models]})
        chat = path == "/v1/chat/completions"
        if body.get("model") not in self.models or not (chat or path == "/v1/completions"):
            return as_json({"error": {"message": "there is no such thing"}}, 404)
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        first, second = re.findall(r"Picture 1: (.*)\nPicture 2: (.*)", prompt)[-1]
        return saying(sentence(first, second, body["seed"]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, fields, content = self.server.reply(self.path, headers, json.loads(body or b"{}"))
        self.close_connection = not status or "Content-Length" in fields
        if status:
            lines = [f"{name}: {value}" for name, value in ({"Content-Length": len(content)} | fields).items()]
            self.wfile.write("\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode() + content)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Tests look at `seen`."""


@contextlib.contextmanager
def closing(*servers: Server) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
