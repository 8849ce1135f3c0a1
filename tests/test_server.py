"""The server writer: over every fault nothing is lost, nothing comes twice, and each answer belongs to its job."""

import base64
import io
import itertools
import logging
import re
import threading
import time
import traceback
from collections.abc import Sequence
from email.utils import formatdate

import numpy as np
import pytest
from faulty_server import FAULTS, HTML, FaultyProxy, Server, as_json, closing, sentence
from PIL import Image

from pc_clip.core.config.write import ServerConfig
from pc_clip.core.errors import UserError
from pc_clip.write import prompts
from pc_clip.write.server import ServerWriter, request_id
from pc_clip.write.writers import Job

PAIRS = prompts.read(prompts.FOLDER / "pairs.yaml")
JOBS = [Job(f"a dog on {n} sofas", f"{n} cats in a kitchen", 10 * n) for n in range(40)]
KEY = 'sk-very"secret\\-0123456789'


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server():
    found = Server()
    with closing(found):
        yield found


def writer(*servers, **options):
    options = {"model": "small", "timeout": 5.0, "patience": 20.0, "concurrency": 8} | options
    url = [getattr(server, "url", server) for server in servers]
    return ServerWriter(ServerConfig(url=url, **options), PAIRS, first_wait=0.004)


def expected(jobs):
    return [sentence(*job) for job in jobs]


def check(results, jobs=JOBS):
    """Every job once, and with the answer to its own captions and seed."""
    assert sorted(place for place, _ in results) == list(range(len(jobs)))
    assert [text.strip() for _, text in sorted(results)] == expected(jobs)


def check_all_but(empty, results, jobs):
    """Every job once, with its own answer, but for one that has none."""
    results = sorted(results)
    assert [place for place, _ in results] == list(range(len(jobs)))
    assert [text for _, text in results] == ["" if n == empty else sentence(*job) for n, job in enumerate(jobs)]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def read(stream):
    """What a stream gives before it ends or fails, and the error it fails with."""
    found = []
    try:
        for result in stream:
            found.append(result)
    except UserError as error:
        return found, error
    return found, None


def dead_url():
    with closing(gone := Server()):
        return gone.url


# -- what is asked -------------------------------------------------------------------------------------


def test_a_chat_model_is_asked_with_a_system_prompt_and_the_jobs_own_seed(server):
    check(list(writer(server, max_tokens=33, temperature=0.5, top_p=0.9, stop=["END"]).stream(JOBS[:3])), JOBS[:3])
    bodies = {body["seed"]: body for _, _, body in server.seen}
    assert bodies[20] == {
        "model": "small",
        "max_tokens": 33,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 20,
        "stop": ["END"],
        "messages": [
            {"role": "system", "content": PAIRS.system},
            {"role": "user", "content": PAIRS.question(JOBS[2].first, JOBS[2].second)},
        ],
    }


def test_a_base_model_gets_worked_examples_and_ends_with_the_line(server):
    check(list(writer(server, chat=False).stream(JOBS[:3])), JOBS[:3])
    assert {path for path, _, _ in server.seen} == {"/v1/completions"}
    bodies = {body["seed"]: body for _, _, body in server.seen}
    assert bodies[10]["prompt"] == PAIRS.with_examples(JOBS[1].first, JOBS[1].second)
    assert bodies[10]["stop"] == ["\n"]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"chat": False}, "The bus is red.\n\nPicture 1: A tree."), ({"stop": ["END", "#"]}, "The bus is red.# 3 END")],
)
def test_an_answer_ends_where_it_was_told_to_also_when_the_server_goes_on(server, options, text):
    server.instead = lambda *_: as_json({"choices": [{"text": text, "message": {"content": text}}]})
    assert writer(server, **options).write(JOBS[:1]) == ["The bus is red."]


def test_each_try_of_a_job_has_an_id_of_its_own_that_begins_with_the_jobs(server):
    failed = set()

    def once(path, headers, body):
        if body["seed"] not in failed:
            failed.add(body["seed"])
            return as_json({}, 500)

    server.instead = once
    twins = [*JOBS[:5], JOBS[0]]
    check(list(writer(server).stream(twins)), twins)
    names = [headers["x-request-id"] for _, headers, _ in server.seen]
    assert len(set(names)) == len(names) == 11
    assert {name.split("-")[0] for name in names} == {request_id(job) for job in JOBS[:5]}
    assert request_id(JOBS[0]) != request_id(JOBS[0]._replace(seed=1))


