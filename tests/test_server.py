"""The server writer: each answer belongs to its job, nothing comes twice, and what fails is counted, never written."""

import base64
import dataclasses
import io
import itertools
import logging
import signal
import threading
import time
import traceback
from collections.abc import Sequence

import openai
import pytest
from faulty_server import HALF, HTML, RESET, Server, as_json, closing, saying, sentence
from PIL import Image
from writing_runs import meta, on_captions

from pc_clip.core.config.write import ServerConfig, WordingConfig
from pc_clip.core.errors import UserError
from pc_clip.write import generate, prompts
from pc_clip.write.server import ServerWriter
from pc_clip.write.writers import Job

PAIRS = prompts.read(prompts.FOLDER / "pairs.yaml")
JOBS = [Job(f"a dog on {n} sofas", f"{n} cats in a kitchen", 10 * n) for n in range(40)]
KEY = 'sk-very"secret\\-0123456789'


@pytest.fixture(autouse=True)
def _quick_and_without_key(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.004)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server():
    with closing(server := Server()):
        yield server


def writer(*servers, look=None, **options):
    options = {"model": "small", "timeout": 5.0, "retries": 4, "concurrency": 8} | options
    return ServerWriter(ServerConfig(url=[getattr(s, "url", s) for s in servers], **options), PAIRS, look=look)


def check(results, jobs=JOBS):
    """Every job once, and with the answer to its own captions and seed."""
    assert sorted(results) == [(n, sentence(*job)) for n, job in enumerate(jobs)]


def failing(reply, *seeds):
    """The reply for jobs of these seeds, or for all completions."""
    return lambda path, headers, body: reply if "complet" in path and (not seeds or body["seed"] in seeds) else None


def dead_url():
    with closing(gone := Server()):
        return gone.url


def test_chat_requests_have_a_system_prompt_and_the_jobs_seed(server):
    options = {"max_tokens": 33, "temperature": 0.5, "top_p": 0.9, "stop": ["END"]}
    rename = ["max_tokens=max_completion_tokens", "top_p="]
    model = writer(server, **options, rename=rename, extra='{"top_k": 5}')
    check(list(model.stream(JOBS)))
    question = PAIRS.question(JOBS[2].first, JOBS[2].second)
    messages = [{"role": "system", "content": PAIRS.system}, {"role": "user", "content": question}]
    asked = {"model": "small", "top_k": 5, "temperature": 0.5, "seed": 20, "stop": ["END"], "messages": messages}
    assert asked | {"max_completion_tokens": 33} in [body for _, _, body in server.seen]
    described = model.describe()
    assert described["answered_by"] == ["small-0125"] and described["system"] == PAIRS.system
    assert {name: described[name] for name in options} == options and described["url"] == [server.url]


def test_a_base_model_gets_worked_examples_and_ends_with_the_line(server):
    check(list(writer(server, chat=False).stream(JOBS)))
    half = Job("a dog \ud83d", "a cat", 1)  # half a character, as a file of captions may hold
    check(list(writer(server, chat=False).stream([half])), [half._replace(first="a dog ?")])
    bodies = {body["seed"]: body for path, _, body in server.seen if path == "/v1/completions"}
    assert bodies[10]["prompt"] == PAIRS.with_examples(JOBS[1].first, JOBS[1].second)
    assert bodies[10]["stop"] == ["\n"]


