"""A judge behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a provider's own.

Only the standard library: a few requests at once, in threads. The key goes into the header of the requests
and nowhere else; whatever a server says is quoted with the key struck out, since some repeat it.
"""

from __future__ import annotations

import base64
import contextlib
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
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from diffalign.common.errors import UserError, brief
from diffalign.scorers._judge_prompts import Answer, Question

if TYPE_CHECKING:
    from PIL import Image

BODY_LIMIT = 4 * 2**20
"""Bytes of an answer; a judge's is a few kilobytes."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first and the latest repetition; each doubles, and a random half is taken off."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait for (Retry-After); a question that must wait longer is given up."""
HELLO_TIMEOUT = 15.0
"""Seconds for the list of models, which needs no work."""
SEED = 0

_HOPELESS = {
    401: "it does not accept the key",
    403: "it does not allow this",
    404: "it knows no such address or model: see server= (most end in /v1) and model=",
    405: "it knows no chat completions: see server= (most end in /v1)",
}
"""Statuses that every further question would meet."""


@dataclass(frozen=True)
class Request:
    """How questions are sent.

    Attributes:
        url: of the API, without its last slash.
        model: name of the model there.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        image_format: of the pictures on their way.
        timeout: seconds for one try.
        retries: further tries.
        workers: questions under way at once.
    """

    url: str
    model: str
    max_tokens: int
    temperature: float
    image_format: Literal["png", "jpeg"]
    timeout: float
    retries: int
    workers: int


class _Failed(Exception):
    """One try that gave no answer.

    Attributes:
        failure: as of an Answer.
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
        self.failure: Literal["down", "refused", "lost"] = failure
        self.again, self.wait = again, wait


class _Refused(Exception):
    """An answer with an HTTP status that is no success."""

    def __init__(self, status: int, said: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"status {status}" + (f": {said}" if said else ""))
        self.status, self.headers = status, headers


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The standard library would carry the key to wherever a server points."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


class Wire:
    """Requests with a key to one server; neither the wire nor what it raises shows the key."""

    def __init__(self, url: str, key: str | None) -> None:
        host = urlsplit(url).hostname or ""
        # A proxy of the environment is for the world outside of this machine.
        own = host in ("localhost", "::1") or host.startswith("127.")
        proxies = urllib.request.ProxyHandler({}) if own else urllib.request.ProxyHandler()
        self._opener = urllib.request.build_opener(proxies, _NoRedirects())
        self._url, self._key = url, key

    def __repr__(self) -> str:
        return f"Wire({self._url})"

    def safe(self, text: str) -> str:
        """Returns the text without the key."""
        return text.replace(self._key, "***") if self._key else text

    def send(self, address: str, body: Any = None, *, timeout: float) -> Any:
        """Returns the JSON at this address below the server's URL.

        Raises:
            _Refused: an HTTP status that is no success.
            OSError, http.client.HTTPException: no connection, a cut one, or no answer in time.
            ValueError: an answer that is no JSON, or longer than BODY_LIMIT.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{address}", data, headers)
        end = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                content = _read(response, end)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    said = self._message(_read(error, end))
                except (OSError, http.client.HTTPException, ValueError):
                    said = ""
                raise _Refused(error.code, said, dict(error.headers.items())) from None
        text = content.decode(errors="replace")
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"the answer is no JSON: {self.quoted(text)}") from error

    def quoted(self, text: str, length: int = 60) -> str:
        """Returns the beginning of a text as one line, without the key."""
        line = " ".join(self.safe(text).split())
        return line if len(line) <= length else line[:length] + "..."

    def _message(self, content: bytes) -> str:
        """Returns what a server says of its refusal: the message of its JSON, else the text's beginning."""
        found: Any = content.decode(errors="replace")
        with contextlib.suppress(ValueError):
            found = json.loads(found)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        return self.quoted(found if isinstance(found, str) else json.dumps(found), 200)


def _read(response: Any, end: float) -> bytes:
    """Returns the body of a response, whole before `end`: a socket's own limit holds for one packet alone."""
    content = b""
    while piece := response.read1(65536):
        content += piece
        if len(content) > BODY_LIMIT:
            raise ValueError(f"the answer is longer than {BODY_LIMIT // 2**20} MB")
        if time.monotonic() > end:
            raise TimeoutError("the answer did not end in time")
    missing = response.length
    if missing:
        raise http.client.IncompleteRead(content, missing)
    return content


