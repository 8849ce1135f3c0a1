"""Sentences by language models behind OpenAI-compatible servers: vLLM, llama.cpp, Ollama, TGI, or a hosted one.

One coroutine, in a thread of its own, decides which job goes to which server (_Session); one request is one task
(_Client.ask). A job is always in one place: being asked, waiting to be asked again, or handed on. So none is lost
and none comes twice, whatever a server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from pc_clip.errors import UserError, check_at_least, nearest
from pc_clip.prompts import Prompt
from pc_clip.writers.job import Job, Writer

if TYPE_CHECKING:
    import openai  # otherwise where it is used: it takes long to import, and the settings below are always read

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # seconds between two tries, however often one failed
SET_ASIDE_AFTER = 3  # failures in a row, after which one request at a time finds out whether a server is back
ANSWER_TRIES = 6  # how often an answer that is none is asked for again
EASY = Job("a dog on a sofa", "a cat on a chair", 0)  # asked to see whether a server is at fault, or a prompt
EASY_TRIES = 3  # how often it is asked, and how often a prompt must fail beside it
_RENAMED = re.compile(r"(max_tokens|temperature|top_p|seed|stop)=\w*")
_TRANSIENT = {408, 409, 425, 429}  # and 5xx
_TOO_LONG = re.compile(
    r"context.{0,20}(length|size|window)|maximum model length|max_new_tokens.{0,20} must be|prompt is too long", re.I
)
_FILTERED = re.compile(r"content.?(filter|policy|management)", re.I)
_NO_SYSTEM = re.compile(r"system role|roles must alternate|only user and assistant roles", re.I)


@dataclass
class ServerConfig:
    """A language model behind one or several OpenAI-compatible servers.

    Args:
        url: Where the servers are, separated by commas, each with its path (http://localhost:8000/v1). All must have
            the model; each gets as many requests as it answers.
        model: The model's name there; empty for the only one that is served.
        chat: Whether the model is asked through its chat template; false for a base model, which gets worked examples
            through the completions endpoint.
        system_role: Whether the system prompt is a message of its own; false puts it before the question, for chat
            templates without that role. A server that says that there is none is understood without this.
        concurrency: Requests under way at once, for each URL.
        timeout: Seconds a request may take.
        patience: Seconds for which a job that fails is tried again. What is finished by then stays.
        api_key_env: The environment variable that holds the key, which goes to every URL; local servers mostly need
            none.
        max_tokens: The longest answer.
        temperature: 0 for the most likely answer; above it, answers are drawn, by each job's seed where the server
            keeps to seeds.
        top_p: Draw from the likeliest tokens that make up this share.
        stop: Strings that end an answer; empty for none, and for the end of the line where chat is false.
        rename: Fields of a request under other names, for servers that want them so: max_tokens=max_completion_tokens;
            seed= leaves seed out.
    """

    url: list[str] = field(default_factory=lambda: ["http://localhost:8000/v1"])
    model: str = ""
    chat: bool = True
    system_role: bool = True
    concurrency: int = 32
    timeout: float = 60.0
    patience: float = 300.0
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    rename: list[str] = field(default_factory=list)


class ServerWriter(Writer):
    """Asks OpenAI-compatible servers, many requests at once, and tries again what fails for a while.

    Raises UserError for settings that cannot be right, and when no model is named and there is not just one. A prompt
    that a server cannot answer (too long, say, or filtered) while it answers an easy one is answered by "", which is
    counted as empty; servers that answer no prompt are an error.

    first_wait: seconds before the first repetition; doubled each time, up to LONGEST_WAIT.
    """

    window = None  # all jobs at once: they are begun as places are free

    def __init__(self, config: ServerConfig, prompt: Prompt, *, first_wait: float = 0.5) -> None:
        self.config, self.asked, self.first_wait = config, prompt, first_wait
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
        session = _Session(self, jobs)
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
        if self.system_role:
            messages = [{"role": "system", "content": self.asked.system}, {"role": "user", "content": question}]
        else:
            messages = [{"role": "user", "content": f"{self.asked.system}\n\n{question}"}]
        return body | {"messages": messages}

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
        return longest * (1 - 0.5 * np.random.default_rng([seed & 0xFFFFFFFF, tries]).random())

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
                    failure = _failure(error, self, url)
                    if isinstance(failure, _Fatal):
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


def request_id(job: Job) -> str:
    """What the X-Request-Id of a job's requests begins with: a hash of all that it is made of."""
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]


