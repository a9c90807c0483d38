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

Equal pictures share evenly, and nothing is asked about the two.

Parts beside those: `unparsed`, answers about this picture that came and could not be read; `unanswered`,
questions about it that got no answer. A picture without a value is NaN and `errors` says why. A server that
is gone, or that leaves all of several questions without an answer, stops the run, which can be started again.
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
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from diffalign.common.errors import UserError, unknown
from diffalign.scorers._base import Scorer, Scores
from diffalign.scorers._tower_scorer import DTYPES

if TYPE_CHECKING:
    import torch

    from diffalign.scorers._base import Images
    from diffalign.scorers._judge_local import LocalJudge
    from diffalign.scorers._judge_pairs import Group, Result
    from diffalign.scorers._judge_prompts import Question, Rubric
    from diffalign.scorers._judge_server import ServerJudge

FORMATS = ("png", "jpeg")
KEY = "OPENAI_API_KEY"
MOST_REFUSED = 16
"""Questions that the judge may refuse, with none answered so far, before that stops the run."""
PATH_ONLY = ("revision", "dtype", "trust_remote_code")
SERVER_ONLY = ("model", "api_key_env", "timeout", "retries", "workers", "image_format", "temperature", "seed")
"""Options that only one kind of judge has."""


@dataclass(kw_only=True)
class Plugin(Scorer):
    """Scores of pictures by a vision-language model; give `server` or `path`, and `rubric` or `prompt`.

    Args:
        server: address of an OpenAI-compatible API, such as http://localhost:8000/v1.
        model: name of the model on the server; may be left out where the server has one alone.
        api_key_env: name of the environment variable with the key for the server; null sends none; auto is
            OPENAI_API_KEY where that is set, and refuses to send it unencrypted (http) to another machine.
        timeout: seconds for an answer of the server.
        retries: further tries after a fault of the server or the connection, with growing pauses.
        workers: questions under way at once.
        image_format: png | jpeg, how pictures go to the server.
        temperature: of the server's sampling; 0 is greedy.
        seed: of the server's sampling; null sends none.
        path: folder or hub id of a model for transformers, with its processor.
        revision: of a hub id.
        dtype: fp32 | bf16 | fp16, what the model at `path` computes in; published judges are in bf16.
        trust_remote_code: run the Python files that come with the weights at `path`.
        rubric: one of the built-in ones, see above.
        prompt: a question of your own about one picture; {prompt} stands for its prompt.
        pattern: regular expression of the label before the number, and {number} behind it, such as
            Score{number}, which reads as the built-in rubrics do; or one whose one group is the number.
            The last match counts.
        low: lowest legal number; one outside cannot be read.
        high: highest legal number.
        max_tokens: longest answer; null sends the server no limit.
        both_orders: ask about each two pictures in both orders; else in one that their pixels decide.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    server: str | None = None
    model: str | None = None
    api_key_env: str | None = "auto"
    timeout: float = 120.0
    retries: int = 4
    workers: int = 8
    image_format: Literal["png", "jpeg"] = "png"
    temperature: float = 0.0
    seed: int | None = 0
    path: str | None = None
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    trust_remote_code: bool = False
    rubric: str | None = None
    prompt: str | None = None
    pattern: str | None = None
    low: float | None = None
    high: float | None = None
    max_tokens: int | None = 2048
    both_orders: bool = True

    def __post_init__(self) -> None:
        self._check_place()
        for what, known in (("dtype", DTYPES), ("image_format", FORMATS)):
            value = getattr(self, what)
            if value not in known:
                raise unknown(f"{what} of scorer judge", value, known)
        for what, least in (("retries", 0), ("workers", 1), ("max_tokens", 1), ("temperature", 0)):
            number = getattr(self, what)
            if number is not None and not least <= number < math.inf:
                raise UserError(f"scorer judge: {what} is {number}: use {least} or more")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"scorer judge: timeout is {self.timeout}: use seconds above 0")
        self._asks = self._own_rubric() if self.rubric is None else self._built_in()
        if not (self.both_orders or self._asks.pair):
            raise UserError(
                "scorer judge: both_orders= is for rubrics that compare two pictures: leave it out"
            )
        self.scale = self._asks.name
        self.batch_size = max(32, 4 * self.workers)  # the workers wait for each other at the end of a batch
        self._judge: ServerJudge | LocalJudge | None = None
        self._answered, self._refused = False, 0

    def _check_place(self) -> None:
        """Checks that there is one judge, and no option of the other kind."""
        if bool(self.server) == bool(self.path):
            raise UserError(
                "scorer judge: give either server= (http://localhost:8000/v1) or path= (folder or hub id)"
            )
        here, there = ("path", "server") if self.path else ("server", "path")
        defaults = {each.name: each.default for each in fields(self)}
        for what in SERVER_ONLY if self.path else PATH_ONLY:
            if getattr(self, what) != defaults[what]:
                raise UserError(
                    f"scorer judge: {what}= is for {there}=, and {here}= is given: leave one of them out"
                )
        if self.path:
            if self.max_tokens is None:
                raise UserError("scorer judge: max_tokens= of a judge at path= is a number, such as 2048")
            return
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
        if self.api_key_env not in (None, "auto") and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Not repeated: it may be the key itself, and most keys have small letters.
            raise UserError(
                "scorer judge: api_key_env= is no name of an environment variable (capitals, such as "
                f"{KEY}), auto or null"
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

            assert self.path is not None and self.max_tokens is not None
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
        from diffalign.scorers._judge_server import ServerJudge, models_of
        from diffalign.scorers._judge_wire import Wire

        wire = Wire(url, self._key())
        listed = models_of(wire, timeout=self.timeout)
        if self.model is None and len(listed) != 1:
            names = f"it has {', '.join(listed)}" if listed else "it does not list its models"
            raise UserError(f"scorer judge: give model=, the name of one on server {url}: {wire.safe(names)}")
        model = self.model or next(iter(listed))
        settings = {name: getattr(self, name) for name in ("max_tokens", "temperature", "seed")}
        judge = ServerJudge(
            wire=wire,
            settings={"model": model, **{name: each for name, each in settings.items() if each is not None}},
            image_format=self.image_format,
            timeout=self.timeout,
            retries=self.retries,
            workers=self.workers,
            known=list(listed),
        )
        root = listed.get(model, "")  # vLLM says which weights a served name stands for
        return judge, wire.safe(model if root in ("", model) else f"{model}={root}")

    def _key(self) -> str | None:
        """Returns the key for the server, None where there is none; it is never kept among the options."""
        from diffalign.scorers._judge_wire import is_here

        if self.api_key_env is None:
            return None
        named = self.api_key_env != "auto"
        name = self.api_key_env if named else KEY
        key = os.environ.get(name, "").strip()
        if not key:
            if named:  # not repeated: it may be the key itself
                raise UserError(
                    "scorer judge: the environment variable that api_key_env= names, with the key, is not set"
                )
            return None
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(f"scorer judge: {name} holds spaces or signs that no key has: set it again")
        assert self.server is not None
        if not (named or urlsplit(self.server).scheme == "https" or is_here(self.server)):
            raise UserError(
                f"scorer judge: {KEY} would go to {self.server} unencrypted: use https, or give "
                f"api_key_env=null to send no key, or api_key_env={KEY} to send it all the same"
            )
        return key

    def _rubric_hash(self) -> str:
        """Returns a short name of what is asked and how it is read, and of what else decides an answer."""
        from diffalign.scorers._judge_prompts import RULE

        content: list[object] = [RULE, self._asks.name, self._asks.text, self._asks.settings, self.max_tokens]
        if self.server:
            content += [float(self.temperature), self.seed, self.image_format]
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
        from diffalign.scorers._judge_pairs import counts, scores_of
        from diffalign.scorers._pixels import as_pictures

        assert prompts is not None
        questions = [
            self._asks.question(prompt, picture)
            for prompt, picture in zip(prompts, as_pictures(images), strict=True)
        ]
        results = self._ask(questions)
        rows = [{**result.read, **counts([result])} for result in results]
        return scores_of(rows, [result.problem for result in results], self._asks.parts)

    def _score_groups(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        from diffalign.scorers._judge_pairs import group_of

        assert prompts is not None
        groups: dict[Any, list[int]] = {}
        for place, prompt in enumerate(prompts):
            named = context[place].get("group") if context else None
            groups.setdefault(prompt if named is None else named, []).append(place)
        found: list[Scores] = []
        waiting: list[Group] = []
        for places in groups.values():
            chosen: Any = [images[i] for i in places] if isinstance(images, list) else images[places]
            waiting.append(group_of(chosen, prompts[places[0]], self._asks, self.both_orders))
            # As many at a time as keep the workers busy: all pictures at once may not fit into memory.
            if sum(len(group.questions) for group in waiting) >= self.batch_size:
                found += self._score_waiting(waiting)
                waiting = []
        found += self._score_waiting(waiting)
        order = [place for places in groups.values() for place in places]
        return Scores.cat(found).take(sorted(range(len(order)), key=order.__getitem__))

    def _score_group(
        self, images: Images, prompt: str | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        from diffalign.scorers._judge_pairs import group_of

        assert prompt is not None
        return self._score_waiting([group_of(images, prompt, self._asks, self.both_orders)])[0]

    def _score_waiting(self, groups: Sequence[Group]) -> list[Scores]:
        """Returns the scores of groups whose questions are asked together."""
        from diffalign.scorers._judge_pairs import shares_of

        results = iter(self._ask([question for group in groups for question in group.questions]))
        return [
            shares_of(group, list(itertools.islice(results, len(group.questions))), self._asks.parts)
            for group in groups
        ]

    def _ask(self, questions: list[Question]) -> list[Result]:
        """Returns what became of each question.

        Raises:
            UserError: the server is gone, several questions got no answer at all, or the judge refused
                each of the first MOST_REFUSED.
        """
        from diffalign.scorers._judge_pairs import Result

        judge = self._loaded
        answers = judge.ask(questions)
        refused, lost = (
            [each.error for each in answers if each.failure == kind] for kind in ("refused", "lost")
        )
        answered = len(refused) + len(lost) < len(answers)
        self._answered = self._answered or answered
        self._refused += len(refused)
        if refused and not self._answered and self._refused >= MOST_REFUSED:
            raise UserError(f"scorer judge: the judge answers no question: {refused[0]}")
        if lost and not answered and len(answers) > 1:
            raise UserError(
                f"scorer judge: none of {len(answers)} questions got an answer ({lost[0]}): see to the judge "
                "and run again"
            )
        results = []
        for answer in answers:
            read, problem = self._asks.read(answer), answer.error
            if problem is None and math.isnan(read[""]):
                cut = f", cut at max_tokens={self.max_tokens}" if answer.cut else ""
                problem = f"no score can be read in the answer{cut}: '{judge.quoted(answer.text)}'"
            results.append(Result(read, problem, answered=answer.error is None))
        return results