def test_a_template_without_a_system_role_gets_it_in_the_question(server):
    def refuse(path, headers, body):
        if body["messages"][0]["role"] == "system":
            return as_json({"error": {"message": "System role not supported"}}, 400)

    server.instead = refuse
    model = writer(server)
    check(list(model.stream(JOBS)))
    assert server.seen[-1][2]["messages"][0]["content"].startswith(f"{PAIRS.system}\n\nPicture 1:")
    assert model.describe()["system_role"] is False
    before = len(server.seen)
    check(list(model.stream(JOBS)))
    assert len(server.seen) - before == len(JOBS)


def test_a_server_that_does_not_say_why_can_be_asked_without_the_role(server):
    def refuse(path, headers, body):
        if body["messages"][0]["role"] == "system":
            return 500, {}, b"Internal Server Error"

    server.instead = refuse
    with pytest.raises(UserError, match=r"status 500 \(Internal Server Error\).*--server\.system_role false"):
        list(writer(server, patience=0.1).stream(JOBS))
    check(list(writer(server, system_role=False).stream(JOBS)))


def test_half_a_character_in_a_caption_does_not_stop_the_others(server):
    jobs = [JOBS[0], Job("a dog \ud83d", "a cat", 1)]
    assert dict(writer(server).stream(jobs)) == {0: sentence(*JOBS[0]), 1: sentence("a dog ?", "a cat", 1)}


def test_the_only_model_is_found_and_named(server):
    model = writer(server, model="")
    check(list(model.stream(JOBS[:2])), JOBS[:2])
    assert model.describe()["model"] == "small" and model.describe()["answered_by"] == ["small-0125"]


def test_several_models_are_an_error_that_names_them():
    with (
        closing(server := Server(models=("large", "small"))),
        pytest.raises(UserError, match=r"large, small.*--server"),
    ):
        writer(server, model="")


@pytest.mark.parametrize("reply", [as_json({"data": []}), HTML, as_json({}, 404)])
def test_a_server_that_lists_no_model_is_an_error_that_says_what_to_do(server, reply):
    server.instead = lambda *_: reply
    with pytest.raises(UserError, match=r"--server\.model"):
        writer(server, model="")


def test_a_server_that_is_still_starting_is_waited_for():
    with closing(gone := Server()):
        pass
    late = []
    timer = threading.Timer(0.5, lambda: late.append(Server(gone.port)))
    timer.start()
    assert writer(gone, model="").model == "small"
    late[0].close()


def test_a_server_that_never_starts_is_an_error_with_its_address():
    url = dead_url()
    with pytest.raises(UserError, match=rf"{url}: no connection.*running"):
        writer(url, model="", patience=0.1)


def test_fields_that_a_server_refuses_are_renamed_or_left_out(server):
    bodies = []

    def picky(path, headers, body):
        bodies.append(dict(body))
        if {"max_tokens", "seed", "top_p"} & body.keys():
            return as_json({"error": {"message": "Unsupported parameter: use 'max_completion_tokens'"}}, 400)
        body["seed"] = body["random_seed"]  # what its answer is made of

    server.instead = picky
    rename = ["max_tokens=max_completion_tokens", "seed=random_seed", "top_p="]
    check(list(writer(server, rename=rename).stream(JOBS[:3])), JOBS[:3])
    assert all(body["max_completion_tokens"] == 100 for body in bodies)
    with pytest.raises(UserError, match="server.rename has 'model=other'"):
        writer(server, rename=["model=other"])


def test_everything_that_made_the_sentences_is_described(server):
    described = writer(server, temperature=0.7).describe()
    assert described["writer"] == "server" and described["model"] == "small" and described["url"] == [server.url]
    assert described["temperature"] == 0.7 and described["top_p"] == 1.0 and described["max_tokens"] == 100
    assert described["system"] == PAIRS.system and described["instruction"] == PAIRS.instruction
    assert described["stop"] == [] and described["worked_examples"] == []
    described = writer(server, chat=False).describe()
    assert described["stop"] == ["\n"] and described["worked_examples"] == list(PAIRS.examples)