def test_an_answer_is_read_without_thoughts_and_says_whether_it_was_cut(server):
    cases = {
        "plain": (saying("A bus."), {}, ("A bus.", False)),
        "cut": (saying("A bu", "length"), {}, ("A bu", True)),
        "a stop string left in": (saying("A bus. END A tree", "length"), {"stop": ["#", "END"]}, ("A bus. ", False)),
        "another line": (saying("A bus.\n\nPicture 1: A tree."), {"chat": False}, ("A bus.", False)),
        "thoughts": (saying("<think>So END\n</think>A bus."), {"stop": ["END"]}, ("A bus.", False)),
        "cut in thought": (saying("<think>So", "length"), {}, ("", True)),
        "only thoughts": (saying(None, "length"), {}, ("", True)),
        "filtered": (saying(None, "content_filter"), {}, ("", False)),
        "a refusal": (saying(None, refusal="I'm sorry, no."), {}, ("I'm sorry, no.", False)),
        "parts": (saying([{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]), {}, ("A dog.", False)),
    }
    wrong = {}
    for name, (reply, options, expected) in cases.items():
        server.instead = failing(reply)
        [answer] = writer(server, **options).write(JOBS[:1])
        if (answer, answer.cut) != expected:
            wrong[name] = (answer, answer.cut)
    assert not wrong


def test_a_server_that_asks_for_max_completion_tokens_gets_them(server):
    message = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    refusal = as_json({"error": {"message": message, "code": "unsupported_parameter"}}, 400)
    server.instead = lambda path, _, body: refusal if "max_tokens" in body else None
    check(list(writer(server, max_tokens=33, concurrency=2).stream(JOBS)))
    bodies = [body for path, _, body in server.seen if "seed" in body]
    assert len(bodies) <= len(JOBS) + 2 and bodies[-1]["max_completion_tokens"] == 33


def test_a_template_without_a_system_role_gets_it_in_the_question(server):
    check(list(writer(server, system_role=False).stream(JOBS)))
    [message] = server.seen[-1][2]["messages"]
    assert message["role"] == "user" and message["content"].startswith(f"{PAIRS.system}\n\nPicture 1:")


def test_the_only_model_is_found_and_otherwise_one_has_to_be_named(server):
    assert writer(server, model="").model == "small"
    server.models = ("large", "small")
    with pytest.raises(UserError, match=r"large, small.*--server\.model"):
        writer(server, model="")
    for reply in (as_json({"data": []}), HTML, as_json({}, 404), RESET, as_json([1])):
        server.instead = lambda *_, reply=reply: reply
        with pytest.raises(UserError, match=r"--server\."):
            writer(server, model="", retries=0)


def test_a_job_shows_its_own_picture_before_its_question(server):
    def size(path, headers, body):
        picture, question = body["messages"][-1]["content"]
        kind, content = picture["image_url"]["url"].split(",", 1)
        width, height = Image.open(io.BytesIO(base64.b64decode(content))).size
        return saying(f"{kind} {width}x{height} {question['text'] == PAIRS.question('a', 'b')}")

    server.instead = size
    pictures = {"small": Image.new("RGB", (30, 20)), "large": Image.new("L", (3000, 1500))}
    jobs = [Job("a", "b", 0, name) for name in pictures]
    texts = writer(server, look=pictures.__getitem__).write(jobs)
    assert texts == [f"data:image/jpeg;base64 {size} True" for size in ("30x20", "1024x512")]
    assert pictures["large"].size == (3000, 1500)
    with pytest.raises(KeyError, match="gone"):
        writer(server, look=pictures.__getitem__).write([Job("a", "b", 0, "gone")])


def test_servers_share_the_load_within_their_bounds():
    with closing(a := Server(), b := Server()):
        a.instead = b.instead = lambda *_: time.sleep(0.02)
        check(list(writer(a, b, concurrency=3).stream(JOBS)))
        assert len(a.seen) >= 15 and len(b.seen) >= 15
        assert a.most == b.most == 3


def test_a_job_of_a_dead_server_is_done_by_the_next(server, caplog):
    url = dead_url()
    check(list(writer(url, server).stream(JOBS)))
    assert [url in record.getMessage() for record in caplog.records if record.name.startswith("pc_clip")] == [True]
    assert server.most <= 8


class Counted(Sequence):
    """Half a million jobs, made as they are asked for."""

    made = 0

    def __len__(self):
        return 500_000

    def __getitem__(self, n):
        self.made += 1
        return Job(f"dog {n}", f"cat {n}", n)


@pytest.mark.parametrize("interrupted", [False, True])
def test_requests_follow_the_reader_and_are_cancelled_with_it(server, interrupted):
    jobs = Counted()
    server.instead = lambda path, headers, body: time.sleep(30) if body["seed"] >= 20 else None
    stream = writer(server, concurrency=4).stream(jobs)
    assert len(list(itertools.islice(stream, 20))) == 20
    time.sleep(0.3)
    assert jobs.made <= 20 + 4
    interrupt = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    begun = time.monotonic()
    if interrupted:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    else:
        stream.close()
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begun < 5
    assert not any(thread.name == "server writer" for thread in threading.enumerate())


GARBAGE = {"html": HTML, "no choices": as_json({"choices": []}), "no JSON": (*as_json({})[:2], b"The first")}
BROKEN = {"500": as_json({}, 500), "reset": RESET, "half": HALF, "429": as_json({}, 429, Retry_After_ms="3")}


@pytest.mark.parametrize("fault", BROKEN | GARBAGE)
def test_faults_are_retried_and_permanent_failures_counted(server, fault):
    failed = set()

    def once(path, headers, body):
        if body["seed"] not in failed and fault in BROKEN:
            failed.add(body["seed"])
            return BROKEN[fault]

    server.instead = once
    model = writer(server)
    check(list(model.stream(JOBS)))
    assert len(server.seen) == len(JOBS) + len(failed) and model.failed == 0
    assert len({headers["x-request-id"] for _, headers, _ in server.seen}) == len(JOBS)
    server.instead = failing((BROKEN | GARBAGE)[fault], 50)
    with pytest.raises(UserError, match=f"1 of 40 sentences could not be written.*{server.url}"):
        model.write(JOBS)
    assert model.failed == 1


@pytest.mark.slow
def test_a_server_that_answers_nothing_ends_it_early_with_what_to_do(server):
    for status, tries in ((401, 1), (404, 1), (500, 5), (400, 1)):
        server.instead = failing((status, {}, b"no\nway"))
        server.seen.clear()
        with pytest.raises(UserError, match=f"{server.url}: status {status}, no way.* 20 jobs in a row failed; check"):
            list(writer(server, concurrency=2).stream(JOBS))
        assert len(server.seen) <= 21 * tries
    with pytest.raises(UserError, match=r"Connection error.*check --server\.url"):
        list(writer(dead_url()).stream(JOBS))


def test_missing_sentences_are_retried_or_counted(server):
    out_of_memory = as_json({"error": {"message": "out of memory"}}, 500)
    server.instead = lambda *_: out_of_memory if len(server.seen) > 25 else None
    settings = ServerConfig(url=[server.url], model="small", retries=0, concurrency=1)
    captions = on_captions([[f"a dog on {n} sofas"] for n in range(9)])
    config = dataclasses.replace(captions, writer="server", n_pairs=30, server=settings, wording=WordingConfig())
    with pytest.raises(UserError, match=r"5 of 30 sentences.*out of memory.*same command continues"):
        generate.generate(config)
    server.seen.clear()
    left_out = generate.generate(dataclasses.replace(config, name="b", allow_missing=True))
    server.seen.clear()
    server.instead = lambda *_: saying("The first image shows", "length")
    continued = generate.generate(config)
    assert meta(left_out)["counts"] == {"kept": 25, "missing": 5} and len(server.seen) == 5
    assert meta(continued)["counts"] == {"kept": 25, "cut": 5}


@pytest.mark.parametrize("status", ["answer", 200, 400, 401, 429, 500])
def test_the_key_is_in_no_log_no_error_and_no_answer(server, status, monkeypatch, caplog):
    def echo(path, headers, body):
        texts = f"you sent {headers} and {KEY}" + "x" * 300
        return saying(texts) if status == "answer" else as_json({"error": {"message": texts}}, status)

    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.instead = echo
    model, shown = writer(server, retries=1), []
    try:
        shown.append(str(list(model.stream(JOBS))))
    except UserError as error:
        shown += traceback.format_exception(type(error), error, error.__traceback__)
    shown += [str(model.describe()), repr(model), model.last_error, caplog.text]
    assert any(headers["authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    assert not any(form in text for text in shown for form in (KEY, KEY[:7]))


def test_settings_that_cannot_be_right_are_errors():
    urls = ([], *([url] for url in ("http://me:pw@a/v1", "http://a/v1?key=pw", "a:1/v1", "ftp://a")))
    cases = [("url", value) for value in urls]
    cases += [("concurrency", 0), ("max_tokens", 0), ("retries", -1), ("timeout", 0.0), ("stop", ["END", ""])]
    for name, value in (*cases, ("rename", ["model=other"]), ("extra", "[1]"), ("extra", "{")):
        with pytest.raises(UserError, match=rf"server\.{name}") as raised:
            ServerWriter(dataclasses.replace(ServerConfig(model="small"), **{name: value}), PAIRS)
        assert "pw" not in str(raised.value)
