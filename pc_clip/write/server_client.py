"""One OpenAI-compatible server: a request to it, and what its answers and failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from pc_clip.core.errors import UserError, nearest
from pc_clip.write.writers import Job

if TYPE_CHECKING:
    import openai  # otherwise where it is used: it takes long to import


log = logging.getLogger(__name__)

SET_ASIDE_AFTER = 3  # failures in a row, after which one request at a time finds out whether a server is back
EASY = Job("a dog on a sofa", "a cat on a chair", 0)  # asked to see whether a server is at fault, or a prompt
PLAIN = "@plain"  # the picture of an easy prompt: a server that sees none is at fault, not the picture
EASY_TRIES = 3  # how often it is asked, and how often a prompt must fail beside it
_TRANSIENT = {408, 409, 425, 429}  # and 5xx
_TOO_LONG = re.compile(
    r"context.{0,20}(length|size|window)|maximum model length|max_new_tokens.{0,20} must be|prompt is too long", re.I
)
_FILTERED = re.compile(r"content.?(filter|policy|management)", re.I)
_NO_SYSTEM = re.compile(r"system role|roles must alternate|only user and assistant roles", re.I)


def request_id(job: Job) -> str:
    """What the X-Request-Id of a job's requests begins with: a hash of all that it is made of."""
    return hashlib.sha256(json.dumps(job if job.picture else job[:3]).encode()).hexdigest()[:16]


def easy_one(job: Job) -> Job:
    """A job of the same kind, with or without a picture, that any server can do that can do such jobs."""
    return EASY._replace(picture=PLAIN) if job.picture else EASY


# -- what can go wrong ---------------------------------------------------------------------------------


class Again(Exception):
    """A failure that may pass.

    after: seconds the server asks for, 0 where it only says that it is asked too much; garbage: it answered, but not
    with a sentence.
    """

    def __init__(self, reason: str, after: float | None = None, garbage: bool = False) -> None:
        super().__init__(reason)
        self.after, self.garbage = after, garbage


class AskAnew(Again):
    """The next try will be another request, so it need not wait."""


class Fatal(Exception):
    """A failure that would come again. status, said: of the answer; body: all of it, to look for words in."""

    def __init__(self, reason: str, status: int, said: str, body: str) -> None:
        super().__init__(reason)
        self.status, self.said, self.body = status, said, body


def failure_of(error: openai.APIError, writer: Any, url: str) -> Again | Fatal:
    """What an error of the client means. No message of the client itself is passed on, only what the server said."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return _late(writer)
    if not isinstance(error, openai.APIStatusError):
        cause = str(error.__cause__ or "") or type(error.__cause__ or error).__name__
        return Again(f"no connection, or one cut short ({writer.hide(shortened(cause))})")
    status, body = error.status_code, error.response.text[:10_000]
    said = _said(body, writer)
    if status in _TRANSIENT or (status >= 500 and not _TOO_LONG.search(body)):
        # The words of `transformers serve` on any exception, and so on a template that refuses the system role.
        unsure = status == 500 and writer.config.chat and writer.system_role and not writer.answered
        hint = "; if its chat template has no system role, --server.system_role false helps" if unsure else ""
        after = _asked_wait(error.response.headers)
        return Again(f"status {status} ({said}){hint}", 0.0 if after is None and status == 429 else after)
    if status in (401, 403):
        known = "refuses the key in" if writer.secret.key else "wants a key, which belongs into"
        return Fatal(f"{url} {known} the environment variable {writer.config.api_key_env} ({said})", status, said, body)
    return Fatal(f"{url} refused the request with status {status} ({said})", status, said, body)


def _late(writer: Any) -> Again:
    return Again(f"no answer within {writer.config.timeout:g} s (--server.timeout, --server.concurrency)")


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


def _said(body: str, writer: Any) -> str:
    """A server's words on what went wrong, on one line, short, and without the key."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        body = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return shortened(writer.hide(body)) or "nothing said"