class ServerJudge:
    """Asks the questions of a batch, several at once, and repeats those that a fault stopped.

    Args:
        request: how.
        wire: where.
        known: names of the models that the server lists, for the error of an unknown one.
    """

    def __init__(self, request: Request, wire: Wire, known: Sequence[str] = ()) -> None:
        self._request, self._wire, self._known = request, wire, list(known)

    def quoted(self, text: str) -> str:
        """Returns the beginning of an answer, fit to be shown."""
        return self._wire.quoted(text)

    def modules(self) -> list[Any]:
        """Returns no network: the weights are elsewhere."""
        return []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Returns the answers, in order.

        Raises:
            UserError: the server refuses what every further question would meet too (the key, the model).
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
        count = min(self._request.workers, len(questions))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()
        if raised:
            raise raised[0]
        return answers

    def _answer(self, question: Question, encoded: dict[int, str], stop: threading.Event) -> Answer:
        """Returns the answer to one question, tried as often as allowed."""
        body = self._body(question, encoded)
        tries = 0
        while True:
            try:
                return self._try(body)
            except _Failed as error:
                wait = max(error.wait, _pause(tries))
                if not error.again or tries >= self._request.retries or wait > LONGEST_WAIT:
                    counted = f" ({tries + 1} tries)" if tries else ""
                    return Answer(error=self._wire.safe(f"{error}{counted}"), failure=error.failure)
                tries += 1
                if stop.wait(wait):
                    return Answer(error="the batch was stopped", failure="lost")

    def _body(self, question: Question, encoded: dict[int, str]) -> dict[str, Any]:
        """Returns what is sent for a question: the pictures in order, then the text."""
        content: list[dict[str, Any]] = []
        for image in question.images:
            if id(image) not in encoded:  # one of a pair is shown several times
                encoded[id(image)] = as_uri(image, self._request.image_format)
            content.append({"type": "image_url", "image_url": {"url": encoded[id(image)]}})
        content.append({"type": "text", "text": question.text})
        return {
            "model": self._request.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._request.max_tokens,
            "temperature": self._request.temperature,
            "seed": SEED,
            "stream": False,
        }

    def _try(self, body: dict[str, Any]) -> Answer:
        """Returns the answer to one request; raises _Failed, or a UserError where none can be answered."""
        try:
            found = self._wire.send("chat/completions", body, timeout=self._request.timeout)
        except _Refused as error:
            raise self._refusal(error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"scorer judge: server {self._request.url} has no valid certificate: {error.reason}"
                ) from error
            cut = isinstance(error.reason, ConnectionResetError | BrokenPipeError)
            kind: Literal["lost", "down"] = "lost" if cut else "down"
            raise _Failed(f"no connection: {error.reason}", kind, again=True) from error
        except TimeoutError as error:
            raise _Failed(f"no answer within {self._request.timeout:g} s", again=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"the connection was cut: {brief(error)}", again=True) from error
        except ValueError as error:
            raise _Failed(str(error)) from error
        return self._answer_of(found)

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
            said = self._wire.quoted(json.dumps(found))
            raise _Failed(f"the answer is no chat completion with a text: {said}") from None
        return Answer(content, cut=choice.get("finish_reason") == "length")

    def _refusal(self, error: _Refused) -> UserError | _Failed:
        """Returns what an HTTP status means: for all questions, for this one, or for now."""
        status, url = error.status, self._request.url
        if status in _HOPELESS or 300 <= status < 400:
            means = _HOPELESS.get(status, "it points elsewhere: give the address itself as server=")
            known = f"; it has the models {', '.join(self._known)}" if status == 404 and self._known else ""
            return UserError(f"scorer judge: server {url} refuses, {means} ({error}){known}")
        if status in (408, 429) or status >= 500:
            wait = _seconds(error.headers)
            asks = f", it asks to wait {wait:g} s" if wait > LONGEST_WAIT else ""
            return _Failed(f"the server fails with {error}{asks}", again=True, wait=wait)
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
    except (TypeError, ValueError):
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


def models_of(wire: Wire, url: str, *, timeout: float) -> dict[str, str]:
    """Returns the models that a server lists, with the weights that each says it has ("" where it does not).

    Raises:
        UserError: it is not reached, refuses the key, or is no OpenAI-compatible API.
    """
    try:
        found = wire.send("models", timeout=min(timeout, HELLO_TIMEOUT))
    except _Refused as error:
        if error.status in (401, 403):
            raise UserError(
                f"scorer judge: server {url} refuses, {_HOPELESS[error.status]} ({error})"
            ) from None
        if error.status >= 500 and error.status != 501:
            raise UserError(f"scorer judge: server {url} is not ready ({error}): try again later") from None
        return {}  # not every server has a list
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or brief(error)
        raise UserError(
            f"scorer judge: server {url} is not reached ({reason}): start it, or correct server="
        ) from error
    except ValueError as error:
        raise UserError(
            f"scorer judge: server {url} is no OpenAI-compatible API (most end in /v1): {error}"
        ) from error
    rows = found.get("data") if isinstance(found, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {row["id"]: str(row.get("root") or "") for row in rows if isinstance(row.get("id"), str)}
