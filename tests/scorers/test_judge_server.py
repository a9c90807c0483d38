"""A judge behind a server: what becomes of every fault on the way."""

from __future__ import annotations

import gc
import json
import math
import signal
import socket
import threading
import time
import weakref
from email.utils import formatdate

import pytest

from diffalign.common.errors import UserError
from diffalign.scorers import _judge_server, _judge_wire, load_scorer
from tests.judge_server import POINT, PROMPTS, JudgeServer, Reaction, by_brightness, expect, judge, pictures

SECRET = "sk-Zq81-very/secret"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(_judge_server, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(reactions, count: int = 1, **options):
    """Returns the scores of some pictures and the number of requests that they took."""
    with JudgeServer(reactions) as server:
        scores = judge(server, workers=1, **options).score(pictures(count), PROMPTS[:count])
        return scores, len(server.questions)


GOOD = "Final Score: 3"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "fault",
    [
        Reaction(status=500),
        Reaction(status=408),
        Reaction(cut="all"),
        Reaction(GOOD, cut="half"),
        Reaction(GOOD, delay=2),
        Reaction(GOOD, drip=0.05),
        Reaction(raw=(b"HTTP/1.1 200 OK\r\nX-A: ", b"a")),
        Reaction(raw=(b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
        Reaction(raw=(CHUNKED + b"1;", b"a")),
        Reaction(raw=(CHUNKED + b"0\r\n", b"X: y\r\n")),
    ],
    ids=["500", "408", "cut", "half", "slow", "drip", "header", "continue", "chunk", "trailer"],
)
def test_a_fault_that_may_pass_is_tried_again(fault):
    scores, requests = run([fault, GOOD], timeout=0.2)
    assert (scores.values.tolist(), scores.errors, requests) == ([3.0], [None], 2)
    scores, requests = run([fault, fault, GOOD], timeout=0.2)  # retries=1
    assert math.isnan(scores.values[0]) and requests == 2
    assert "(2 tries)" in scores.errors[0] and "\n" not in scores.errors[0]
    expect(scores.parts["unanswered"], [1])
    expect(scores.parts["unparsed"], [0])


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_is_busy_for_long_stops_the_run(status):
    """The pictures without an answer are not to blame: their rows must stay open for another run."""
    fault = Reaction(status=status, body=b"<html>\nbusy</html>")
    assert run([fault, GOOD])[0].values.tolist() == [3.0]
    with JudgeServer([GOOD, GOOD, fault]) as server:
        with pytest.raises(UserError, match=f"status {status}: <html> busy.* and run again"):
            judge(server, workers=1).score(pictures(5), PROMPTS[:5])
        assert len(server.questions) == 4  # no further picture was tried


def test_several_questions_without_any_answer_stop_the_run():
    fault = Reaction(status=500)
    with JudgeServer([GOOD, fault]) as server:
        scorer = judge(server, retries=0)
        expect(scorer(pictures(1), ["a"]), [3])
        expect(scorer(pictures(1), ["a"]), [math.nan])  # of one picture nothing can be told
        with pytest.raises(UserError, match=r"none of 2 questions got an answer .*500.* run again"):
            scorer(pictures(2), ["a", "b"])


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
        (b"[" * 200_000, "is no JSON: [[["),
        (b" " * (_judge_wire.BODY_LIMIT + 1), "longer than 4 MB"),
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
    with JudgeServer([Reaction(status=429, headers={"Retry-After": "7200"}), GOOD]) as server:
        with pytest.raises(UserError, match=r"asks to wait 7200 s.* run again"):
            judge(server)(pictures(1), ["a"])
        assert len(server.questions) == 1


@pytest.mark.parametrize("header", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "9" * 400, "1.1.1", "soon"])
def test_a_wait_that_is_none_is_not_kept(header):
    assert run([Reaction(status=429, headers={"Retry-After": header}), GOOD])[0].values.tolist() == [3.0]


def test_signs_that_a_terminal_would_obey_are_escaped():
    said = "\x1b[2J\u202e \ud800 n\u00e9"
    scores, _ = run(
        [said, GOOD, Reaction(status=400, body=b"\x1b[2Jno"), Reaction(status=400, body=b"[" * 200_000)], 4
    )
    assert scores.errors[0].endswith(r"'\x1b[2J\u202e \ud800 n\u00e9'".replace(r"\u00e9", "\u00e9"))
    assert scores.errors[2].endswith(r"status 400: \x1b[2Jno") and "[[[" in scores.errors[3]
    assert all(error is None or error.isprintable() for error in scores.errors)


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
    scores, requests = run([refusal], count=2)
    expect(scores.values, [math.nan, math.nan])
    with JudgeServer([refusal]) as server:
        scorer = judge(server)
        for _ in range(3):
            assert scorer(pictures(5), PROMPTS[:5]).isnan().all()
        with pytest.raises(UserError, match=r"answers no question: .*too many tokens"):
            scorer(pictures(1), ["a"])  # the sixteenth


def test_texts_that_never_come_are_refusals_too():
    with JudgeServer([Reaction(body=b'{"choices": [{"message": {"content": null}}]}')]) as server:
        scorer = judge(server)
        assert scorer(pictures(2), PROMPTS[:2]).isnan().all()  # a filter may take both
        with pytest.raises(UserError, match="answers no question: the answer is no chat completion"):
            scorer(pictures() * 3, PROMPTS * 3)


def test_a_403_after_an_answer_is_the_pictures_own():
    scores, requests = run([GOOD, Reaction(status=403, body=b"filtered"), GOOD], count=3)
    expect(scores.values, [3, math.nan, 3])
    assert "status 403: filtered" in scores.errors[1] and requests == 3


def test_a_refusal_of_all_of_a_later_batch_is_theirs():
    with JudgeServer([GOOD, Reaction(status=400)]) as server:
        scorer = judge(server, workers=1)
        expect(scorer(pictures(1), ["a"]), [3])
        assert scorer(pictures() * 3, PROMPTS * 3).isnan().all()


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
    with pytest.raises(UserError, match=r"answers no more .*refused"):
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
        (Reaction(body=b"[" * 200_000), "no OpenAI-compatible API"),
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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        interrupted_while_asking()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_while_asking():
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


def test_pictures_do_not_outlive_an_error():
    with JudgeServer([Reaction(status=401)]) as server:
        scorer = judge(server)
        images = pictures()
        alive = [weakref.ref(image) for image in images]
        gc.disable()
        try:
            with pytest.raises(UserError, match="401"):
                scorer(images, PROMPTS)
            del images
            assert not any(ref() for ref in alive)
        finally:
            gc.enable()