# -- faults that pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_nothing_but_another_try(server, fault):
    with closing(proxy := FaultyProxy(server, (fault,), share=0.3, seed=1, hang=5.0)):
        check(list(writer(proxy, timeout=0.3 if fault == "hang" else 5.0).stream(JOBS)))
    assert proxy.done[fault] >= 5
    assert proxy.done["none"] == len(JOBS)


@pytest.mark.parametrize("chat", [True, False])
def test_all_faults_together_cost_nothing_but_further_tries(server, chat):
    jobs = [Job(f"a dog on {n} sofas", f"{n} cats", n) for n in range(120)]
    with closing(*(proxies := [FaultyProxy(server, FAULTS, share=0.35, seed=3, hang=5.0) for _ in range(2)])):
        check(list(writer(*proxies, timeout=0.4, chat=chat).stream(jobs)), jobs)
    assert all(sum(proxy.done[fault] for proxy in proxies) for fault in FAULTS)
    assert server.jobs_asked().keys() == {request_id(job) for job in jobs}


def test_a_server_gone_for_a_while_is_waited_for(server):
    proxy = FaultyProxy(server, FAULTS, share=0.0, seed=0, hang=0.0)
    back = []

    def restart():
        proxy.close()
        time.sleep(0.7)
        back.append(Server(proxy.port))

    results = []
    stream = writer(proxy).stream(JOBS * 5)
    results += itertools.islice(stream, 20)
    thread = threading.Thread(target=restart)
    thread.start()
    results += stream
    thread.join()
    check(results, JOBS * 5)
    with closing(*back):
        assert len(back[0].seen) > 50


def test_a_server_that_asks_to_wait_is_not_asked_before(server):
    moments = []

    def busy(path, headers, body):
        moments.append(time.monotonic())
        if len(moments) == 1:
            return as_json({"error": "slow down"}, 429, Retry_After="0.5")

    server.instead = busy
    check(list(writer(server, concurrency=1).stream(JOBS[:5])), JOBS[:5])
    assert moments[1] - moments[0] >= 0.5


@pytest.mark.parametrize("after", [lambda: "3600", lambda: formatdate(time.time() + 3600, usegmt=True)])
def test_a_wait_longer_than_our_patience_is_an_error_at_once(server, after):
    after = after()  # now, not when the tests were collected
    server.instead = lambda *_: as_json({"error": {"message": "out of quota for today"}}, 429, Retry_After=after)
    with pytest.raises(UserError, match=r"out of quota for today.*asking to wait 3[56]\d\d s.*--server\.patience"):
        list(writer(server).stream(JOBS))


# -- several servers, many requests --------------------------------------------------------------------


def test_no_more_requests_are_under_way_than_allowed():
    with closing(server := Server(delay=0.02)):
        check(list(writer(server, concurrency=3).stream(JOBS)))
        assert server.most == 3


def test_servers_share_the_load():
    with closing(a := Server(delay=0.02), b := Server(delay=0.02)):
        check(list(writer(a, b, concurrency=3).stream(JOBS)))
        assert len(a.seen) >= 15 and len(b.seen) >= 15
        assert a.most == b.most == 3


def test_a_slow_server_gets_less():
    with closing(slow := Server(delay=0.3), fast := Server(delay=0.01)):
        check(list(writer(slow, fast, concurrency=2).stream(JOBS)))
        assert len(slow.seen) < 10


def test_a_dead_server_is_set_aside_and_said_so_once(server, caplog):
    url = dead_url()
    check(list(writer(url, server).stream(JOBS)))
    assert len(server.seen) == len(JOBS)
    assert [url in record.getMessage() for record in caplog.records if record.name.startswith("pc_clip")] == [True]


def test_a_server_that_comes_back_is_used_again(server):
    url, late = dead_url(), []
    server.delay = 0.02
    stream = writer(url, server, concurrency=2).stream(JOBS * 4)
    results = list(itertools.islice(stream, 10))
    late.append(Server(int(url.split(":")[2].split("/")[0])))
    results += stream
    check(results, JOBS * 4)
    with closing(*late):
        assert len(late[0].seen) > 10


