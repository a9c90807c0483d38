"""A vision-language model as judge: it is asked in words, and its answer is read.

The model stands behind an OpenAI-compatible server (`server`) or runs here with transformers (`path`). What
it is asked is one of UnifiedReward's rubrics (github.com/CodeGoat24/UnifiedReward; `_judge_prompts.py` names
the files) or a text of your own.

Scales (`scale`, named by the rubric):
    unifiedreward_point     1 to 5 after "Final Score:" (UnifiedReward 1.0)
    unifiedreward_acs       1 to 5, the mean of alignment, coherence and style (2.0); the mean is ours, since
                            the authors give the three alone; they are the parts
    unifiedreward_acs_v1    the same after a score for each word of the prompt (1.0)
    unifiedreward_pair      0 to 1: the share of a picture in two scores that sum to 1, the mean of alignment,
                            coherence and style (2.0; the mean is ours); they are the parts
    unifiedreward_pair_v1   0 to 1: 1 for "Image 1 is better", 0.5 for "equally good" (1.0)
    own LOW to HIGH         a number, read by your own pattern; ask so that more is better

Pairs: every two pictures of a prompt are asked about, and the value of a picture is the mean of its shares
against the others; the mean over a group is 0.5 where all answers could be read. With both_orders each two
are asked about in both orders and the shares averaged, which takes out a judge's liking for the first place:
k (k - 1) questions for k pictures. A pair with an answer that cannot be read counts for neither.

Parts beside those: `unparsed`, answers about this picture that came and could not be read; `unanswered`,
questions about it that got no answer. A picture without a value is NaN and `errors` says why.
Convention: temperature 0, pictures as PNG. UnifiedReward's client sends JPEG of quality 95 (as
image_format=jpeg does); its scripts for transformers decode as the weights' generation config says, which may
be sampling.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from diffalign.common.errors import UserError, unknown
from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images
    from diffalign.scorers._judge_local import LocalJudge
    from diffalign.scorers._judge_prompts import Question, Rubric
    from diffalign.scorers._judge_server import ServerJudge

DTYPES = ("fp32", "bf16", "fp16")
FORMATS = ("png", "jpeg")
KEY = "OPENAI_API_KEY"


@dataclass(kw_only=True)
class Plugin(Scorer):
    """Scores of pictures by a vision-language model; give `server` or `path`, and `rubric` or `prompt`.

    Args:
        server: address of an OpenAI-compatible API, such as http://localhost:8000/v1.
        model: name of the model on the server; may be left out where the server has one alone.
        api_key_env: name of the environment variable with the key for the server; null sends none.
        timeout: seconds for an answer of the server.
        retries: further tries after a fault of the server or the connection, with growing pauses.
        workers: questions under way at once.
        image_format: png | jpeg, how pictures go to the server.
        temperature: of the server's sampling; 0 is greedy.
        path: folder or hub id of a model for transformers, with its processor.
        revision: of a hub id.
        dtype: fp32 | bf16 | fp16, what the model at `path` computes in; published judges are in bf16.
        trust_remote_code: run the Python files that come with the weights at `path`.
        rubric: one of the built-in ones, see above.
        prompt: a question of your own about one picture; {prompt} stands for its prompt.
        pattern: regular expression for it, whose one group is the number; the last match counts.
        low: lowest legal number; one outside cannot be read.
        high: highest legal number.
        max_tokens: longest answer.
        both_orders: ask about each two pictures in both orders; else in one that their pixels decide.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    server: str | None = None
    model: str | None = None
    api_key_env: str | None = KEY
    timeout: float = 120.0
    retries: int = 4
    workers: int = 8
    image_format: Literal["png", "jpeg"] = "png"
    temperature: float = 0.0
    path: str | None = None
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    trust_remote_code: bool = False
    rubric: str | None = None
    prompt: str | None = None
    pattern: str | None = None
    low: float | None = None
    high: float | None = None
    max_tokens: int = 2048
    both_orders: bool = True

    def __post_init__(self) -> None:
        self._check_place()
        for what, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("image_format", self.image_format, FORMATS),
        ):
            if value not in known:
                raise unknown(f"{what} of scorer judge", value, known)
        for what, number, least in (
            ("retries", self.retries, 0),
            ("workers", self.workers, 1),
            ("max_tokens", self.max_tokens, 1),
            ("temperature", self.temperature, 0),
        ):
            if not least <= number < math.inf:
                raise UserError(f"scorer judge: {what} is {number}: use {least} or more")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"scorer judge: timeout is {self.timeout}: use seconds above 0")
        self._asks = self._own_rubric() if self.rubric is None else self._built_in()
        self.scale = self._asks.name
        self._judge: ServerJudge | LocalJudge | None = None
        self._answered = False

    def _check_place(self) -> None:
        """Checks that there is one judge, and no option of the other kind."""
        if bool(self.server) == bool(self.path):
            raise UserError(
                "scorer judge: give either server= (http://localhost:8000/v1) or path= (folder or hub id)"
            )
        if self.path:
            for what, set_here in (("model", self.model is not None), ("temperature", self.temperature != 0)):
                if set_here:
                    raise UserError(f"scorer judge: {what}= is for server=, and path={self.path} is given")
            return
        for what, given in (
            ("revision", self.revision is not None),
            ("trust_remote_code", self.trust_remote_code),
        ):
            if given:
                raise UserError(f"scorer judge: {what}= is for path=, and server= is given")
        assert self.server is not None
        try:
            parts = urlsplit(self.server)
            parts.port  # noqa: B018  # reading it checks it
        except ValueError:
            parts = urlsplit("")
        if "@" in self.server or "?" in self.server:
            # Not repeated: it may hold a password.
            raise UserError(
                "scorer judge: server= has a name, password or query in it: give the plain address, and the "
                "key in the environment variable that api_key_env= names"
            )
        legal = re.fullmatch(r"[!-~]+", self.server) and parts.scheme in ("http", "https") and parts.hostname
        if not legal or parts.fragment:
            raise UserError(
                f"scorer judge: server={self.server} is no address: give one such as http://localhost:8000/v1"
            )
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Not repeated: it may be the key itself, and most keys have small letters.
            raise UserError(
                f"scorer judge: api_key_env= is no name of an environment variable (capitals): such as {KEY}"
            )

    def _built_in(self) -> Rubric:
        from diffalign.scorers._judge_prompts import RUBRICS

        for what in ("prompt", "pattern", "low", "high"):
            if getattr(self, what) is not None:
                raise UserError(
                    f"scorer judge: rubric={self.rubric} has its own {what}: leave rubric or {what} out"
                )
        if self.rubric not in RUBRICS:
            raise unknown("rubric of scorer judge", self.rubric, RUBRICS)
        return RUBRICS[self.rubric]

    def _own_rubric(self) -> Rubric:
        from diffalign.scorers._judge_prompts import RUBRICS, own_rubric

        if self.prompt is None or self.pattern is None or self.low is None or self.high is None:
            raise UserError(
                f"scorer judge: give rubric= ({', '.join(RUBRICS)}), or a question of your own with all of "
                "prompt=, pattern=, low= and high="
            )
        return own_rubric(self.prompt, self.pattern, self.low, self.high)

    @property
    def relative(self) -> bool:
        """With the rubrics that compare two pictures."""
        return self._asks.pair

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its model, or once the server has been reached.

        Raises:
            UserError: the server is not there or refuses the key, or the weights do not load.
        """
        if self.server:
            self._judge, name = self._reach(self.server.rstrip("/"))
        else:
            from diffalign.scorers._judge_local import open_local

            assert self.path is not None
            self._judge, name = open_local(
                self.path,
                revision=self.revision,
                device=device,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                max_tokens=self.max_tokens,
            )
        self.version = f"{name}+{self._rubric_hash()}"
        return self

    def _reach(self, url: str) -> tuple[ServerJudge, str]:
        """Returns the judge at a server, which is asked for its list of models, and the name of its model."""
        from diffalign.scorers._judge_server import Request, ServerJudge, Wire, models_of

        wire = Wire(url, self._key())
        listed = models_of(wire, url, timeout=self.timeout)
        if self.model is None and len(listed) != 1:
            names = f"it has {', '.join(listed)}" if listed else "it does not list its models"
            raise UserError(f"scorer judge: give model=, the name of one on server {url}: {names}")
        model = self.model or next(iter(listed))
        request = Request(
            url=url,
            model=model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            image_format=self.image_format,
            timeout=self.timeout,
            retries=self.retries,
            workers=self.workers,
        )
        root = listed.get(model, "")  # vLLM says which weights a served name stands for
        name = wire.safe(model if root in ("", model) else f"{model}={root}")
        return ServerJudge(request, wire, list(listed)), name

    def _key(self) -> str | None:
        """Returns the key for the server, None where there is none; it is never kept among the options."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            if self.api_key_env != KEY:
                raise UserError(
                    f"scorer judge: the environment variable {self.api_key_env} with the key is not set"
                )
            return None
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(
                f"scorer judge: {self.api_key_env} holds spaces or signs that no key has: set it again"
            )
        return key

    def _rubric_hash(self) -> str:
        """Returns a short name of what is asked and how it is read, and of what else decides an answer."""
        content = [self._asks.name, self._asks.text, self._asks.settings, self.max_tokens]
        if self.server:
            content += [self.temperature, self.image_format]
        else:
            content += [self.dtype]
        if self._asks.pair:
            content += [self.both_orders]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def modules(self) -> list[torch.nn.Module]:
        """Returns the network; none where it is on a server."""
        return self._loaded.modules()

    @property
    def _loaded(self) -> ServerJudge | LocalJudge:
        if self._judge is None:
            raise UserError("scorer judge is not ready: call .load() first")
        return self._judge

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        from diffalign.scorers._pixels import as_pictures

        assert prompts is not None
        questions = [
            self._asks.question(prompt, picture)
            for prompt, picture in zip(prompts, as_pictures(images), strict=True)
        ]
        results = self._ask(questions)
        rows = [{**result.read, **_counts([result])} for result in results]
        return _scores(rows, [result.problem for result in results], self._asks.parts)

    def _score_group(
        self, images: Images, prompt: str | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        from diffalign.scorers._pixels import as_pictures

        assert prompt is not None
        pictures = as_pictures(images)
        shown = self._orders(pictures)
        asked = self._ask([self._asks.question(prompt, pictures[one], pictures[two]) for one, two in shown])
        rows, errors = [], []
        for place in range(len(pictures)):
            about = [(pair, result) for pair, result in zip(shown, asked, strict=True) if place in pair]
            row = {name: _mean_share(place, about, name) for name in ("", *self._asks.parts)}
            rows.append({**row, **_counts([result for _, result in about])})
            alone = "a judge of pairs needs two pictures of a prompt, and this is the only one"
            problem = next((result.problem for _, result in about if result.problem), alone)
            errors.append(problem if math.isnan(row[""]) else None)
        return _scores(rows, errors, self._asks.parts)

    def _orders(self, pictures: list[Image.Image]) -> list[tuple[int, int]]:
        """Returns which two pictures are shown, in which order, for each question about a group."""
        if self.both_orders:
            return list(itertools.permutations(range(len(pictures)), 2))
        # Not the order in which they came: values would depend on it, as judges like the first place.
        by_pixels = [hashlib.sha256(f"{image.size}".encode() + image.tobytes()) for image in pictures]
        digests = [digest.digest() for digest in by_pixels]
        ranked = sorted(range(len(pictures)), key=digests.__getitem__)
        return list(itertools.combinations(ranked, 2))

    def _ask(self, questions: list[Question]) -> list[_Result]:
        """Returns what became of each question.

        Raises:
            UserError: the server is gone, or the judge takes none of the first questions.
        """
        judge = self._loaded
        answers = judge.ask(questions)
        failures = {answer.failure for answer in answers}
        if failures == {"down"}:
            raise UserError(
                f"scorer judge: server {self.server} is not reached any more ({answers[0].error}): start it "
                "and run again"
            )
        if failures == {"refused"} and not self._answered:
            raise UserError(f"scorer judge: the judge answers no question: {answers[0].error}")
        self._answered = self._answered or None in failures
        results = []
        for answer in answers:
            read, problem = self._asks.read(answer), answer.error
            if problem is None and math.isnan(read[""]):
                cut = f", cut at max_tokens={self.max_tokens}" if answer.cut else ""
                problem = f"no score can be read in the answer{cut}: '{judge.quoted(answer.text)}'"
            results.append(_Result(read, problem, answered=answer.error is None))
        return results


@dataclass(frozen=True)
class _Result:
    """What became of one question: what was read, and why no value could be."""

    read: dict[str, float]
    problem: str | None
    answered: bool


def _counts(results: Sequence[_Result]) -> dict[str, float]:
    """Returns how many answers could not be read, and how many did not come."""
    unanswered = sum(not result.answered for result in results)
    return {
        "unparsed": sum(result.problem is not None for result in results) - unanswered,
        "unanswered": unanswered,
    }


def _mean_share(place: int, about: Sequence[tuple[tuple[int, int], _Result]], name: str) -> float:
    """Returns the mean of a picture's shares against the others; NaN without one.

    Those of one pair, in both orders, are averaged first, and count only where all could be read.
    """
    of_pair: dict[int, list[float]] = {}
    for (one, two), result in about:
        share = result.read[name]
        of_pair.setdefault(two if one == place else one, []).append(share if one == place else 1 - share)
    means = [sum(shares) / len(shares) for shares in of_pair.values()]
    legal = [mean for mean in means if not math.isnan(mean)]
    return sum(legal) / len(legal) if legal else math.nan


def _scores(rows: Sequence[Mapping[str, float]], errors: list[str | None], parts: tuple[str, ...]) -> Scores:
    """Returns rows of numbers by name as scores; "" is the value."""
    import torch

    names = ("", *parts, "unparsed", "unanswered")
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in names}
    return Scores(columns.pop(""), parts=columns, errors=errors)
