"""A small OpenAI-compatible server on this machine, with faults on request, and pictures to send to it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.scorers import Scorer, load_scorer

POINT = {"rubric": "unifiedreward_point"}
PROMPTS = ["a red circle", "two {prompt} [squares]", "naïve 猫\n", "", "green", "a red circle"]


@dataclass
class Reaction:
    """What the server does with one question.

    Attributes:
        text: the judge's words, sent as a chat completion.
        status: HTTP status.
        body: bytes sent in place of a chat completion.
        headers: sent along.
        delay: seconds before anything is sent.
        drip: seconds between the bytes of the body.
        cut: the connection ends before the answer ("all") or in its middle ("half").
        finish: why the judge stopped.
        raw: bytes sent in place of all this, and bytes sent after them for ever.
    """

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    cut: str = ""
    finish: str = "stop"
    raw: tuple[bytes, bytes] | None = None

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"object": "chat.completion", "model": "tiny", "choices": [choice]}).encode()


@dataclass
class Seen:
    """One request that arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][-1]["text"]

    @property
    def pictures(self) -> list[Image.Image]:
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"][:-1]]
        return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


Reply = Callable[[Seen], Reaction | str] | Sequence[Reaction | str]


class JudgeServer:
    """Answers POST /v1/chat/completions as `reply` says: by the request, or in turn (the last stays).

    It lists `models` at GET /v1/models, or answers there with `hello`.
    """

    def __init__(self, reply: Reply = (), *, models: Any = ("tiny",), hello: Reaction | None = None) -> None:
        self.reply, self.models, self.hello = reply, models, hello
        self.seen: list[Seen] = []
        self.under_way = self.most_under_way = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                owner.get(self)

            def do_POST(self) -> None:
                owner.post(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *arguments: Any) -> None:
                pass  # a client that went away is part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        arguments = {"poll_interval": 0.01}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=arguments, daemon=True)
        self._thread.start()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def questions(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.path == "/v1/chat/completions"]

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.seen.append(Seen(handler.path, dict(handler.headers), None))
        rows = [row if isinstance(row, dict) else {"id": row, "object": "model"} for row in self.models]
        body = json.dumps({"object": "list", "data": rows}).encode()
        known = handler.path == "/v1/models"
        self._send(handler, self.hello or Reaction(body=body, status=200 if known else 404))

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        seen = Seen(handler.path, dict(handler.headers), body)
        with self._lock:
            count = len(self.questions)
            self.seen.append(seen)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if handler.path != "/v1/chat/completions":
                reaction: Reaction | str = Reaction(status=404)
            elif callable(self.reply):
                reaction = self.reply(seen)
            else:
                reaction = self.reply[min(count, len(self.reply) - 1)]
            self._send(handler, Reaction(reaction) if isinstance(reaction, str) else reaction)
        finally:
            with self._lock:
                self.under_way -= 1

    def _send(self, handler: BaseHTTPRequestHandler, reaction: Reaction) -> None:
        handler.close_connection = True
        if self._closing.wait(reaction.delay) or reaction.cut == "all":
            return
        if reaction.raw:
            handler.wfile.write(reaction.raw[0])
            while reaction.raw[1] and not self._closing.wait(0.05):
                handler.wfile.write(reaction.raw[1])
            return
        content = reaction.content()
        handler.send_response(reaction.status)
        for name, value in {"Content-Length": str(len(content)), **reaction.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reaction.drip:
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if self._closing.wait(reaction.drip):
                    return
            return
        handler.wfile.write(content[: len(content) // 2] if reaction.cut == "half" else content)


def brightness(image: Image.Image) -> float:
    """The mean of a picture's bytes, 0 to 1."""
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean() / 255)


def by_brightness(seen: Seen) -> str:
    """A judge that likes light: a score 1 to 5 for one picture, shares for two."""
    light = [brightness(image) for image in seen.pictures]
    if len(light) == 1:
        return f"light (object): 1\nFinal Score: {1 + 4 * light[0]:.6f}"
    share = light[0] / (light[0] + light[1])
    axes = ("Alignment", "Coherence", "Style")
    return "\n\n".join(f"{axis} Score:\n Image 1: {share:.6f}\n Image 2: {1 - share:.6f}" for axis in axes)


def pictures(count: int = 6) -> list[Image.Image]:
    """Noisy pictures of growing lightness and different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(40, 64), (64, 64), (90, 50), (1, 1), (33, 32), (20, 200)]
    return [
        Image.fromarray(rng.integers(30 * i, 30 * i + 60, (h, w, 3), dtype=np.uint8))
        for i, (w, h) in enumerate(sizes[:count])
    ]


def judge(server: JudgeServer, **options: Any) -> Scorer:
    """A loaded judge behind this server."""
    return load_scorer("judge", server=server.url, **{**POINT, "retries": 1, "timeout": 5.0, **options})


def expect(values: torch.Tensor, wanted: Sequence[float]) -> None:
    """Asserts that these are the values, up to rounding."""
    torch.testing.assert_close(
        values, torch.tensor([float(each) for each in wanted]), rtol=0, atol=1e-5, equal_nan=True
    )
