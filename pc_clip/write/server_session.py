"""The jobs of one stream, shared out over all servers.

One coroutine, in a thread of its own, decides which job goes to which server; one request is one task (Client.ask). A
job is always in one place: being asked, waiting to be asked again, or handed on. So none is lost and none comes
twice, whatever a server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pc_clip.write.server_client import Again, AskAnew, Client, request_id, shortened
from pc_clip.write.writers import Job

log = logging.getLogger(__name__)

ANSWER_TRIES = 6  # how often an answer that is none is asked for again


@dataclass(order=True)
class _Open:
    """A job that was begun. ready: when it may be asked (again); since: when it first failed."""

    ready: float
    place: int
    job: Job = field(compare=False)
    tries: int = field(default=0, compare=False)
    garbage: int = field(default=0, compare=False)
    since: float | None = field(default=None, compare=False)
    last: Client | None = field(default=None, compare=False)
    given_up: str = field(default="", compare=False)


class Session:
    """Jobs in, finished sentences out, over a thread's event loop.

    Jobs are begun as places are free: only a window of them is open, however many there are.
    """

    def __init__(self, writer: Any, jobs: Sequence[Job]) -> None:
        self.writer, self.jobs = writer, jobs
        self.finished: queue.Queue[tuple[int, str] | None] = queue.Queue()  # None after the last
        self.error: BaseException | None = None
        self.begun = 0
        self.again: list[_Open] = []  # a heap, by when they may be asked again
        self.flying: dict[asyncio.Task[str], tuple[_Open, Client]] = {}
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
        self.clients = [Client(self.writer, url) for url in self.writer.urls]
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

    def _begin(self, opened: _Open, client: Client) -> None:
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
        elif isinstance(failure, AskAnew):
            heapq.heappush(self.again, opened)
        elif isinstance(failure, Again):
            self._put_back(opened, client, failure)
        else:
            self.error = self.error or failure

    def _put_back(self, opened: _Open, client: Client, failure: Again) -> None:
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
        """Some last tries, which tell a server at fault from a prompt that it cannot answer (Client.ask)."""
        about = shortened(opened.job.picture or opened.job.first, 60)
        spent = time.monotonic() - (opened.since or 0.0)
        opened.given_up = (
            f"{reason}. Given up after {opened.tries} tries in {spent:.0f} s, for {about!r} "
            f"(request {request_id(opened.job)}). What is finished is kept; the same command continues."
        )
        # At once, also where all are set aside or full; by the server that is most likely to work.
        self._begin(opened, min(self.clients, key=lambda c: (c.failures, c is opened.last, c.busy)))