# -- what can go wrong ---------------------------------------------------------------------------------


class _Again(Exception):
    """A failure that may pass.

    after: seconds the server asks for, 0 where it only says that it is asked too much; garbage: it answered, but not
    with a sentence.
    """

    def __init__(self, reason: str, after: float | None = None, garbage: bool = False) -> None:
        super().__init__(reason)
        self.after, self.garbage = after, garbage


class _AskAnew(_Again):
    """The next try will be another request, so it need not wait."""


class _Fatal(Exception):
    """A failure that would come again. status, said: of the answer; body: all of it, to look for words in."""

    def __init__(self, reason: str, status: int, said: str, body: str) -> None:
        super().__init__(reason)
        self.status, self.said, self.body = status, said, body


def _failure(error: openai.APIError, writer: ServerWriter, url: str) -> _Again | _Fatal:
    """What an error of the client means. No message of the client itself is passed on, only what the server said."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return _late(writer)
    if not isinstance(error, openai.APIStatusError):
        cause = str(error.__cause__ or "") or type(error.__cause__ or error).__name__
        return _Again(f"no connection, or one cut short ({writer.hide(_short(cause))})")
    status, body = error.status_code, error.response.text[:10_000]
    said = _said(body, writer)
    if status in _TRANSIENT or (status >= 500 and not _TOO_LONG.search(body)):
        # The words of `transformers serve` on any exception, and so on a template that refuses the system role.
        unsure = status == 500 and writer.config.chat and writer.system_role and not writer.answered
        hint = "; if its chat template has no system role, --server.system_role false helps" if unsure else ""
        after = _asked_wait(error.response.headers)
        return _Again(f"status {status} ({said}){hint}", 0.0 if after is None and status == 429 else after)
    if status in (401, 403):
        known = "refuses the key in" if writer.secret.key else "wants a key, which belongs into"
        return _Fatal(
            f"{url} {known} the environment variable {writer.config.api_key_env} ({said})", status, said, body
        )
    return _Fatal(f"{url} refused the request with status {status} ({said})", status, said, body)


def _late(writer: ServerWriter) -> _Again:
    return _Again(f"no answer within {writer.config.timeout:g} s (--server.timeout, --server.concurrency)")


def _asked_wait(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError):
        return None


def _said(body: str, writer: ServerWriter) -> str:
    """A server's words on what went wrong, on one line, short, and without the key."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        body = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return _short(writer.hide(body)) or "nothing said"


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


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


def _encodable(text: str) -> str:
    """Without halves of characters, which a JSON file of captions may hold and no request can."""
    return text.encode("utf-8", "replace").decode()


# -- one server ----------------------------------------------------------------------------------------


