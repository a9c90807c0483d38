"""A judge behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a provider's own.

Only the standard library: a few requests at once, in threads. The key goes into the header of the requests
and nowhere else; whatever a server says is quoted with the key struck out, since some repeat it.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import math
import random
import re
import ssl
import threading
import time
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffalign.common.errors import UserError
from diffalign.scorers._judge_prompts import Answer, Question
from diffalign.scorers._judge_wire import Refused, Wire

if TYPE_CHECKING:
    from PIL import Image

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first and the latest repetition; each doubles, and a random half is taken off."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait for (Retry-After); a question that must wait longer is given up."""
HELLO_TIMEOUT = 15.0
"""Seconds for the list of models, which needs no work."""

_HOPELESS = {
    401: "it does not accept the key",
    403: "it does not allow this",
    404: "it knows no such address or model: see server= (most end in /v1) and model=",
    405: "it knows no chat completions: see server= (most end in /v1)",
}
"""Statuses that every further question would meet; 403 only as long as none was answered (filters use it)."""
_DOWN = (429, 502, 503)
"""Statuses that speak of the server and not of the question: too many, a gateway with nothing behind it."""


class _Failed(Exception):
    """One try that gave no answer.

    Attributes:
        failure: as of an Answer, or "down": the server is gone, which is no matter of this question.
        again: another try may help.
        wait: seconds that the server wants until then.
    """

    def __init__(
        self,
        message: str,
        failure: Literal["down", "refused", "lost"] = "lost",
        *,
        again: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.failure, self.again, self.wait = failure, again, wait


@dataclass(kw_only=True, repr=False)  # what a server says of itself is shown through `wire` alone
class ServerJudge:
    """Asks the questions of a batch, several at once, and repeats those that a fault stopped.

    Args:
        wire: to the server.
        settings: what each request holds besides its messages: the model, the longest answer.
        image_format: of the pictures on their way.
        timeout: seconds for one try.
        retries: further tries.
        workers: questions under way at once.
        known: names of the models that the server lists, for the error of an unknown one.
    """

    wire: Wire
    settings: Mapping[str, Any]
    image_format: Literal["png", "jpeg"]
    timeout: float
    retries: int
    workers: int
    known: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._answered = False

    def quoted(self, text: str) -> str:
        """Returns the beginning of an answer, fit to be shown."""
        return self.wire.quoted(text)

    def modules(self) -> list[Any]:
        """Returns no network: the weights are elsewhere."""
        return []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Returns the answers, in order.

        Raises:
            UserError: the server is gone, or refuses what every further question would meet too (the key,
                the model).
        """
        answers: list[Answer] = [Answer()] * len(questions)
        waiting = iter(range(len(questions)))
        lock, stop = threading.Lock(), threading.Event()
        raised: list[BaseException] = []
        encoded: dict[int, str] = {}

        def work() -> None:
            while not stop.is_set():
                with lock:
                    place = next(waiting, None)
                if place is None:
                    return
                try:
                    answers[place] = self._answer(questions[place], encoded, stop)
                except BaseException as error:  # it belongs to the caller, in his thread
                    raised.append(error)
                    stop.set()

        # Daemons: Ctrl-C must not wait for the answers under way.
        threads = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, len(questions)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()
        if raised:
            del raised[1:]
            raise raised.pop()  # kept in the list, it would keep itself and the pictures alive
        return answers

    def _answer(self, question: Question, encoded: dict[int, str], stop: threading.Event) -> Answer:
        """Returns the answer to one question, tried as often as allowed."""
        body = self._body(question, encoded)
        tries = 0
        while True:
            try:
                answer = self._try(body)
                self._answered = True
                return answer
            except _Failed as error:
                wait = max(error.wait, _pause(tries))
                if not error.again or tries >= self.retries or wait > LONGEST_WAIT:
                    said = self.wire.safe(f"{error} ({tries + 1} tries)" if tries else str(error))
                    if error.failure == "down":
                        raise UserError(
                            f"scorer judge: server {self.wire.url} answers no more ({said}): see to "
                            "it and run again"
                        ) from None
                    return Answer(error=said, failure=error.failure)
                tries += 1
                if stop.wait(wait):
                    return Answer(error="the batch was stopped", failure="lost")

    def _body(self, question: Question, encoded: dict[int, str]) -> dict[str, Any]:
        """Returns what is sent for a question: the pictures in order, then the text."""
        content: list[dict[str, Any]] = []
        for image in question.images:
            if id(image) not in encoded:  # one of a pair is shown several times
                encoded[id(image)] = as_uri(image, self.image_format)
            content.append({"type": "image_url", "image_url": {"url": encoded[id(image)]}})
        content.append({"type": "text", "text": question.text})
        return {**self.settings, "messages": [{"role": "user", "content": content}], "stream": False}

    def _try(self, body: dict[str, Any]) -> Answer:
        """Returns the answer to one request; raises _Failed, or a UserError where none can be answered."""
        try:
            return self._answer_of(self.wire.send("chat/completions", body, timeout=self.timeout))
        except Refused as error:
            raise self._refusal(error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"scorer judge: server {self.wire.url} has no valid certificate: {error.reason}"
                ) from error
            cut = isinstance(error.reason, ConnectionResetError | BrokenPipeError)
            raise _Failed(f"no connection: {error.reason}", "lost" if cut else "down", again=True) from error
        except TimeoutError as error:
            raise _Failed(f"no answer within {self.timeout:g} s", again=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"the connection was cut: {self.wire.told(error)}", again=True) from error
        except ValueError as error:
            raise _Failed(str(error), "refused") from error

    def _answer_of(self, found: Any) -> Answer:
        """Returns the answer in a chat completion; raises _Failed where it has none."""
        try:
            choice = found["choices"][0]
            content = choice["message"]["content"]
            if isinstance(content, list):  # some servers give parts
                content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
            if not isinstance(content, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            said = self.wire.quoted(json.dumps(found))
            raise _Failed(f"the answer is no chat completion with a text: {said}", "refused") from None
        return Answer(content, cut=choice.get("finish_reason") == "length")

    def _refusal(self, error: Refused) -> UserError | _Failed:
        """Returns what an HTTP status means: for all questions, for this one, or for now."""
        status = error.status
        if (status in _HOPELESS and not (status == 403 and self._answered)) or 300 <= status < 400:
            means = _HOPELESS.get(status, "it points elsewhere: give the address itself as server=")
            names = self.wire.safe(", ".join(self.known))
            known = f"; it has the models {names}" if status == 404 and names else ""
            return UserError(f"scorer judge: server {self.wire.url} refuses, {means} ({error}){known}")
        if status in (408, *_DOWN) or status >= 500:
            wait = _seconds(error.headers)
            asks = f", it asks to wait {wait:g} s" if wait > LONGEST_WAIT else ""
            kind: Literal["down", "lost"] = "down" if status in _DOWN else "lost"
            return _Failed(f"the server fails with {error}{asks}", kind, again=True, wait=wait)
        return _Failed(f"the server refuses with {error}", "refused")


def _pause(tries: int) -> float:
    """Returns seconds before the next try, random: questions that failed together should not return so."""
    longest = min(FIRST_PAUSE * 2.0**tries, LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)


def _seconds(headers: Mapping[str, str]) -> float:
    """Returns the seconds of Retry-After, a number or a date; 0 without one."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    try:
        seconds = float(text) if re.match(r"[\d.]+$", text) else _until(text)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _until(date: str) -> float:
    """Returns the seconds until an HTTP date."""
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def as_uri(image: Image.Image, image_format: str) -> str:
    """Returns a picture as a data URI: png loses nothing, jpeg has UnifiedReward's quality of 95."""
    buffer = io.BytesIO()
    options = {"compress_level": 1} if image_format == "png" else {"quality": 95}
    image.save(buffer, format=image_format.upper(), **options)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def models_of(wire: Wire, *, timeout: float) -> dict[str, str]:
    """Returns the models that a server lists, with the weights that each says it has ("" where it does not).

    Raises:
        UserError: it is not reached, refuses the key, or is no OpenAI-compatible API.
    """
    try:
        found = wire.send("models", timeout=min(timeout, HELLO_TIMEOUT))
    except Refused as error:
        if error.status in (401, 403):
            raise UserError(
                f"scorer judge: server {wire.url} refuses, {_HOPELESS[error.status]} ({error})"
            ) from None
        if error.status >= 500 and error.status != 501:
            raise UserError(
                f"scorer judge: server {wire.url} is not ready ({error}): try again later"
            ) from None
        return {}  # not every server has a list
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"scorer judge: server {wire.url} is not reached ({wire.told(error)}): start it, or correct "
            "server="
        ) from None  # what it wraps may repeat the key
    except ValueError as error:
        raise UserError(
            f"scorer judge: server {wire.url} is no OpenAI-compatible API (most end in /v1): {error}"
        ) from error
    rows = found.get("data") if isinstance(found, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {row["id"]: str(row.get("root") or "") for row in rows if isinstance(row.get("id"), str)}
