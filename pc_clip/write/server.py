"""Sentences by language models behind OpenAI-compatible servers: vLLM, llama.cpp, Ollama, TGI, or a hosted one.

The openai package tries again what may pass (lost connections, time-outs, 408, 409, 429, 5xx), with growing waits or as
Retry-After asks.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import logging
import os
import re
import textwrap
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

import openai
from PIL import Image, ImageOps

from pc_clip.core.config.write import ServerConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.write.prompts import Prompt
from pc_clip.write.writers import Answer, Job, Writer

log = logging.getLogger(__name__)

NEW_LIMIT = "max_completion_tokens"  # what newer servers call max_tokens
FAILURES_IN_A_ROW = 20  # so many jobs without an answer between them: the fault is hardly theirs
ADVICE = (
    "check --server.url (which mostly ends in /v1), .model, .chat, .system_role (which not all chat templates know), "
    ".max_tokens, the key (.api_key_env) and, for models that see no images, --rank.pictures; then the same command "
    "continues"
)
LONGEST_SIDE = 1024  # pixels of an image that is sent; vision-language models shrink larger ones themselves
_RENAMED = re.compile(r"(max_tokens|temperature|top_p|seed|stop)=\w*")


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"server.extra needs a JSON object, as in '{{\"top_k\": 5}}'; found {text!r}")
    return fields


class _Failure(Exception):
    """Why a job has no answer."""


class _Server(NamedTuple):
    url: str
    client: openai.AsyncOpenAI
    free: asyncio.Semaphore


class ServerWriter(Writer):
    """Asks OpenAI-compatible servers, many requests at once.

    A job that fails, also at the next server, is left out of the stream (`failed`, `last_error`).

    asked: the prompt. look: gives the image of an id, for jobs that have one; called from several threads.

    Raises UserError for settings that cannot be right, and when no model is named and there is not just one.
    """

    def __init__(
        self, config: ServerConfig, prompt: Prompt, *, look: Callable[[str], Image.Image] | None = None
    ) -> None:
        self.config, self.asked, self.look = config, prompt, look
        for name, least in (("concurrency", 1), ("max_tokens", 1), ("retries", 0)):
            check_at_least(f"server.{name}", getattr(config, name), least)
        self.urls = [url.strip().rstrip("/") for url in config.url]
        # They are written beside the sentences, so that no password may be in them.
        if not self.urls or not all(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url) for url in self.urls):
            raise UserError(
                "server.url needs addresses like http://localhost:8000/v1, without password or anything after ? or #; "
                "a key belongs into the environment variable that --server.api_key_env names"
            )
        if "" in config.stop or not config.timeout > 0:
            raise UserError("server.timeout needs seconds, and server.stop no empty string")
        if wrong := [pair for pair in config.rename if not _RENAMED.fullmatch(pair)]:
            raise UserError(
                f"server.rename has {wrong[0]!r}; write max_tokens=max_completion_tokens, or seed= to leave it out; "
                "max_tokens, temperature, top_p, seed and stop can be renamed"
            )
        self.extra = _json_object(config.extra)
        self._key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
        for library in ("httpx2", "openai"):
            logging.getLogger(library).setLevel(logging.WARNING)  # they would write a line for each request
        self.stop = list(config.stop) or ([] if config.chat else ["\n"])  # a base model goes on with another example
        self.answered_by: set[str] = set()
        self._warned: set[str] = set()  # the URLs of which a failure was logged
        self.model, self.rename = config.model or self._only_model(), config.rename

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        """See Writer. Closing the iterator cancels pending requests.

        Raises UserError after FAILURES_IN_A_ROW.
        """
        loop = asyncio.new_event_loop()  # in a thread, because a notebook has a loop of its own
        thread = threading.Thread(target=loop.run_forever, name="server writer", daemon=True)
        thread.start()

        def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        answers = self._answer_all(jobs)
        try:
            while answer := run(_next(answers)):
                yield answer
        finally:
            run(_end(answers))
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "writer": "server",
            "model": self.model,
            "answered_by": sorted(self.answered_by),  # what the alias of a hosted model stood for
            "url": self.urls,
            **{name: getattr(config, name) for name in ("chat", "system_role", "max_tokens", "temperature", "top_p")},
            "stop": self.stop,
            "extra": self.extra,
            "system": self.asked.system,
            "instruction": self.asked.instruction,
            "worked_examples": [] if config.chat else list(self.asked.examples),
        }

    async def _answer_all(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Answer], None]:
        """(place, answer) of each job; no more jobs are begun than all servers have room for."""
        self.failed, self.last_error, in_a_row, limit = 0, "", 0, self.config.concurrency
        options = {"api_key": self._key or "none", "timeout": self.config.timeout, "max_retries": self.config.retries}
        servers = [
            _Server(url, openai.AsyncOpenAI(base_url=url, **options), asyncio.Semaphore(limit)) for url in self.urls
        ]
        rotations = itertools.cycle([servers[n:] + servers[:n] for n in range(len(servers))])
        places, under_way = iter(range(len(jobs))), dict[asyncio.Task, int]()
        try:
            while True:
                for place in itertools.islice(places, limit * len(servers) - len(under_way)):
                    under_way[asyncio.create_task(self._answer(next(rotations), jobs[place]))] = place
                if not under_way:
                    return
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    place, answer = under_way.pop(task), task.result()
                    if isinstance(answer, Answer):
                        in_a_row = 0
                        yield place, answer
                        continue
                    self.failed, self.last_error, in_a_row = self.failed + 1, str(answer), in_a_row + 1
                    if in_a_row >= FAILURES_IN_A_ROW:
                        raise UserError(f"{answer}. {in_a_row} jobs in a row failed; {ADVICE}")
        finally:
            for server in servers:
                await server.client.close()

    async def _answer(self, servers: Sequence[_Server], job: Job) -> Answer | _Failure:
        """By the first of the servers that has room or, where that fails, the next; or the last one's failure."""
        failure = _Failure()
        for server in sorted(servers, key=lambda server: server.free.locked())[:2]:  # a slow server takes fewer
            try:
                async with server.free:
                    return await self._ask(server, job)
            except _Failure as error:
                failure = error
        return failure

    async def _ask(self, server: _Server, job: Job) -> Answer:
        """Raises _Failure."""
        endpoint = server.client.chat.completions if self.config.chat else server.client.completions
        # Images are read in a thread, so that other requests do not wait for a disk.
        body = await asyncio.to_thread(self._body, job) if job.picture else self._body(job)
        try:
            reply = await endpoint.create(**body)
        except openai.BadRequestError as error:
            if NEW_LIMIT not in error.response.text or "max_tokens" not in body:
                raise self._failure(server.url, error) from None
            if self.rename == self.config.rename:
                log.info("%s asks for %s in place of max_tokens", server.url, NEW_LIMIT)
            self.rename = [*self.config.rename, f"max_tokens={NEW_LIMIT}"]
            return await self._ask(server, job)
        except (openai.APIError, ValueError, RecursionError) as error:  # the last two: no JSON
            raise self._failure(server.url, error) from None
        try:
            choice = reply.choices[0]
            text = (choice.message.content or choice.message.refusal or "") if self.config.chat else choice.text
            if isinstance(text, list):  # of parts, as some servers answer
                text = "".join(part["text"] for part in text if part["type"] == "text")
            return self._read(text, choice.finish_reason == "length", reply.model)
        except (AttributeError, LookupError, TypeError):  # the openai package checks no shapes
            raise self._failure(server.url, ValueError(f"no answer of a language model: {reply!r}")) from None

    def _failure(self, url: str, error: Exception) -> _Failure:
        """The error on one line, shortened, without the key."""
        text = str(error)
        if isinstance(error, openai.APIStatusError):
            text = f"status {error.status_code}, {error.response.text}"
        elif isinstance(error, openai.APITimeoutError):
            text = f"no answer in {self.config.timeout:g} s (--server.timeout or .concurrency)"
        elif isinstance(error, openai.APIConnectionError):
            text = f"{error} ({error.__cause__})"
        failure = _Failure(f"{url}: {textwrap.shorten(self._hide(text), 300)}")
        if url not in self._warned:
            log.warning("%s. Later failures there are only counted.", failure)
        self._warned.add(url)
        return failure

    def _read(self, text: str, cut: bool, model: str) -> Answer:
        """The answer without thoughts, up to a stop string, which some servers leave in."""
        self.answered_by.add(self._hide(str(model)))
        text = self._hide(text).rpartition("</think>")[2]
        if text.lstrip().startswith("<think>"):
            text = ""
        for end in self.stop:
            text, stopped, _ = text.partition(end)
            cut = cut and not stopped
        return Answer(text, cut)

    def _body(self, job: Job) -> dict[str, Any]:
        """The request body of a job."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,  # sent even when 1: vLLM would otherwise take the model's own
            "seed": job.seed,
            "extra_body": dict(self.extra),  # fields that the openai package does not know
            "extra_headers": {"X-Request-Id": hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]},
        }
        if self.stop:
            body["stop"] = self.stop
        for pair in self.rename:
            old, _, new = pair.partition("=")
            value = body.pop(old, None)
            if new and value is not None:
                body["extra_body"][new] = value
        # A JSON file of captions may hold halves of characters, which no request can.
        first, second = (text.encode("utf-8", "replace").decode() for text in (job.first, job.second))
        if not self.config.chat:
            return body | {"prompt": self.asked.with_examples(first, second)}
        content: Any = self.asked.question(first, second)
        system = [{"role": "system", "content": self.asked.system}] if self.config.system_role else []
        if not system:
            content = f"{self.asked.system}\n\n{content}"
        if job.picture:
            image = {"type": "image_url", "image_url": {"url": _as_url(self.look(job.picture))}}
            content = [image, {"type": "text", "text": content}]
        return body | {"messages": [*system, {"role": "user", "content": content}]}

    def _only_model(self) -> str:
        url = self.urls[0]
        try:
            with openai.OpenAI(base_url=url, api_key=self._key or "none", timeout=self.config.timeout) as client:
                names = [str(model.id) for model in client.models.list().data]
        except (openai.APIError, AttributeError, TypeError, ValueError) as error:  # the last three: no list of models
            raise UserError(f"{self._failure(url, error)}; name a model by --server.model, or {ADVICE}") from None
        if len(names) != 1:
            raise UserError(f"{url} lists {', '.join(names[:20]) or 'no model'}; choose one by --server.model")
        return names[0]

    def _hide(self, text: str) -> str:
        """Remove the API key, should a server return it. Keys under 8 characters are dummies such as EMPTY."""
        pattern = "".join(rf"\\*{re.escape(sign)}" for sign in self._key)  # however it is escaped
        return re.sub(pattern, "[key]", text) if len(self._key) >= 8 else text


async def _next(answers: AsyncIterator[Any]) -> Any:
    return await anext(answers, None)


async def _end(answers: AsyncGenerator[Any, None]) -> None:
    """Cancel what is under way, waiting for an answer too, and close the connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await answers.aclose()
    await asyncio.get_running_loop().shutdown_default_executor()


def _as_url(image: Image.Image) -> str:
    """A JPEG of at most LONGEST_SIDE inside an address."""
    image = ImageOps.exif_transpose(image).convert("RGB")  # a copy, which may shrink; no server sees EXIF
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
