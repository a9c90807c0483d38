"""A judge behind a server: what becomes of every fault on the way, and where its key goes."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import threading
import time
from email.utils import formatdate

import pytest

from diffalign.common.errors import UserError
from diffalign.scorers import _judge_server, load_scorer
from diffalign.scorers.judge import Plugin
from tests.judge_server import POINT, PROMPTS, JudgeServer, Reaction, by_brightness, expect, judge, pictures

SECRET = "sk-Zq81-very/secret"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(_judge_server, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# Faults


def run(reactions, count: int = 1, **options):
    """Returns the scores of some pictures and the number of requests that they took."""
    with JudgeServer(reactions) as server:
        scores = judge(server, workers=1, **options).score(pictures(count), PROMPTS[:count])
        return scores, len(server.questions)


GOOD = "Final Score: 3"


@pytest.mark.parametrize(
    "fault",
    [
        Reaction(status=500),
        Reaction(status=503, body=b"<html>\nbusy</html>"),
        Reaction(status=429, headers={"Retry-After": "0"}),
        Reaction(status=408),
        Reaction(cut="all"),
        Reaction(GOOD, cut="half"),
        Reaction(GOOD, delay=2),
        Reaction(GOOD, drip=0.05),
    ],
    ids=["500", "503", "429", "408", "cut", "half", "slow", "drip"],
)
def test_a_fault_that_may_pass_is_tried_again(fault):
    scores, requests = run([fault, GOOD], timeout=0.2)
    assert (scores.values.tolist(), scores.errors, requests) == ([3.0], [None], 2)
    scores, requests = run([fault, fault, GOOD], timeout=0.2)  # retries=1
    assert math.isnan(scores.values[0]) and requests == 2
    assert "(2 tries)" in scores.errors[0] and "\n" not in scores.errors[0]
    expect(scores.parts["unanswered"], [1])
    expect(scores.parts["unparsed"], [0])


def test_a_slow_answer_says_the_limit():
    scores, requests = run([Reaction(GOOD, delay=2)], timeout=0.1, retries=0)
    assert scores.errors == ["no answer within 0.1 s"] and requests == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{'not json'", "is no JSON: {'not json'"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"{}", "no chat completion with a text: {}"),
        (b"[]", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "no chat completion"),
        (b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}', "no chat completion"),
        (b'{"choices": [1]}', "no chat completion"),
        (b" " * (_judge_server.BODY_LIMIT + 1), "longer than 4 MB"),
    ],
)
def test_an_answer_of_another_form_costs_one_picture_alone(body, message):
    scores, requests = run([GOOD, Reaction(body=body), GOOD], count=3)
    expect(scores.values, [3, math.nan, 3])
    assert message in scores.errors[1] and requests == 3


def test_an_answer_in_parts_is_put_together():
    content = [{"type": "text", "text": "Final "}, {"type": "image"}, {"type": "text", "text": "Score: 2"}]
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    assert run([Reaction(body=body)])[0].values.tolist() == [2.0]


@pytest.mark.parametrize("header", ["0.3", "date"])
def test_retry_after_is_waited_for(header):
    date = formatdate(time.time() + 2, usegmt=True)  # whole seconds: between one and two from now
    fault = Reaction(status=429, headers={"Retry-After": date if header == "date" else header})
    start = time.monotonic()
    scores, _ = run([fault, GOOD])
    assert scores.values.tolist() == [3.0]
    assert time.monotonic() - start > (0.8 if header == "date" else 0.3)


def test_a_wait_of_hours_is_not_waited_for():
    scores, requests = run([Reaction(status=429, headers={"Retry-After": "7200"}), GOOD])
    assert "asks to wait 7200 s" in scores.errors[0] and requests == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the key"),
        (403, "does not allow"),
        (404, "it has the models tiny"),
        (405, "no chat completions"),
        (302, "points elsewhere"),
    ],
)
def test_what_every_question_would_meet_stops_the_run(monkeypatch, status, message):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    body = json.dumps({"error": {"message": f"the key {SECRET} is\nwrong"}}).encode()
    fault = Reaction(status=status, body=body, headers={"Location": "http://127.0.0.1:9/"})
    with JudgeServer([fault]) as server:
        with pytest.raises(UserError, match=message) as error:
            judge(server, workers=1).score(pictures(), PROMPTS)
        assert len(server.questions) == 1
    assert "the key *** is wrong" in str(error.value) and "sk-" not in str(error.value)


def test_a_refusal_of_one_question_is_its_own():
    refusal = Reaction(status=400, body=b'{"detail": "too many tokens"}')
    scores, requests = run([GOOD, refusal, GOOD], count=3)
    expect(scores.values, [3, math.nan, 3])
    assert "status 400: too many tokens" in scores.errors[1] and requests == 3
    with pytest.raises(UserError, match=r"answers no question: .*too many tokens"):
        run([refusal], count=2)


def test_a_refusal_of_all_of_a_later_batch_is_theirs():
    with JudgeServer([GOOD, Reaction(status=400)]) as server:
        scorer = judge(server, workers=1)
        expect(scorer(pictures(1), ["a"]), [3])
        expect(scorer(pictures(1), ["a"]), [math.nan])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_not_there_is_said_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"is not reached \(.*refused.*\): start it"):
        load_scorer("judge", server=f"http://127.0.0.1:{free_port()}/v1", **POINT)
    assert time.monotonic() - start < 2


def test_a_server_that_goes_down_stops_the_run():
    server = JudgeServer(by_brightness)
    scorer = judge(server)
    assert not scorer(pictures(), PROMPTS).isnan().any()
    server.close()
    with pytest.raises(UserError, match=r"not reached any more .*refused"):
        scorer(pictures(), PROMPTS)


def test_the_list_of_models_says_the_name_and_the_weights():
    with JudgeServer(by_brightness, models=[{"id": "UR", "root": "org/ur-7b"}]) as server:
        assert judge(server).version.startswith("UR=org/ur-7b+")
    with JudgeServer(by_brightness, models=["a", "b"]) as server:
        assert judge(server, model="b").version.startswith("b+")
        with pytest.raises(UserError, match=r"give model=.* it has a, b"):
            judge(server)
    for status in (404, 405, 400, 501):
        with JudgeServer(by_brightness, hello=Reaction(status=status, body=b"no")) as server:
            assert judge(server, model="m").version.startswith("m+")
            with pytest.raises(UserError, match=r"give model=.*does not list"):
                judge(server)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (Reaction(status=401), "does not accept the key"),
        (Reaction(status=503, body=b"loading"), "is not ready .status 503: loading"),
        (Reaction(body=b"<html>"), "no OpenAI-compatible API"),
        (Reaction(cut="all"), "is not reached"),
        (Reaction(delay=2), "is not reached .*timed out"),
    ],
)
def test_a_wrong_server_is_said_before_any_question(hello, message):
    with JudgeServer(by_brightness, hello=hello) as server, pytest.raises(UserError, match=message):
        judge(server, model="m", timeout=0.2)


@pytest.mark.parametrize("body", [b"[]", b'{"data": 3}', b'{"data": [3, {"id": 4}, {}]}', b"null"])
def test_a_list_of_models_of_another_form_is_none(body):
    with JudgeServer(by_brightness, hello=Reaction(body=body)) as server:
        assert judge(server, model="m").version.startswith("m+")


def test_an_address_without_v1_says_so():
    with JudgeServer(by_brightness) as server:
        scorer = load_scorer("judge", server=server.url.removesuffix("/v1"), model="tiny", **POINT)
        with pytest.raises(UserError, match="most end in /v1"):
            scorer(pictures(1), ["a"])
        slash = load_scorer("judge", server=server.url + "/", **POINT)
        assert not slash(pictures(1), ["a"]).isnan().any()


def test_an_interrupt_does_not_wait_for_the_answers():
    with JudgeServer(lambda seen: Reaction(GOOD, delay=5)) as server:
        scorer = judge(server, timeout=30.0)
        main = threading.main_thread().ident
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
        before = threading.enumerate()
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            scorer(pictures(), PROMPTS)
        assert time.monotonic() - start < 2
        ours = [each for each in threading.enumerate() if each not in before and each is not timer]
        assert ours and all(each.daemon for each in ours)  # nor does the end of the program


# The key


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    said = f"{'x' * 52}{SECRET} and {SECRET}"  # quoting cuts within it
    faults = [
        said,
        Reaction(status=500, body=said.encode()),
        Reaction(status=400, body=json.dumps({"error": {"message": said}}).encode()),
        Reaction(body=said.encode()),
        Reaction(body=json.dumps({"said": said}).encode()),
        GOOD,
    ]
    with JudgeServer(faults, models=[SECRET]) as server:
        scorer = judge(server, workers=1, retries=0, api_key_env="MY_KEY")
        scores = scorer.score(pictures(), PROMPTS)
        headers = [seen.headers.get("Authorization") for seen in server.seen]
    assert headers == [f"Bearer {SECRET}"] * 7
    expect(scores.values, [math.nan] * 5 + [3])
    told = [
        repr(scorer),
        str(vars(scorer)),
        scorer.version,
        repr(scores.errors),
        caplog.text,
        *capfd.readouterr(),
    ]
    assert all("sk-" not in text for text in told)
    assert "xxx***" in scores.errors[2]
    without = Plugin(server=server.url, api_key_env="MY_KEY", **POINT)
    assert SECRET not in repr(without)


def test_a_key_is_only_sent_where_there_is_one(monkeypatch):
    with JudgeServer(by_brightness) as server:
        judge(server)
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        judge(server)
        judge(server, api_key_env=None)
        headers = [seen.headers.get("Authorization") for seen in server.seen]
        assert headers == [None, f"Bearer {SECRET}", None]
        with pytest.raises(UserError, match="variable OTHER_KEY with the key is not set"):
            judge(server, api_key_env="OTHER_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-two\nlines")
        with pytest.raises(UserError, match="no key has") as error:
            judge(server)
        assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"server": f"http://me:{SECRET}@host/v1"},
        {"server": f"https://host/v1?key={SECRET}"},
        {"server": "http://localhost:1/v1", "api_key_env": SECRET},
        {"server": "http://localhost:1/v1", "api_key_env": SECRET.replace("-", "_").replace("/", "")},
    ],
)
def test_secrets_in_the_wrong_place_are_refused_and_not_repeated(options):
    with pytest.raises(UserError, match=r"plain address|no name of an environment variable") as error:
        Plugin(**options, **POINT)
    assert "Zq81" not in str(error.value)
