"""The tokenizer of both embedded models: CLIP's byte-level BPE, learned from captions and plain words."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.tiny.words import SENTENCES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a prompt, as in SDXL
SPACE = "\u2581"  # what a word begins with in T5's vocabulary
SPELLED = -20.0  # score of a letter: below that of every whole word


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


def load_tokenizer(folder: Path, *, pad: str = END, length: int = LENGTH) -> CLIPTokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt; `pad` fills prompts up to `length` tokens."""
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=length)


def save_tokenizer(tokenizer: CLIPTokenizer, source: Path, folder: Path) -> None:
    """Writes the tokenizer in the layout of older transformers (vocab.json, merges.txt) and of newer ones."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())


def t5_tokenizer(captions: list[str], vocabulary: int, *, length: int) -> T5Tokenizer:
    """T5's tokenizer with at most `vocabulary` pieces; it reads `length` tokens of a prompt.

    Pieces are the most frequent words, each scored by the logarithm of its share, and printable ASCII to
    spell the others with; other symbols are the unknown token, as in T5's own.
    """
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    counts = Counter(word for text in _texts(captions) for word in text.split())
    specials = ["<pad>", "</s>", "<unk>"]  # their places in T5's vocabulary
    words = counts.most_common(vocabulary - len(specials) - len(letters) - 1)
    total = sum(counts.values())
    pieces = [
        *((piece, 0.0) for piece in specials),
        (f"{SPACE}", SPELLED),
        *((letter, SPELLED) for letter in letters),
        *((f"{SPACE}{word}", math.log(count / total)) for word, count in words),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