def test_a_server_that_only_answers_garbage_does_not_spoil_the_others(server):
    with closing(bad := Server()):
        bad.instead = lambda *_: HTML
        check(list(writer(bad, server).stream(JOBS)))


class Counted(Sequence):
    """Half a million jobs, made as they are asked for."""

    def __init__(self):
        self.made = 0

    def __len__(self):
        return 500_000

    def __getitem__(self, n):
        self.made += 1
        return Job(f"dog {n}", f"cat {n}", n)


def test_jobs_are_begun_as_they_are_needed_and_no_faster_than_they_are_read(server):
    jobs = Counted()
    stream = writer(server, concurrency=4).stream(jobs)
    assert len(list(itertools.islice(stream, 20))) == 20
    time.sleep(0.3)
    made = jobs.made
    assert made < 20 + 8 + 8 + 4
    time.sleep(0.2)
    assert jobs.made == made
    assert len(list(itertools.islice(stream, 20))) == 20 and jobs.made > made
    stream.close()


def test_closing_the_stream_ends_the_requests_under_way(server):
    server.instead = lambda path, headers, body: time.sleep(30) if body["seed"] else None
    stream = writer(server).stream(JOBS)
    assert next(stream) == (0, sentence(*JOBS[0]))
    stream.close()
    assert not any(thread.name == "server writer" for thread in threading.enumerate())


def test_no_job_is_no_request(server):
    assert list(writer(server).stream([])) == [] and not server.seen


# -- faults that stay ----------------------------------------------------------------------------------


def test_what_was_finished_comes_before_the_error(server):
    def break_down(path, headers, body):
        if len(server.seen) > 25:
            return as_json({"error": {"message": "out of memory"}}, 500)

    server.instead = break_down
    found, error = read(writer(server, patience=0.3).stream(JOBS))
    assert 20 <= len(found) <= 25 and all(text == sentence(*JOBS[place]) for place, text in found)
    assert "out of memory" in str(error) and "status 500" in str(error) and "--server.patience" in str(error)


GARBAGE = pytest.mark.parametrize(
    ("reply", "said"),
    [
        (HTML, "Sign in to the hotel's network"),
        ((200, {}, b""), "nothing said"),
        ((200, {}, b"<" + b"very " * 100_000), "very very"),
        (as_json({"error": {"message": "worker died"}}), "worker died"),
        (as_json({"choices": []}), "choices"),
        (as_json([[[]]]), r"\[\[\[\]\]\]"),
        (as_json("hello"), "hello"),
        ((200, {}, b"[" * 100_000), r"\[\[\["),
        (as_json({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}), "max_tokens 100 may be"),
        (as_json({"choices": [{"message": {"content": 3}}]}), "without text"),
    ],
)


@GARBAGE
def test_a_server_that_only_answers_garbage_is_an_error_that_quotes_it(server, reply, said):
    server.instead = lambda *_: reply
    found, error = read(writer(server, patience=0.5).stream(JOBS[:3]))
    assert not found and re.search(said, str(error))
    assert len(str(error)) < 700 and "\n" not in str(error)
    assert server.easy_asked() and max(server.jobs_asked().values()) <= 10


@GARBAGE
def test_garbage_for_one_prompt_alone_is_an_empty_sentence(server, reply, said, caplog):
    server.instead = lambda path, headers, body: reply if body["seed"] == 50 else None
    check_all_but(5, writer(server).stream(JOBS[:10]), JOBS[:10])
    assert 3 <= server.jobs_asked().pop(request_id(JOBS[5])) <= 10
    assert [bool(re.search(said, text)) for text in warnings(caplog) if "count as empty" in text] == [True]


@pytest.mark.parametrize("status", [500, 503])
def test_a_prompt_that_always_breaks_the_server_is_an_empty_sentence(server, status):
    server.instead = lambda path, headers, body: as_json({}, status) if body["seed"] == 50 else None
    check_all_but(5, writer(server, patience=0.2).stream(JOBS), JOBS)
    jobs_asked = server.jobs_asked()
    assert jobs_asked.pop(request_id(JOBS[5])) >= 4 and set(jobs_asked.values()) == {1}