def shortened(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


class Client:
    """One URL: its connections, how many requests it may have, and until when it is left alone."""

    def __init__(self, writer: Any, url: str) -> None:
        import openai

        self.writer, self.url, self.error = writer, url, openai.APIError
        self.openai = openai.AsyncOpenAI(base_url=url, **writer.options(writer.config.timeout))
        self.limit = writer.config.concurrency  # falls to 1 when it is set aside, and grows with each answer
        self.busy = self.asked = self.failures = self.rests = 0
        self.rest_until = self.told = 0.0

    def free(self, now: float) -> bool:
        return self.busy < self.limit and now >= self.rest_until

    async def ask(self, job: Job, name: str, last: str = "") -> str:
        """The answer; "" where the server cannot answer this prompt but can answer others. Raises Again, or UserError.

        last: why all is given up when the server is at fault, not the prompt; empty where there will be other tries.
        """
        if not last:
            return await self._try(job, name)
        for count in range(EASY_TRIES):  # it may just have come back: one failure beside an easy answer says little
            try:
                return await self._try(job, f"{name}-{count}")
            except AskAnew:
                raise
            except Again as failure:
                said = str(failure)
                if failure.after is not None or not await self._seems_to_work(easy_one(job)):
                    raise UserError(last) from None
        return self._unanswerable(said)

    async def _works(self, easy: Job) -> bool:
        """Whether it answers an easy prompt, rather than refusing it. Raises Again when it does neither."""
        for tries in range(1, EASY_TRIES + 1):
            try:
                await asyncio.wait_for(self._ask(easy, f"easy-{time.monotonic_ns()}"), self.writer.config.timeout)
                return True
            except asyncio.TimeoutError:
                raise _late(self.writer) from None
            except self.error as error:
                failure = failure_of(error, self.writer, self.url)
            except Again as garbage:
                failure = garbage
            if isinstance(failure, Fatal):
                return False
            if failure.after or tries == EASY_TRIES:
                raise failure
            await asyncio.sleep(self.writer.wait(EASY.seed, tries))
        raise AssertionError("the last try returns or raises")

    async def _seems_to_work(self, easy: Job) -> bool:
        with contextlib.suppress(Again):
            return await self._works(easy)
        return False

    async def _try(self, job: Job, name: str) -> str:
        try:
            with_role = self.writer.system_role
            try:
                return await asyncio.wait_for(self._ask(job, name), self.writer.config.timeout)
            except self.error as error:
                failure = failure_of(error, self.writer, self.url)
            if not isinstance(failure, Fatal):
                raise failure
            if with_role and self.writer.config.chat and _NO_SYSTEM.search(failure.body):
                self.writer.system_role = False  # some templates, Gemma's for one, know none
                raise AskAnew(str(failure))
            own = failure.status in (400, 413, 422) or _TOO_LONG.search(failure.body) or _FILTERED.search(failure.body)
            if own and await self._works(easy_one(job)):
                return self._unanswerable(failure.said)
            if _TOO_LONG.search(failure.body):
                raise UserError(
                    f"{self.url} refuses even a short prompt ({failure.said}). Serve the model with a longer context, "
                    "lower --server.max_tokens, or shorten --prompt; the last two with another --name."
                )
            eyes = " A model that sees no pictures takes --rank.pictures false, with another --name." * bool(
                job.picture
            )
            raise UserError(await self._advice(failure) + eyes)
        except asyncio.TimeoutError:
            raise _late(self.writer) from None

    async def _ask(self, job: Job, name: str) -> str:
        chat = self.writer.config.chat
        endpoint = self.openai.chat.completions if chat else self.openai.completions
        headers = {"X-Request-Id": name}
        # Pictures are read in a thread, so that the other requests do not wait for a disk.
        body = await asyncio.to_thread(self.writer.body, job) if job.picture else self.writer.body(job)
        reply = await endpoint.with_raw_response.create(**body, extra_headers=headers)
        text = self._read(reply.http_response.text)
        self.writer.answered += 1
        for end in self.writer.stop:  # some servers go on after it, or leave it in
            text = text.split(end, 1)[0]
        return self.writer.hide(text)

    def _read(self, body: str) -> str:
        """The sentence in a server's answer. Raises Again for anything that is not one."""
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            text = choice["message"]["content"] if self.writer.config.chat else choice["text"]
            why = choice.get("finish_reason")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise Again(f"no answer of a language model: {_said(body, self.writer)}", garbage=True) from None
        if isinstance(found.get("model"), str):
            self.writer.answered_by.add(self.writer.hide(found["model"]))
        if isinstance(text, str):
            return text
        if why == "content_filter":
            return ""
        if isinstance(choice.get("message"), dict) and isinstance(choice["message"].get("refusal"), str):
            return choice["message"]["refusal"]
        hint = f"; --server.max_tokens {self.writer.config.max_tokens} may be too few" if why == "length" else ""
        raise Again(f"an answer without text{hint}: {_said(body, self.writer)}", garbage=True)

    def _unanswerable(self, said: str) -> str:
        self.writer.unanswered += 1
        if self.writer.unanswered == 1:
            log.warning("%s cannot answer a prompt; it and any other such count as empty (%s)", self.url, said)
        return ""

    async def _advice(self, failure: Fatal) -> str:
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

    def failed(self, failure: Again, now: float) -> None:
        """Set aside when it asks for that, or after several failures in a row."""
        self.failures += 1
        if failure.after:
            self._rest(now + failure.after, failure)
        elif self.failures >= SET_ASIDE_AFTER and now >= self.rest_until:
            self._rest(now + self.writer.wait(self.asked, self.rests + 1), failure)

    def _rest(self, until: float, failure: Again) -> None:
        if not self.told or time.monotonic() - self.told > 60:  # what goes on for long is said once a minute
            log.warning("%s: %s; it is left alone for a while, then tried again", self.url, failure)
            self.told = time.monotonic()
        self.rests += 1
        self.limit = 1
        self.rest_until = max(self.rest_until, until)
