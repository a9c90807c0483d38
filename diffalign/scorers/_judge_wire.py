"""Requests to an OpenAI-compatible server: in time, without redirects, and with the key kept to itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from diffalign.scorers._judge_prompts import printable, quoted

BODY_LIMIT = 4 * 2**20
"""Bytes of an answer; a judge's is a few kilobytes."""


class Refused(Exception):
    """An answer with an HTTP status that is no success."""

    def __init__(self, status: int, said: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"status {status}" + (f": {said}" if said else ""))
        self.status, self.headers = status, headers


class _Deadline:
    """Ends one request in time, wherever it is: a socket's own limit holds for one packet alone.

    Attributes:
        passed: it was ended.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for each in self._sockets:
            each.close()

    def _end(self) -> None:
        for each in self._sockets:
            self.passed = True  # before there is a connection, the socket's own limit ends it
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def watched(self, kind: Any) -> Any:
        """Returns a maker of connections of this kind whose sockets end in time."""

        def make(*arguments: Any, **named: Any) -> Any:
            connection = kind(*arguments, **named)
            create = connection._create_connection

            def connected(*arguments: Any, **named: Any) -> socket.socket:
                found: socket.socket = create(*arguments, **named)
                # A copy: TLS takes the socket over, and urllib closes it while the answer is read.
                self._sockets.append(found.dup())
                if not self._timer.is_alive():  # connecting took all the time
                    self._end()
                return found

            connection._create_connection = connected
            return connection

        return make


class _Http(urllib.request.HTTPHandler):
    """Connections that the deadline of their thread ends."""

    def __init__(self, local: threading.local) -> None:
        super().__init__()
        self._local = local

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._local.deadline.watched(http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    """The same through TLS, with the certificates of the system."""

    def __init__(self, local: threading.local) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(context=self._tls)
        self._local = local

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        make = self._local.deadline.watched(http.client.HTTPSConnection)
        return self.do_open(make, req, context=self._tls)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The standard library would carry the key to wherever a server points."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def is_here(url: str) -> bool:
    """Returns whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


class Wire:
    """Requests with a key to one server; neither the wire nor what it raises shows the key."""

    def __init__(self, url: str, key: str | None) -> None:
        # A proxy of the environment is for the world outside of this machine.
        proxies = urllib.request.ProxyHandler({} if is_here(url) else None)
        self._local = threading.local()
        self._opener = urllib.request.build_opener(
            proxies, _NoRedirects(), _Http(self._local), _Https(self._local)
        )
        self.url, self._key = url, key

    def __repr__(self) -> str:
        return f"Wire({self.url})"

    def safe(self, text: str) -> str:
        """Returns the text without the key and without signs that a terminal would obey."""
        return printable(text.replace(self._key, "***") if self._key else text)

    def quoted(self, text: str, length: int = 60) -> str:
        """Returns the beginning of a text as one line, without the key."""
        return quoted(self.safe(" ".join(text.split())), length)

    def told(self, error: BaseException) -> str:
        """Returns what an error says, without the key: some repeat what the server sent."""
        return self.quoted(str(getattr(error, "reason", None) or error) or type(error).__name__, 200)

    def send(self, address: str, body: Any = None, *, timeout: float) -> Any:
        """Returns the JSON at this address below the server's URL.

        Raises:
            Refused: an HTTP status that is no success.
            OSError, http.client.HTTPException: no connection, a cut one, or no answer in time.
            ValueError: an answer that is no JSON, or longer than BODY_LIMIT.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{address}", data, headers)
        with _Deadline(timeout) as deadline:
            self._local.deadline = deadline
            try:
                content = self._content(request, timeout)
            except (OSError, http.client.HTTPException) as error:
                if deadline.passed:
                    raise TimeoutError("timed out") from error
                raise
            if deadline.passed:  # what looks like its end may be ours
                raise TimeoutError("timed out")
        text = content.decode(errors="replace")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the answer is no JSON: {self.quoted(text)}") from error

    def _content(self, request: urllib.request.Request, timeout: float) -> bytes:
        """Returns the body of the answer to a request."""
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return _read(response)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    said = self._message(_read(error))
                except (OSError, http.client.HTTPException, ValueError):
                    said = ""
                raise Refused(error.code, said, dict(error.headers.items())) from None

    def _message(self, content: bytes) -> str:
        """Returns what a server says of its refusal: the message of its JSON, else the text's beginning."""
        found: Any = content.decode(errors="replace")
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(found)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        return self.quoted(found if isinstance(found, str) else json.dumps(found), 200)


def _read(response: Any) -> bytes:
    """Returns the whole body of a response."""
    content = b""
    while piece := response.read1(65536):
        content += piece
        if len(content) > BODY_LIMIT:
            raise ValueError(f"the answer is longer than {BODY_LIMIT // 2**20} MB")
    missing = response.length
    if missing:
        raise http.client.IncompleteRead(content, missing)
    return content
