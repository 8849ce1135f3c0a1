"""Sentences by language models behind OpenAI-compatible servers: vLLM, llama.cpp, Ollama, TGI, or a hosted one.

Here are the settings and what is sent; _server_client.py speaks to one server, _server_session.py shares the jobs out.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from pc_clip.core.config.write import ServerConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.write.prompts import Prompt
from pc_clip.write.server_client import PLAIN, Fatal, failure_of, request_id
from pc_clip.write.server_session import Session
from pc_clip.write.writers import Job, Writer

__all__ = ["ServerWriter", "request_id"]

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # seconds between two tries, however often one failed
LONGEST_SIDE = 1024  # pixels of a picture that is sent; vision-language models make larger ones smaller themselves
_RENAMED = re.compile(r"(max_tokens|temperature|top_p|seed|stop)=\w*")


class ServerWriter(Writer):
    """Asks OpenAI-compatible servers, many requests at once, and tries again what fails for a while.

    Raises UserError for settings that cannot be right, and when no model is named and there is not just one. A prompt
    that a server cannot answer (too long, say, or filtered) while it answers an easy one is answered by "", which is
    counted as empty; servers that answer no prompt are an error.

    first_wait: seconds before the first repetition; doubled each time, up to LONGEST_WAIT. look: the picture of a name,
    for jobs that have one; called from several threads.
    """

    window = None  # all jobs at once: they are begun as places are free

    def __init__(
        self,
        config: ServerConfig,
        prompt: Prompt,
        *,
        first_wait: float = 0.5,
        look: Callable[[str], Image.Image] | None = None,
    ) -> None:
        self.config, self.asked, self.first_wait, self.look = config, prompt, first_wait, look
        self.urls = [_checked_url(url) for url in config.url]
        if not self.urls:
            raise UserError("server.url is empty; give at least one, such as http://localhost:8000/v1")
        if twice := sorted({url for url in self.urls if self.urls.count(url) > 1}):
            raise UserError(f"server.url names {twice[0]} twice; raise --server.concurrency for more requests at once")
        check_at_least("server.concurrency", config.concurrency, 1)
        check_at_least("server.max_tokens", config.max_tokens, 1)
        if wrong := [pair for pair in config.rename if not _RENAMED.fullmatch(pair)]:
            raise UserError(
                f"server.rename has {wrong[0]!r}; write max_tokens=max_completion_tokens, or seed= to leave it out; "
                "max_tokens, temperature, top_p, seed and stop can be renamed"
            )
        if "" in config.stop:
            raise UserError("server.stop holds an empty string, which would end every answer before its first word")
        for name in ("timeout", "patience"):
            if not getattr(config, name) > 0:
                raise UserError(f"server.{name} is {getattr(config, name)}; it must be above 0 seconds")
        self.secret = _Secret(config.api_key_env)
        for url in self.urls:
            parts = urlsplit(url)
            if self.secret.key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
                log.warning(
                    "%s gets the key in %s unencrypted; --server.api_key_env '' sends none", url, config.api_key_env
                )
        self.system_role = config.system_role  # until a server says that its model's template has none
        self.unanswered = self.answered = 0
        self.answered_by: set[str] = set()
        if (chatty := logging.getLogger("httpx2")).level == logging.NOTSET:
            chatty.setLevel(logging.WARNING)  # it would write a line a request
        self.model = config.model or self._only_model()

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """As of every writer. Closing the iterator ends the requests that are under way.

        Raises UserError, after all that was finished, when the servers cannot be used.
        """
        session = Session(self, jobs)
        thread = threading.Thread(target=session.run, name="server writer", daemon=True)
        thread.start()
        try:
            while (result := session.finished.get()) is not None:
                yield result
        finally:
            session.stop()
            thread.join()
        if session.error is not None:
            raise session.error

    def describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "writer": "server",
            "model": self.model,
            "answered_by": sorted(self.answered_by),  # hosted models go by an alias; here is what it stood for
            "url": self.urls,
            "chat": config.chat,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stop": self.stop,
            "system": self.asked.system,
            "system_role": config.chat and self.system_role,
            "instruction": self.asked.instruction,
            "worked_examples": [] if config.chat else list(self.asked.examples),
        }

    @property
    def stop(self) -> list[str]:
        """What ends an answer. A base model would go on with another example: its answer ends with the line."""
        return list(self.config.stop) or ([] if self.config.chat else ["\n"])

    def body(self, job: Job) -> dict[str, Any]:
        """What is sent for a job."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,  # sent even when 1: vLLM would otherwise take the model's own
            "seed": job.seed,
        }
        if self.stop:
            body["stop"] = self.stop
        renamed = {}
        for pair in self.config.rename:
            old, _, new = pair.partition("=")
            if old in body and (value := body.pop(old)) is not None and new:
                renamed[new] = value
        if renamed:
            body["extra_body"] = renamed  # the openai package's place for fields that it may not know
        if not self.config.chat:
            return body | {"prompt": _encodable(self.asked.with_examples(job.first, job.second))}
        question = _encodable(self.asked.question(job.first, job.second))
        if not self.system_role:
            question = f"{self.asked.system}\n\n{question}"
        system = [{"role": "system", "content": self.asked.system}] if self.system_role else []
        return body | {"messages": [*system, {"role": "user", "content": self._content(question, job.picture)}]}

    def _content(self, question: str, picture: str) -> str | list[dict[str, Any]]:
        """A question as the protocol has it: plain text, or after a picture."""
        if not picture:
            return question
        if picture == PLAIN:
            image = Image.new("RGB", (64, 64), "grey")
        elif self.look is None:
            raise ValueError(f"there is a picture to show, {picture}, but nothing to look it up with")
        else:
            image = self.look(picture)
        return [{"type": "image_url", "image_url": {"url": _as_url(image)}}, {"type": "text", "text": question}]

    def hide(self, text: str) -> str:
        """Text from outside without the key, in case a server sends it back."""
        return self.secret.hide(text)

    def options(self, timeout: float) -> dict[str, Any]:
        """How the openai package's clients are made. Trying again is done here: they know one URL alone."""
        import openai

        return {
            "api_key": self.secret.key or "none",
            "max_retries": 0,
            "timeout": openai.Timeout(timeout, connect=min(10.0, timeout)),
        }

    def wait(self, seed: int, tries: int) -> float:
        """Seconds before the next try: doubled each time, less up to a half by chance, so that jobs spread out."""
        longest = min(LONGEST_WAIT, self.first_wait * 2 ** min(tries - 1, 20))
        return longest * (1 - 0.5 * stream(seed, "wait", tries).random())

    def models(self, url: str, timeout: float) -> list[str]:
        """The names of the models a server lists. Raises openai.APIError when it cannot be asked."""
        import openai

        with openai.OpenAI(base_url=url, **self.options(timeout)) as client:
            found = client.models.with_raw_response.list().http_response.text
        try:
            return [self.hide(str(entry["id"])) for entry in json.loads(found)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    def _only_model(self) -> str:
        import openai

        end = time.monotonic() + self.config.patience
        for tries in itertools.count(1):
            for url in self.urls:
                try:
                    names = self.models(url, min(30.0, self.config.timeout))
                except openai.APIError as error:
                    failure = failure_of(error, self, url)
                    if isinstance(failure, Fatal):
                        advice = "Does --server.url end in /v1? --server.model names a model without asking for it."
                        raise UserError(f"{failure}. {advice}") from None
                    continue
                if len(names) == 1:
                    return names[0]
                listed = f"serves {len(names)} models: {', '.join(names[:20])}" if names else "lists no model"
                raise UserError(f"{url} {listed}; choose one with --server.model")
            wait = max(self.wait(0, tries), failure.after or 0)
            if time.monotonic() + wait > end:
                raise UserError(
                    f"{url}: {failure}, for {self.config.patience:.0f} s. Is the server running, and is --server.url "
                    "its address? --server.model names a model without asking for it."
                )
            if tries == 1:
                log.warning("%s: %s; trying for up to %.0f s", url, failure, self.config.patience)
            time.sleep(wait)
        raise AssertionError("count() does not end")


class _Secret:
    """The key, from the environment alone. Neither its repr nor any error shows it."""

    def __init__(self, variable: str) -> None:
        self.key = os.environ.get(variable, "").strip() if variable else ""
        if not re.fullmatch(r"[!-~]*", self.key):
            raise UserError(f"the environment variable {variable} holds characters that cannot stand in a key")

    def hide(self, text: str) -> str:
        """Without the key, however its signs are escaped.

        Keys shorter than 8 characters are dummies such as EMPTY or x, which may be parts of a word.
        """
        if len(self.key) < 8:
            return text
        signs = (c if c.isalnum() else rf"(?:\\*{re.escape(c)}|%{ord(c):02x}|\\+u{ord(c):04x})" for c in self.key)
        return re.sub("".join(signs), "[key]", text, flags=re.I)

    def __repr__(self) -> str:
        return "<key>"


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        sound = False
    if not sound:  # not shown where it may hold a password
        shown = f"{url!r} is no address" if "@" not in url else "an address cannot be read"
        raise UserError(f"server.url: {shown}; write it as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"server.url: the address at {parts.hostname} holds a password, or something after ? or #. Leave it out; "
            "a key belongs into the environment variable that --server.api_key_env names."
        )
    return url.strip().rstrip("/")


def _as_url(image: Image.Image) -> str:
    """A picture inside an address, as a JPEG of at most LONGEST_SIDE."""
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def _encodable(text: str) -> str:
    """Without halves of characters, which a JSON file of captions may hold and no request can."""
    return text.encode("utf-8", "replace").decode()