class _Client:
    """One URL: its connections, how many requests it may have, and until when it is left alone."""

    def __init__(self, writer: ServerWriter, url: str) -> None:
        import openai

        self.writer, self.url, self.error = writer, url, openai.APIError
        self.openai = openai.AsyncOpenAI(base_url=url, **writer.options(writer.config.timeout))
        self.limit = writer.config.concurrency  # falls to 1 when it is set aside, and grows with each answer
        self.busy = self.asked = self.failures = self.rests = 0
        self.rest_until = self.told = 0.0

    def free(self, now: float) -> bool:
        return self.busy < self.limit and now >= self.rest_until

    async def ask(self, job: Job, name: str, last: str = "") -> str:
        """The answer; "" where the server cannot answer this prompt but can answer others. Raises _Again, or UserError.

        last: why all is given up when the server is at fault, not the prompt; empty where there will be other tries.
        """
        if not last:
            return await self._try(job, name)
        for count in range(EASY_TRIES):  # it may just have come back: one failure beside an easy answer says little
            try:
                return await self._try(job, f"{name}-{count}")
            except _AskAnew:
                raise
            except _Again as failure:
                said = str(failure)
                if failure.after is not None or not await self._seems_to_work():
                    raise UserError(last) from None
        return self._unanswerable(said)

    async def _works(self) -> bool:
        """Whether it answers an easy prompt, rather than refusing it. Raises _Again when it does neither."""
        for tries in range(1, EASY_TRIES + 1):
            try:
                await asyncio.wait_for(self._ask(EASY, f"easy-{time.monotonic_ns()}"), self.writer.config.timeout)
                return True
            except asyncio.TimeoutError:
                raise _late(self.writer) from None
            except self.error as error:
                failure = _failure(error, self.writer, self.url)
            except _Again as garbage:
                failure = garbage
            if isinstance(failure, _Fatal):
                return False
            if failure.after or tries == EASY_TRIES:
                raise failure
            await asyncio.sleep(self.writer.wait(EASY.seed, tries))
        raise AssertionError("the last try returns or raises")

    async def _seems_to_work(self) -> bool:
        with contextlib.suppress(_Again):
            return await self._works()
        return False

    async def _try(self, job: Job, name: str) -> str:
        try:
            with_role = self.writer.system_role
            try:
                return await asyncio.wait_for(self._ask(job, name), self.writer.config.timeout)
            except self.error as error:
                failure = _failure(error, self.writer, self.url)
            if not isinstance(failure, _Fatal):
                raise failure
            if with_role and self.writer.config.chat and _NO_SYSTEM.search(failure.body):
                self.writer.system_role = False  # some templates, Gemma's for one, know none
                raise _AskAnew(str(failure))
            own = failure.status in (400, 413, 422) or _TOO_LONG.search(failure.body) or _FILTERED.search(failure.body)
            if own and await self._works():
                return self._unanswerable(failure.said)
            if _TOO_LONG.search(failure.body):
                raise UserError(
                    f"{self.url} refuses even a short prompt ({failure.said}). Serve the model with a longer context, "
                    "lower --server.max_tokens, or shorten --prompt; the last two with another --name."
                )
            raise UserError(await self._advice(failure))
        except asyncio.TimeoutError:
            raise _late(self.writer) from None

    async def _ask(self, job: Job, name: str) -> str:
        chat = self.writer.config.chat
        endpoint = self.openai.chat.completions if chat else self.openai.completions
        headers = {"X-Request-Id": name}
        reply = await endpoint.with_raw_response.create(**self.writer.body(job), extra_headers=headers)
        text = self._read(reply.http_response.text)
        self.writer.answered += 1
        for end in self.writer.stop:  # some servers go on after it, or leave it in
            text = text.split(end, 1)[0]
        return self.writer.hide(text)

    def _read(self, body: str) -> str:
        """The sentence in a server's answer. Raises _Again for anything that is not one."""
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            text = choice["message"]["content"] if self.writer.config.chat else choice["text"]
            why = choice.get("finish_reason")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise _Again(f"no answer of a language model: {_said(body, self.writer)}", garbage=True) from None
        if isinstance(found.get("model"), str):
            self.writer.answered_by.add(self.writer.hide(found["model"]))
        if isinstance(text, str):
            return text
        if why == "content_filter":
            return ""
        if isinstance(choice.get("message"), dict) and isinstance(choice["message"].get("refusal"), str):
            return choice["message"]["refusal"]
        hint = f"; --server.max_tokens {self.writer.config.max_tokens} may be too few" if why == "length" else ""
        raise _Again(f"an answer without text{hint}: {_said(body, self.writer)}", garbage=True)

    def _unanswerable(self, said: str) -> str:
        self.writer.unanswered += 1
        if self.writer.unanswered == 1:
            log.warning("%s cannot answer a prompt; it and any other such count as empty (%s)", self.url, said)
        return ""

    async def _advice(self, failure: _Fatal) -> str:
        """What to do about a refusal that will not pass."""
        model = self.writer.model
        names = []
        if failure.status in (400, 404, 422):
            with contextlib.suppress(self.error):
                names = await asyncio.to_thread(self.writer.models, self.url, 10.0)
        if names and model not in names:
            return f"{self.url} knows no model {model!r} ({failure.said}). {nearest(model, names)} See --server.model."
        if failure.status == 404:
            path = "chat/completions" if self.writer.config.chat else "completions"
            other = "false asks a base model" if self.writer.config.chat else "true asks a chat model"
            return (
                f"there is no {self.url}/{path} ({failure.said}). Addresses mostly end in /v1 (--server.url); "
                f"--server.chat {other}; the model asked for is {model!r}."
            )
        return f"{failure}. What is finished is kept; the same command continues."

    def answered(self) -> None:
        self.failures = self.rests = 0
        self.limit = min(self.limit + 1, self.writer.config.concurrency)

    def failed(self, failure: _Again, now: float) -> None:
        """Set aside when it asks for that, or after several failures in a row."""
        self.failures += 1
        if failure.after:
            self._rest(now + failure.after, failure)
        elif self.failures >= SET_ASIDE_AFTER and now >= self.rest_until:
            self._rest(now + self.writer.wait(self.asked, self.rests + 1), failure)

    def _rest(self, until: float, failure: _Again) -> None:
        if not self.told or time.monotonic() - self.told > 60:  # what goes on for long is said once a minute
            log.warning("%s: %s; it is left alone for a while, then tried again", self.url, failure)
            self.told = time.monotonic()
        self.rests += 1
        self.limit = 1
        self.rest_until = max(self.rest_until, until)


