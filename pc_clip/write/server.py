"""Sentences by language models behind OpenAI-compatible servers: vLLM, llama.cpp, Ollama, TGI, or a hosted one.

The openai package tries again what may pass (lost connections, time-outs, 408, 409, 429, 5xx), with growing waits or as
Retry-After asks.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import re
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai
from PIL import Image

from pc_clip.core.config.write import ServerConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.write.prompts import Prompt
from pc_clip.write.writers import Answer, Job, Writer

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 20  # so many jobs without an answer between them: the fault is hardly theirs
LONGEST_SIDE = 1024  # pixels of an image that is sent; vision-language models shrink larger ones themselves
REFUSED_PROMPT = (400, 413, 422)  # statuses; asking again would not help
STOPS_ALL = (None, 401, 403, 404)  # where nothing was answered before, no other job would fare better
ADVICE = {  # by status, None for no connection
    None: "Is the server running, and is --server.url its address?",
    400: "A model that sees no images takes --rank.pictures false; a long prompt, a lower --server.max_tokens.",
    401: "The key belongs into the environment variable that --server.api_key_env names.",
    403: "The key belongs into the environment variable that --server.api_key_env names.",
    404: "Check --server.model and --server.chat, and that --server.url ends in /v1.",
    500: "A chat template that knows no system prompt takes --server.system_role false.",
}
_NO_SYSTEM_ROLE = re.compile(r"system role|roles must alternate|only user and assistant roles", re.I)
_RENAMED = re.compile(r"(max_tokens|temperature|top_p|seed|stop)=\w*")


class _Failure(Exception):
    """Why a job has no answer. status: of the response; 408 for a time-out, None where there was no connection."""

    status: int | None = 200


class _Server(NamedTuple):
    url: str
    client: openai.AsyncOpenAI
    free: asyncio.Semaphore


class ServerWriter(Writer):
    """Asks OpenAI-compatible servers, many requests at once.

    A prompt that is refused, where others are answered, gets an empty answer. Any other job that fails, also at the
    next server, is left out of the stream (`failed`, `last_error`).

    asked: the prompt. look: gives the image of an id, for jobs that have one; called from several threads.

    Raises UserError for settings that cannot be right, and when no model is named and there is not just one.
    """

    def __init__(
        self, config: ServerConfig, prompt: Prompt, *, look: Callable[[str], Image.Image] | None = None
    ) -> None:
        self.config, self.asked, self.look = config, prompt, look
        for name, least in (("concurrency", 1), ("max_tokens", 1), ("retries", 0)):
            check_at_least(f"server.{name}", getattr(config, name), least)
        if not config.url or "" in config.stop or not config.timeout > 0:
            raise UserError("server.url needs an address, server.timeout seconds, and server.stop no empty string")
        if wrong := [pair for pair in config.rename if not _RENAMED.fullmatch(pair)]:
            raise UserError(
                f"server.rename has {wrong[0]!r}; write max_tokens=max_completion_tokens, or seed= to leave it out; "
                "max_tokens, temperature, top_p, seed and stop can be renamed"
            )
        self._key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
        if not re.fullmatch(r"[!-~]*", self._key):
            raise UserError(f"the environment variable {config.api_key_env} holds characters that no key has")
        self.urls = [self._checked(url) for url in config.url]
        for library in ("httpx2", "openai"):
            logging.getLogger(library).setLevel(logging.WARNING)  # they would write a line for each request
        self.stop = list(config.stop) or ([] if config.chat else ["\n"])  # a base model goes on with another example
        self.system_role = config.system_role  # until a server says that its model's template has none
        self.answered_by: set[str] = set()
        self._warned: set[str] = set()  # the URLs of which a failure was logged
        self.model = config.model or self._only_model()

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        """As of every writer. Closing the iterator cancels the requests under way.

        Raises UserError when nothing is answered for a reason of STOPS_ALL, and after FAILURES_IN_A_ROW.
        """
        self.failed, self.last_error, self._in_a_row, self._works = 0, "", 0, False
        limit = self.config.concurrency
        servers = [
            _Server(url, openai.AsyncOpenAI(**self._options(url)), asyncio.Semaphore(limit)) for url in self.urls
        ]
        answers: asyncio.Queue[Any] = asyncio.Queue(2 * limit * len(servers))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="server writer", daemon=True)
        thread.start()

        def begin(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)

        begin(self._answer_all(servers, jobs, answers))
        try:
            while isinstance(item := begin(answers.get()).result(), tuple):
                yield item
        finally:
            begin(_end(servers)).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
        if item is not None:
            raise item

    def describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "writer": "server",
            "model": self.model,
            "answered_by": sorted(self.answered_by),  # what the alias of a hosted model stood for
            "url": self.urls,
            **{name: getattr(config, name) for name in ("chat", "max_tokens", "temperature", "top_p")},
            "stop": self.stop,
            "system": self.asked.system,
            "system_role": config.chat and self.system_role,
            "instruction": self.asked.instruction,
            "worked_examples": [] if config.chat else list(self.asked.examples),
        }

    async def _answer_all(self, servers: list[_Server], jobs: Sequence[Job], answers: asyncio.Queue[Any]) -> None:
        """Put (place, answer) of each job, then None, or the error that stopped it."""
        places, refused = iter(range(len(jobs))), list[int]()

        async def work(*servers: _Server) -> None:
            for place in places:  # shared by all: a slow server takes fewer
                try:
                    answer = await self._answer(servers[:2], jobs[place])
                except _Failure as failure:
                    self._count(failure, refused, place)
                else:
                    self._in_a_row, self._works = 0, True
                    await answers.put((place, answer))

        rotations = [servers[n:] + servers[:n] for n in range(len(servers))]
        try:
            await asyncio.gather(*(work(*some) for _ in range(self.config.concurrency) for some in rotations))
            self.failed += 0 if self._works else len(refused)
            for place in refused if self._works else ():
                await answers.put((place, Answer("")))
            await answers.put(None)
        except Exception as error:
            await answers.put(error)

    def _count(self, failure: _Failure, refused: list[int], place: int) -> None:
        """Raises UserError where the next jobs would fare no better."""
        self.last_error = str(failure)
        self._in_a_row += 1
        if failure.status in REFUSED_PROMPT:
            refused.append(place)
        else:
            self.failed += 1
        if failure.status in STOPS_ALL and not self._works:
            raise UserError(str(failure))
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise UserError(f"{failure} {self._in_a_row} jobs in a row failed; later, the same command continues.")

    async def _answer(self, servers: Sequence[_Server], job: Job) -> Answer:
        """By the first of the servers that gives one. Raises the last one's failure."""
        for server in servers:
            try:
                async with server.free:
                    return await self._ask(server, job)
            except _Failure as failure:
                if server is servers[-1] or failure.status in REFUSED_PROMPT:
                    raise
        raise AssertionError("the last server answers or raises")

    async def _ask(self, server: _Server, job: Job) -> Answer:
        endpoint = server.client.chat.completions if self.config.chat else server.client.completions
        with_role = self.system_role
        # Images are read in a thread, so that other requests do not wait for a disk.
        body = await asyncio.to_thread(self._body, job) if job.picture else self._body(job)
        try:
            reply = await endpoint.create(**body)
        except openai.APIStatusError as error:
            if with_role and _NO_SYSTEM_ROLE.search(error.response.text):
                self.system_role = False  # some templates, Gemma's for one, know none
                return await self._ask(server, job)
            raise self._failure(server.url, error) from None
        except (openai.APIError, ValueError, RecursionError) as error:  # the last two: no JSON
            raise self._failure(server.url, error) from None
        return self._read(server.url, reply)

    def _failure(self, url: str, error: Exception) -> _Failure:
        """What was said, on a line, short and without the key, and what to do."""
        failure, text = _Failure(), str(error)
        if isinstance(error, openai.APIStatusError):
            failure.status, text = error.status_code, f"status {error.status_code}, {error.response.text}"
        elif isinstance(error, openai.APITimeoutError):
            failure.status, text = 408, f"no answer in {self.config.timeout:g} s (--server.timeout or .concurrency)"
        elif isinstance(error, openai.APIConnectionError):
            failure.status, text = None, f"{error} ({error.__cause__})"
        advice = ADVICE.get(failure.status, "")
        failure.args = (f"{url}: {textwrap.shorten(self._hide(text), 300)}. {advice}".strip(),)
        if url not in self._warned:
            log.warning("%s Later failures there are only counted.", failure)
        self._warned.add(url)
        return failure

    def _read(self, url: str, reply: Any) -> Answer:
        """The answer without thoughts, up to a stop string, which some servers leave in. Raises _Failure."""
        try:
            choice = reply.choices[0]
            text = (choice.message.content or choice.message.refusal or "") if self.config.chat else choice.text
            if isinstance(text, list):
                text = "".join(part.get("text", "") for part in text)
            text, cut = self._hide(text), choice.finish_reason == "length"
        except (AttributeError, LookupError, TypeError):  # the openai package checks no shapes
            raise self._failure(url, ValueError(f"no answer of a language model: {reply!r}")) from None
        self.answered_by.add(self._hide(str(reply.model)))
        text = text.rpartition("</think>")[2]
        if text.lstrip().startswith("<think>"):
            text = ""
        for end in self.stop:
            text, found, _ = text.partition(end)
            cut = cut and not found
        return Answer(text, cut)

    def _body(self, job: Job) -> dict[str, Any]:
        """What is sent for a job."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,  # sent even when 1: vLLM would otherwise take the model's own
            "seed": job.seed,
            "extra_body": {},  # fields that the openai package does not know
            "extra_headers": {"X-Request-Id": hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]},
        }
        if self.stop:
            body["stop"] = self.stop
        for pair in self.config.rename:
            old, _, new = pair.partition("=")
            value = body.pop(old, None)
            if new and value is not None:
                body["extra_body"][new] = value
        # A JSON file of captions may hold halves of characters, which no request can.
        first, second = (text.encode("utf-8", "replace").decode() for text in (job.first, job.second))
        if not self.config.chat:
            return body | {"prompt": self.asked.with_examples(first, second)}
        content: Any = self.asked.question(first, second)
        system = [{"role": "system", "content": self.asked.system}] if self.system_role else []
        if not system:
            content = f"{self.asked.system}\n\n{content}"
        if job.picture:
            image = {"type": "image_url", "image_url": {"url": _as_url(self.look(job.picture))}}
            content = [image, {"type": "text", "text": content}]
        return body | {"messages": [*system, {"role": "user", "content": content}]}

    def _options(self, url: str) -> dict[str, Any]:
        return {
            "base_url": url,
            "api_key": self._key or "none",
            "timeout": self.config.timeout,
            "max_retries": self.config.retries,
        }

    def _only_model(self) -> str:
        url = self.urls[0]
        try:
            with openai.OpenAI(**self._options(url)) as client:
                names = [str(model.id) for model in client.models.list().data]
        except openai.APIError as error:
            raise UserError(f"{self._failure(url, error)} --server.model names a model without asking.") from None
        except (AttributeError, TypeError, ValueError):  # another kind of server
            names = []
        if len(names) != 1:
            raise UserError(f"{url} lists {', '.join(names[:20]) or 'no model'}; choose one by --server.model")
        return names[0]

    def _checked(self, url: str) -> str:
        """The address, which is written beside the sentences, so that no password may be in it."""
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url := url.strip().rstrip("/")):
            raise UserError(
                "server.url has an address that is not like http://localhost:8000/v1, without password or anything "
                "after ? or #; a key belongs into the environment variable that --server.api_key_env names"
            )
        parts = urlsplit(url)
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("%s gets the key unencrypted; --server.api_key_env '' sends none", url)
        return url

    def _hide(self, text: str) -> str:
        """Without the key, should a server send it back. One of fewer than 8 characters is a dummy such as EMPTY."""
        pattern = "".join(rf"\\*{re.escape(sign)}" for sign in self._key)  # however it is escaped
        return re.sub(pattern, "[key]", text) if len(self._key) >= 8 else text


async def _end(servers: list[_Server]) -> None:
    """Cancel the requests under way and close the connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for server in servers:
        await server.client.close()
    await asyncio.get_running_loop().shutdown_default_executor()


def _as_url(image: Image.Image) -> str:
    """A JPEG of at most LONGEST_SIDE inside an address."""
    image = image.convert("RGB")  # a copy, which may shrink
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
