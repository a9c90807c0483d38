"""The tokenizer of both embedded models: CLIP's byte-level BPE, learned from captions and plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.tiny.words import SENTENCES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a prompt, as in SDXL


def train_tokenizer(captions: list[str], vocabulary: int, folder: Path) -> None:
    """Writes vocab.json and merges.txt of at most `vocabulary` tokens to `folder`.

    Layout as in CLIP's own vocabulary: 256 bytes, the same bytes ending a word, merged pieces in order of
    merging, the start token, the end token (the largest id: open_clip and older transformers pool at the
    largest id). Every text can be spelled, because every byte has a token.
    """
    from tokenizers import pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # An empty CLIPTokenizer brings CLIP's own normaliser and splitting rules; only the model is trained anew.
    backend = CLIPTokenizer().backend_tokenizer
    backend.model = BPE(continuing_subword_prefix="", end_of_word_suffix="</w>")
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=[],
    )
    backend.train_from_iterator(_texts(captions), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - len(base) - 2]
    tokens = [*base, *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _texts(captions: list[str]) -> Iterator[str]:
    yield from captions[:2000]
    for _ in range(20):
        yield from SENTENCES


def load_tokenizer(folder: Path, *, pad: str = END) -> CLIPTokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt; `pad` fills a prompt up to 77 tokens."""
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, source: Path, folder: Path) -> None:
    """Writes the tokenizer in the layout of older transformers (vocab.json, merges.txt) and of newer ones."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