def test_a_prompt_that_hangs_is_an_empty_sentence(server):
    server.instead = lambda path, headers, body: time.sleep(1) if body["seed"] == 50 else None
    check_all_but(5, writer(server, timeout=0.2, patience=0.1).stream(JOBS), JOBS)


@pytest.mark.parametrize("reply", [as_json({}, 500), HTML])
def test_a_prompt_no_server_answers_is_told_from_a_server_that_answers_none(server, reply):
    """The last tries are with the server that works, not with the one that failed last."""
    server.instead = lambda path, headers, body: reply if body["seed"] == 50 else None
    with closing(bad := Server()):
        bad.instead = lambda *_: as_json({}, 500)
        check_all_but(5, writer(bad, server, patience=0.5).stream(JOBS), JOBS)


def test_a_server_that_is_back_after_the_last_failure_loses_nothing(server):
    """The easy prompt is answered after a job has failed for all our patience: the job is asked again."""
    server.instead = lambda path, headers, body: None if server.easy_asked() else as_json({}, 500)
    check(list(writer(server, patience=0.1).stream(JOBS)))


def test_a_job_refused_for_too_many_requests_is_not_counted_as_empty(server):
    """Even where the easy prompt would be answered: a limit of requests says nothing about a prompt."""
    server.instead = lambda path, headers, body: as_json({"error": "slow down"}, 429) if body["seed"] == 50 else None
    found, error = read(writer(server, patience=0.2).stream(JOBS[:10]))
    assert "status 429 (slow down)" in str(error) and all(text == sentence(*JOBS[place]) for place, text in found)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
def test_a_refusal_of_every_prompt_is_an_error_at_once(server, status):
    server.instead = lambda *_: as_json({"error": {"message": "we do not like it"}}, status)
    found, error = read(writer(server, concurrency=2).stream(JOBS))
    assert not found and "we do not like it" in str(error)
    assert max(server.jobs_asked().values()) == 1 and server.jobs_asked().total() <= 4
    assert (server.easy_asked() > 0) == (status in (400, 422))


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_refusal_that_no_prompt_can_cause_is_an_error_although_others_are_answered(server, status):
    server.instead = lambda path, headers, body: as_json({"error": "no"}, status) if body["seed"] == 50 else None
    found, error = read(writer(server).stream(JOBS))
    assert error is not None and all(text == sentence(*JOBS[place]) for place, text in found)
    assert not server.easy_asked()


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_or_wrong_key_is_an_error_with_the_variables_name(server, status, monkeypatch):
    server.instead = lambda *_: as_json({"error": {"message": "no"}}, status)
    with pytest.raises(UserError, match=r"wants a key, which belongs into the environment variable MY_KEY"):
        list(writer(server, api_key_env="MY_KEY").stream(JOBS))
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(UserError, match=r"refuses the key in the environment variable MY_KEY"):
        list(writer(server, api_key_env="MY_KEY").stream(JOBS))


def test_an_unknown_model_is_an_error_with_those_there_are():
    message = r"no model 'llama-13'.*Did you mean 'llama-13b'"
    with closing(server := Server(models=("llama-7b", "llama-13b"))), pytest.raises(UserError, match=message):
        list(writer(server, model="llama-13").stream(JOBS))


def test_a_wrong_path_is_an_error_that_says_how_addresses_end(server):
    with pytest.raises(UserError, match=r"there is no http://127\S+/v2/chat/completions.*/v1"):
        list(writer(server.url.replace("v1", "v2")).stream(JOBS))