# -- all of them, for the jobs of one stream -----------------------------------------------------------


@dataclass(order=True)
class _Open:
    """A job that was begun. ready: when it may be asked (again); since: when it first failed."""

    ready: float
    place: int
    job: Job = field(compare=False)
    tries: int = field(default=0, compare=False)
    garbage: int = field(default=0, compare=False)
    since: float | None = field(default=None, compare=False)
    last: _Client | None = field(default=None, compare=False)
    given_up: str = field(default="", compare=False)


class _Session:
    """Jobs in, finished sentences out, over a thread's event loop.

    Jobs are begun as places are free: only a window of them is open, however many there are.
    """

    def __init__(self, writer: ServerWriter, jobs: Sequence[Job]) -> None:
        self.writer, self.jobs = writer, jobs
        self.finished: queue.Queue[tuple[int, str] | None] = queue.Queue()  # None after the last
        self.error: BaseException | None = None
        self.begun = 0
        self.again: list[_Open] = []  # a heap, by when they may be asked again
        self.flying: dict[asyncio.Task[str], tuple[_Open, _Client]] = {}
        self.window = 2 * writer.config.concurrency * len(writer.urls)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopped = False

    def run(self) -> None:
        """The thread."""
        try:
            asyncio.run(self._run())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # raised where the sentences are read
            self.error = error
        finally:
            self.finished.put(None)

    def stop(self) -> None:
        """From any thread: end what is under way. Does nothing when all is done."""
        self.stopped = True
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self.task.cancel)

    async def _run(self) -> None:
        self.task, self.loop = asyncio.current_task(), asyncio.get_running_loop()
        self.clients = [_Client(self.writer, url) for url in self.writer.urls]
        try:
            # An error is looked at after all answers that came with it: what is finished is handed on before.
            while not self.stopped and self.error is None:
                self._launch()
                if self.flying:
                    how = {"timeout": self._pause(), "return_when": asyncio.FIRST_COMPLETED}
                    for task in (await asyncio.wait(self.flying, **how))[0]:
                        self._settle(task)
                elif self.again or self.begun < len(self.jobs):
                    await asyncio.sleep(self._pause() or 0)
                else:
                    return
        finally:
            for task in self.flying:
                task.cancel()
            await asyncio.gather(*self.flying, return_exceptions=True)
            for client in self.clients:
                await client.openai.close()

    def _launch(self) -> None:
        """Begin what can be begun."""
        while self.finished.qsize() < self.window:
            now = time.monotonic()
            free = [client for client in self.clients if client.free(now)]
            if not free or (opened := self._next(now)) is None:
                return
            # Another server than that which failed; the least busy; and of those in turn.
            client = min(free, key=lambda c: (c is opened.last, c.busy, c.asked))
            self._begin(opened, client)

    def _begin(self, opened: _Open, client: _Client) -> None:
        opened.tries += 1
        client.busy += 1
        client.asked += 1
        # Another name for each try: vLLM makes it the request's own, and the last may still be under way there.
        name = f"{request_id(opened.job)}-{opened.place}-{opened.tries}"
        self.flying[asyncio.create_task(client.ask(opened.job, name, opened.given_up))] = (opened, client)

    def _next(self, now: float) -> _Open | None:
        if self.again and self.again[0].ready <= now:
            return heapq.heappop(self.again)
        if not self._room():
            return None
        self.begun += 1
        return _Open(now, self.begun - 1, self.jobs[self.begun - 1])

    def _room(self) -> bool:
        """Whether another job may be begun."""
        return self.begun < len(self.jobs) and len(self.flying) + len(self.again) < self.window

    def _pause(self) -> float | None:
        """Seconds until something may be begun although no answer came; None when only an answer can change that."""
        if self.finished.qsize() >= self.window:
            return 0.02  # the reader is slower than the servers
        now = time.monotonic()
        places = [client.rest_until for client in self.clients if client.busy < client.limit]
        ready = now if self._room() else self.again[0].ready if self.again else None
        return max(0.002, max(ready, min(places)) - now) if places and ready is not None else None

    def _settle(self, task: asyncio.Task[str]) -> None:
        """One request is over: hand the answer on, or have the job wait for another try, or give up."""
        opened, client = self.flying.pop(task)
        client.busy -= 1
        failure = task.exception()
        if failure is None:
            client.answered()
            self.finished.put((opened.place, task.result()))
        elif isinstance(failure, _AskAnew):
            heapq.heappush(self.again, opened)
        elif isinstance(failure, _Again):
            self._put_back(opened, client, failure)
        else:
            self.error = self.error or failure

    def _put_back(self, opened: _Open, client: _Client, failure: _Again) -> None:
        now = time.monotonic()
        client.failed(failure, now)
        opened.last = client
        opened.garbage += failure.garbage
        opened.since = now if opened.since is None else opened.since
        opened.ready = now + self.writer.wait(opened.job.seed, opened.tries)
        soonest = max(opened.ready, min(c.rest_until for c in self.clients))
        if opened.garbage >= ANSWER_TRIES:
            self._give_up(f"{client.url} gave {failure}", opened)
        elif soonest > opened.since + self.writer.config.patience:
            asks = f", asking to wait {failure.after:.0f} s" if failure.after else ""
            self._give_up(f"{client.url}: {failure}{asks}; --server.patience {self.writer.config.patience:g}", opened)
        else:
            heapq.heappush(self.again, opened)

    def _give_up(self, reason: str, opened: _Open) -> None:
        """Some last tries, which tell a server at fault from a prompt that it cannot answer (_Client.ask)."""
        spent = time.monotonic() - (opened.since or 0.0)
        opened.given_up = (
            f"{reason}. Given up after {opened.tries} tries in {spent:.0f} s, for {_short(opened.job.first, 60)!r} "
            f"(request {request_id(opened.job)}). What is finished is kept; the same command continues."
        )
        # At once, also where all are set aside or full; by the server that is most likely to work.
        self._begin(opened, min(self.clients, key=lambda c: (c.failures, c is opened.last, c.busy)))
