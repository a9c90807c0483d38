"""A judge in this process: any image-text-to-text model of transformers with its processor."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.common.errors import UserError, brief
from diffalign.scorers._judge_prompts import Answer, Question, printable, quoted
from diffalign.scorers._towers import DTYPES
from diffalign.scorers._weights import content_of, hub_folder, hub_identity, is_hub_id

SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Files that decide what a model answers, besides its code."""


class LocalJudge:
    """Asks one question at a time: there is no padding that could change an answer.

    Decoding is greedy; what else the weights' own generation config asks for (a repetition penalty) is kept,
    as servers and the authors' scripts do. Pictures are prepared by the weights' own processor.
    """

    def __init__(self, model: Any, processor: Any, max_tokens: int) -> None:
        self._model, self._processor = model, processor
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, num_beams=1, max_new_tokens=max_tokens)
        # These belong to sampling, and transformers complains of each that is set without it.
        config.update(max_length=None, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        self._config = config

    def modules(self) -> list[torch.nn.Module]:
        """Returns the network."""
        return [self._model]

    quoted = staticmethod(quoted)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Returns the answers, in order."""
        answers = []
        for question in questions:
            try:
                answers.append(self._answer(question))
            except Exception as error:  # a prompt with the picture's token in it, memory: the next may do
                answers.append(Answer(error=printable(brief(error)), failure="refused"))
        return answers

    @torch.no_grad()
    def _answer(self, question: Question) -> Answer:
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in question.images]
        content.append({"type": "text", "text": question.text})
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        tokens = self._model.generate(**inputs, generation_config=self._config)
        fresh = tokens[0, inputs["input_ids"].shape[1] :]
        ends = self._config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        cut = len(fresh) >= self._config.max_new_tokens and int(fresh[-1]) not in ends
        text = self._processor.decode(fresh, skip_special_tokens=True)
        return Answer(text, cut=cut)


_opened: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
"""Models in use: judges that differ in what they ask share them."""


def open_local(
    path: str,
    *,
    revision: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    max_tokens: int,
) -> tuple[LocalJudge, str]:
    """Returns a judge and the name@identity of its weights.

    Args:
        path: a folder with weights in safetensors, config, processor and tokenizer, or a hub id.
        revision: of a hub id.
        device: where it runs.
        dtype: fp32 | bf16 | fp16.
        trust_remote_code: run the Python files that come with the weights.
        max_tokens: longest answer.

    Raises:
        UserError: nothing usable is at `path`, or it has no chat template.
    """
    folder = Path(path).expanduser()
    suffixes = (*SUFFIXES, ".py") if trust_remote_code else SUFFIXES
    if folder.is_dir():
        found = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if not any(file.suffix == ".safetensors" for file in found):
            raise UserError(f"{folder} has no weights: it needs config.json with model.safetensors")
        name, identity = folder.name, content_of(*found)
    elif is_hub_id(path):
        folder = hub_folder(path, revision, lambda listing: _wanted(listing, suffixes))
        name, identity = path, hub_identity(folder)
    else:
        raise UserError(f"judge weights '{path}' do not exist: give a folder or a hub id (org/name)")
    processor = _processor(folder, trust_remote_code)
    key = (identity, name, device, dtype, trust_remote_code)
    model = _opened.get(key)
    if model is None:
        model = _model(folder, dtype, trust_remote_code).requires_grad_(False).eval().to(device)
        _opened[key] = model
    return LocalJudge(model, processor, max_tokens), f"{name}@{identity}"


def _wanted(listing: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """Returns the files of a repository that a judge needs: none in folders, no second copy of weights."""
    top = [name for name in listing if "/" not in name and name.endswith(suffixes)]
    return [name for name in top if not name.startswith("consolidated")]


def _processor(folder: Path, trust_remote_code: bool) -> Any:
    """Returns the processor of a folder."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files, a foreign format: libraries agree on no type
        raise UserError(f"judge {folder} has no processor that loads: {brief(error)}") from error
    if not getattr(processor, "chat_template", None):
        raise UserError(f"judge {folder} has no chat template: put its chat_template.jinja there")
    return processor


def _model(folder: Path, dtype: str, trust_remote_code: bool) -> Any:
    """Returns the model of a folder, on the CPU."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    model: Any
    report: dict[str, Any]
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(  # type: ignore[misc]  # its annotation forgets the report
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,  # never a pickled program
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # a torn file, a foreign architecture: libraries agree on no type
        raise UserError(f"judge weights {folder} do not load: {brief(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # transformers fills missing weights with random numbers and only warns: answers of those would be noise.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"judge weights {folder} lack {len(missing)} tensors of their config, first {missing[0]}"
        )
    return model