# -- prompts that cannot be answered -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (400, {"message": "This model's maximum context length is 20 tokens. However, you requested 95.", "code": 400}),
        (400, {"error": {"message": "too many tokens", "code": "context_length_exceeded"}}),
        (400, {"error": {"message": "request (4390 tokens) exceeds the available context size (4096 tokens)"}}),
        (500, {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 96. Given: 400"}),
        (400, {"error": {"message": "The response was filtered", "code": "content_filter"}}),
        (200, {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_an_empty_sentence(server, status, content, caplog):
    server.instead = lambda path, headers, body: as_json(content, status) if body["seed"] in (50, 60) else None
    found = dict(writer(server).stream(JOBS))
    assert [place for place, text in sorted(found.items()) if not text] == [5, 6]
    assert set(server.jobs_asked().values()) == {1} and server.easy_asked() == (0 if status == 200 else 2)
    assert len(warnings(caplog)) == (status != 200)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_refused_for_a_reason_we_do_not_know_is_an_empty_sentence(server, status):
    server.instead = lambda path, headers, body: as_json({"error": "no"}, status) if body["seed"] == 50 else None
    check_all_but(5, writer(server).stream(JOBS), JOBS)


def test_prompts_that_are_all_too_long_are_an_error(server):
    server.instead = lambda *_: as_json({"message": "This model's maximum context length is 20 tokens."}, 400)
    found, error = read(writer(server).stream(JOBS))
    assert not found
    assert re.search(r"refuses even a short prompt .*maximum context length.*--server\.max_tokens", str(error))


@pytest.mark.parametrize("fault", ["429", "500", "reset", "html", "half a body"])
def test_a_refused_prompt_is_empty_and_the_others_are_not_also_over_faults(server, fault):
    """A fault that meets the easy prompt says nothing about the one that was refused."""
    refused = {10 * n for n in range(0, 40, 4)} - {0}
    server.instead = lambda path, headers, body: as_json({"error": "no"}, 400) if body["seed"] in refused else None
    with closing(proxy := FaultyProxy(server, (fault,), share=0.4, seed=2, hang=5.0)):
        found = list(writer(proxy).stream(JOBS))
    assert sorted(place for place, _ in found) == list(range(len(JOBS)))
    assert [text for _, text in sorted(found)] == ["" if job.seed in refused else sentence(*job) for job in JOBS]


def test_a_refusal_in_words_is_handed_on_to_be_counted(server):
    server.instead = lambda *_: as_json({"choices": [{"message": {"content": None, "refusal": "I'm sorry, no."}}]})
    assert list(writer(server).stream(JOBS[:1])) == [(0, "I'm sorry, no.")]


# -- the key, and other settings -----------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_goes_into_the_header_alone(server, monkeypatch):
    list(writer(server).stream(JOBS[:1]))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    list(writer(server).stream(JOBS[:1]))
    monkeypatch.setenv("OTHER", "other")
    list(writer(server, api_key_env="OTHER").stream(JOBS[:1]))
    assert [headers["authorization"] for _, headers, _ in server.seen] == [
        "Bearer none",
        f"Bearer {KEY}",
        "Bearer other",
    ]
    assert KEY not in str([body for _, _, body in server.seen])


def echo(status):
    """A server that sends back all it was told."""

    def reply(path, headers, body):
        told = f"you sent {headers} and {KEY}" + "x" * 300
        if status == "answer":
            return as_json({"model": KEY, "choices": [{"message": {"content": told}, "text": told}]})
        return as_json({"error": {"message": told}}, status) if status != 200 else (200, {}, told.encode())

    return reply


@pytest.mark.parametrize("status", ["answer", 200, 400, 401, 404, 429, 500])
def test_the_key_is_in_no_log_no_error_and_no_answer(server, status, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.instead = echo(status)
    model = writer(server, patience=0.2)
    found, error = read(model.stream(JOBS[:6]))
    assert (error is None) == (status == "answer") and len(found) == (6 if error is None else 0)
    shown = [str(found), str(model.describe()), str(vars(model)), repr(model), caplog.text, *capfd.readouterr()]
    if error is not None:
        assert "[key]" in str(error)
        shown += traceback.format_exception(type(error), error, error.__traceback__)
    assert any(headers["authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    assert not any(KEY in text or KEY[:7] in text for text in shown)


def test_the_key_is_in_no_error_when_the_models_are_asked_for(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.instead = echo(401)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        writer(server, model="")
    assert KEY not in caplog.text + "".join(traceback.format_exception(raised.type, raised.value, raised.tb))


def test_a_key_that_cannot_be_sent_is_an_error_that_does_not_show_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + " “quoted”")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        writer(server)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:hunter2@127.0.0.1:8000/v1", "127.0.0.1 holds a password"),
        ("http://127.0.0.1:8000/v1?key=hunter2", "after"),
        ("http://me:hunter2@127.0.0.1:port/v1", "cannot be read"),
        ("localhost:8000/v1", "http://localhost:8000/v1"),
        ("ftp://localhost/v1", "ftp"),
        ("", "no address"),
    ],
)
def test_an_address_with_a_password_or_without_sense_is_an_error_that_does_not_show_it(url, message):
    with pytest.raises(UserError, match=message) as raised:
        writer(url)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, r"server\.concurrency is 0"),
        ({"max_tokens": 0}, r"server\.max_tokens is 0"),
        ({"stop": ["END", ""]}, r"server\.stop"),
        ({"timeout": 0.0}, r"server\.timeout is 0"),
        ({"patience": -1.0}, r"server\.patience is -1"),
    ],
)
def test_settings_that_cannot_be_right_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        writer("http://localhost:8000/v1", **options)


def test_no_address_and_one_named_twice_are_errors():
    with pytest.raises(UserError, match=r"server\.url is empty"):
        writer()
    with pytest.raises(UserError, match="twice"):
        writer("http://localhost:8000/v1", "http://localhost:8000/v1/")


# -- pictures ------------------------------------------------------------------------------------------


def seen_picture(body):
    picture, text = body["messages"][-1]["content"]
    kind, content = picture["image_url"]["url"].split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))), text["text"]


