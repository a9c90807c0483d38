"""A judge behind a server: where its key goes, and where not."""

from __future__ import annotations

import json
import logging
import math

import pytest

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers.judge import Plugin
from tests.judge_server import POINT, PROMPTS, JudgeServer, Reaction, by_brightness, expect, judge, pictures

SECRET = "sk-Zq81-very/secret"
GOOD = "Final Score: 3"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


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


def test_errors_that_repeat_what_the_server_said_do_not_show_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    told = []
    echo = Reaction(raw=(b"x" * 150 + f"Authorization: Bearer {SECRET}\r\n\r\n".encode() * 9, b""))
    with JudgeServer(hello=echo) as server, pytest.raises(UserError, match="is not reached") as error:
        judge(server)
    told.append(error.value)
    with JudgeServer([echo]) as server:
        told += judge(server, retries=0).score(pictures(1), ["a"]).errors
    with JudgeServer([Reaction(status=404)], models=[SECRET, "b"]) as server:
        with pytest.raises(UserError, match=r"it has \*\*\*, b") as error:
            judge(server)
        told.append(error.value)
        with pytest.raises(UserError, match=r"it has the models \*\*\*, b") as error:
            judge(server, model="b")(pictures(1), ["a"])
        told.append(error.value)
    assert len(told) == 4 and not any("sk-" in str(each) for each in told)


def test_a_key_goes_unencrypted_to_another_machine_only_where_it_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with JudgeServer(by_brightness) as server:
        far = {"server": server.url.replace("127.0.0.1", "0.0.0.0"), **POINT}  # here too, but who knows
        with pytest.raises(UserError, match=r"unencrypted: use https, or give api_key_env=null") as error:
            load_scorer("judge", **far)
        assert not server.seen and "sk-" not in str(error.value)
        load_scorer("judge", **far, api_key_env="OPENAI_API_KEY")
        load_scorer("judge", **far, api_key_env=None)
        monkeypatch.delenv("OPENAI_API_KEY")
        load_scorer("judge", **far)
        assert [seen.headers.get("Authorization") for seen in server.seen] == [f"Bearer {SECRET}", None, None]
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert Plugin(server="https://far/v1", **POINT)._key() == SECRET
    for trick in ("http://127.0.0.1.far/v1", "http://localhost.far/v1"):
        with pytest.raises(UserError, match="unencrypted"):
            Plugin(server=trick, **POINT)._key()


def test_a_key_is_only_sent_where_there_is_one(monkeypatch):
    with JudgeServer(by_brightness) as server:
        judge(server)
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        judge(server)
        judge(server, api_key_env=None)
        headers = [seen.headers.get("Authorization") for seen in server.seen]
        assert headers == [None, f"Bearer {SECRET}", None]
        with pytest.raises(
            UserError, match="variable that api_key_env= names, with the key, is not"
        ) as error:
            judge(server, api_key_env="AKIA0123456789")
        assert "AKIA" not in str(error.value)
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