def looking(server, pictures, **options):
    found = writer(server, **options)
    found.look = pictures.__getitem__
    return found


def say_size(path, headers, body):
    if isinstance(body["messages"][-1]["content"], list):
        return as_json({"choices": [{"message": {"content": "{}x{}".format(*seen_picture(body)[0].size)}}]})


def test_each_job_shows_its_own_picture_before_its_question(server):
    server.instead = say_size
    jobs = [Job(f"dog {n}", f"cat {n}", n, f"p{n}") for n in range(20)] + [JOBS[0]]
    pictures = {f"p{n}": Image.new("RGB", (10 + n, 30), (200, 10 * n, 0)) for n in range(20)}
    found = dict(looking(server, pictures).stream(jobs))
    assert found == {n: f"{10 + n}x30" for n in range(20)} | {20: sentence(*JOBS[0])}
    for _, _, body in server.seen:
        if isinstance(body["messages"][-1]["content"], list):
            picture, text = seen_picture(body)
            n = picture.width - 10
            assert text == PAIRS.question(f"dog {n}", f"cat {n}")
            assert np.abs(np.asarray(picture).mean((0, 1)) - [200, 10 * n, 0]).max() < 5
    assert len({request_id(job) for job in jobs}) == 21
    assert request_id(jobs[0]) != request_id(jobs[0]._replace(picture="p1"))


def test_large_pictures_are_sent_smaller_and_stay_as_they_are_here(server):
    server.instead = say_size
    large = Image.new("RGB", (3000, 1500))
    assert dict(looking(server, {"p": large}).stream([Job("a", "b", 0, "p")])) == {0: "1024x512"}
    assert large.size == (3000, 1500)


def test_a_picture_that_cannot_be_read_stops_with_its_own_message(server):
    def look(name):
        raise UserError(f"{name} cannot be read as an image")

    blind = writer(server)
    blind.look = look
    with pytest.raises(UserError, match="broken.jpg cannot be read as an image"):
        list(blind.stream([Job("a", "b", 0, "broken.jpg")]))


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_sees_nothing_is_told_from_one_picture_that_it_refuses(server, status):
    """The easy prompt that tells them apart has a picture, too."""

    def refuse(path, headers, body, only=None):
        if isinstance(body["messages"][-1]["content"], list):
            if only is None or seen_picture(body)[0].width == only:
                return as_json({"error": {"message": "no image input"}}, status)
            return say_size(path, headers, body)

    pictures = {f"p{n}": Image.new("RGB", (10 + n, 30)) for n in range(4)}
    jobs = [Job("a", "b", n, f"p{n}") for n in range(4)]
    server.instead = refuse
    with pytest.raises(UserError, match="no image input"):
        list(looking(server, pictures, patience=0.1).stream(jobs))
    server.instead = lambda *asked: refuse(*asked, only=12)
    found = dict(looking(server, pictures, patience=0.1).stream(jobs))
    assert found == {0: "10x30", 1: "11x30", 2: "", 3: "13x30"}
