"""A judge in this process: a random LLaVA of a few thousand weights, with a processor of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers._judge_local import SUFFIXES, _wanted, open_local
from diffalign.scorers._judge_prompts import POINT, Question
from tests.judge_server import expect, pictures

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} JUDGE: {% endif %}"
)
LENGTH = 24
OWN = {"prompt": "Rate [{prompt}]", "pattern": r"(\d)", "low": 0, "high": 9, "max_tokens": LENGTH}
TEXTS = ["a cat", "two dogs", "a cat", "", "x", "a red circle"]


def tiny_processor() -> LlavaProcessor:
    """A processor of LLaVA's with one token for each ASCII sign, and pictures of 2 x 2 patches."""
    signs = SPECIAL + [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **names
        ),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tiny_llava() -> LlavaForConditionalGeneration:
    """A random model whose answers depend on the picture and on the text."""
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shared, image_size=32, patch_size=16, projection_dim=16),
        text_config=LlamaConfig(
            **shared, **ids, num_key_value_heads=2, vocab_size=101, max_position_embeddings=4096
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():  # the usual start is too small for anything to matter
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("judge") / "tiny-llava"
    tiny_llava().save_pretrained(place)
    tiny_processor().save_pretrained(place)
    return place


def judge(folder: Path, **options):
    return load_scorer("judge", path=str(folder), **{"dtype": "fp32", **options})


def answers_of(folder: Path, asked: list[tuple[str, list[Image.Image]]]) -> list[str]:
    """What transformers says without any of our code, of texts that are laid out by hand."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    said = []
    for text, images in asked:
        inputs = processor(text=text, images=images, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
        fresh = tokens[0, inputs.input_ids.shape[1] :]
        said.append(
            "".join(
                token for token in processor.tokenizer.convert_ids_to_tokens(fresh) if token not in SPECIAL
            )
        )
    return said


def last_digits(texts: list[str]) -> list[float]:
    """What OWN reads in answers that are cut: a digit with no more than a word behind it is torn."""
    found = [[m for m in re.finditer(r"\d", text)] for text in texts]
    return [
        float(each[-1][0])
        if each and not re.fullmatch(r"[\W_]*\w*", text[each[-1].end() :])
        else float("nan")
        for each, text in zip(found, texts, strict=True)
    ]


def test_values_are_those_of_plain_transformers(folder):
    images = pictures()
    said = answers_of(
        folder,
        [(f"USER: <image>Rate [{text}] JUDGE: ", [image]) for text, image in zip(TEXTS, images, strict=True)],
    )
    wanted = last_digits(said)
    assert len({value for value in wanted if value == value}) > 1, said
    scorer = judge(folder, **OWN)
    expect(scorer(images, TEXTS), wanted)
    expect(scorer(images, TEXTS), wanted)
    order = [3, 0, 5, 1, 4, 2]
    expect(scorer([images[i] for i in order], [TEXTS[i] for i in order]), [wanted[i] for i in order])
    without_template = answers_of(folder, [("<image>Rate [a cat]", images[:1])])
    assert without_template[0] != said[0]


def test_random_answers_are_unparsed_and_quoted(folder):
    images = pictures(2)
    scores = judge(folder, rubric="unifiedreward_point", max_tokens=LENGTH).score(images, TEXTS[:2])
    assert scores.values.isnan().all()
    expect(scores.parts["unparsed"], [1, 1])
    question = POINT.replace("{prompt}", TEXTS[0])
    (said,) = answers_of(folder, [(f"USER: <image>{question} JUDGE: ", images[:1])])
    wanted = " ".join(said.split())
    assert scores.errors[0] == f"no score can be read in the answer, cut at max_tokens={LENGTH}: '{wanted}'"


def test_two_pictures_are_shown_in_order(folder):
    one, two = pictures(6)[::5]
    local, _ = open_local(
        str(folder), revision=None, device="cpu", dtype="fp32", trust_remote_code=False, max_tokens=LENGTH
    )
    answers = local.ask([Question("Which?", (one, two)), Question("Which?", (two, one))])
    question = "USER: <image><image>Which? JUDGE: "
    wanted = answers_of(folder, [(question, [one, two]), (question, [two, one])])
    assert wanted[0] != wanted[1]
    assert [answer.text for answer in answers] == wanted
    assert all(answer.cut and answer.error is None for answer in answers)


def test_pairs_that_cannot_be_read_have_no_value(folder):
    scorer = judge(folder, rubric="unifiedreward_pair", max_tokens=4)
    scores = scorer.score(pictures(2), ["a", "a"])
    assert scores.values.isnan().all()
    expect(scores.parts["unparsed"], [2, 2])


def test_decoding_is_greedy_whatever_the_weights_ask_for(folder, tmp_path):
    wild = shutil.copytree(folder, tmp_path / "wild")
    settings = json.loads((wild / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "top_k": 90, "top_p": 0.99, "max_length": 7}
    (wild / "generation_config.json").write_text(json.dumps(settings))
    greedy, sampling = judge(folder, **OWN), judge(wild, **OWN)
    expect(sampling(pictures(), TEXTS), greedy(pictures(), TEXTS).tolist())
    assert greedy.version != sampling.version


def test_a_prompt_that_the_processor_refuses_costs_itself_alone(folder):
    scorer = judge(folder, **OWN)
    images = pictures(3)
    good = scorer(images, ["a", "b", "c"])
    scores = scorer.score(images, ["a", "an <image> tag", "c"])
    expect(scores.values[[0, 2]], good[[0, 2]].tolist())
    assert scores.values[1].isnan() and "image" in scores.errors[1]
    expect(scores.parts["unanswered"], [0, 1, 0])
    hopeless = judge(folder, **OWN)
    assert hopeless(pictures(6), ["an <image> tag"] * 6).isnan().all()
    with pytest.raises(UserError, match="answers no question"):
        hopeless(pictures(6) + pictures(4), ["an <image> tag"] * 10)


def test_weights_are_frozen_shared_and_named(folder):
    first = judge(folder, **OWN)
    second = judge(folder, rubric="unifiedreward_acs")
    half = judge(folder, **{**OWN, "dtype": "bf16"})
    (model,) = first.modules()
    assert second.modules()[0] is model and half.modules()[0] is not model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and half.modules()[0].dtype == torch.bfloat16
    assert half(pictures(2), TEXTS[:2]).shape == (2,)
    name, _, rubric = first.version.partition("+")
    assert name.startswith("tiny-llava@") and rubric
    assert second.version.startswith(f"{name}+") and second.version != first.version
    assert half.version.startswith(f"{name}+") and half.version != first.version


def test_other_weights_or_another_template_are_another_version(folder, tmp_path):
    version = judge(folder, **OWN).version.partition("@")[2]
    for file in ("model.safetensors", "chat_template.jinja"):
        place = shutil.copytree(folder, tmp_path / file)
        if file == "chat_template.jinja":
            (place / file).write_text(TEMPLATE + " ")
        else:
            tensors = load_file(place / file)
            name = next(iter(tensors))
            save_file({**tensors, name: tensors[name] + 1}, place / file, metadata={"format": "pt"})
        assert judge(place, **OWN).version.partition("@")[2] != version
    same = shutil.copytree(folder, tmp_path / "tiny-llava")
    assert judge(same, **OWN).version == judge(folder, **OWN).version


def test_what_does_not_load_says_why(folder, tmp_path):
    def refusal(name: str, spoil) -> str:
        place = shutil.copytree(folder, tmp_path / name)
        spoil(place)
        with pytest.raises(UserError) as error:
            judge(place, **OWN)
        return str(error.value)

    def lacking(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        removed = next(name for name in tensors if "q_proj" in name)
        kept = {name: tensor for name, tensor in tensors.items() if name != removed}
        save_file(kept, place / "model.safetensors", metadata={"format": "pt"})

    def torn(place: Path) -> None:
        (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:1000])

    def pickled(place: Path) -> None:
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()

    def wordless(place: Path) -> None:
        (place / "tokenizer.json").unlink()
        (place / "processor_config.json").unlink()

    def foreign(place: Path) -> None:
        (place / "config.json").write_text(json.dumps({"model_type": "bert"}))

    assert "lack 1 tensors of their config" in refusal("lacking", lacking)
    assert "do not load" in refusal("torn", torn)
    assert "has no weights: it needs config.json with model.safetensors" in refusal("pickled", pickled)
    assert "no processor that loads" in refusal("wordless", wordless)
    assert "do not load" in refusal("foreign", foreign)
    assert "has no chat template" in refusal("plain", lambda place: (place / "chat_template.jinja").unlink())


def test_a_path_that_is_none_says_so():
    with pytest.raises(UserError, match="do not exist: give a folder or a hub id"):
        judge(Path("/no/such/folder"), **OWN)
    with pytest.raises(UserError, match="the hub does not give them"):  # the tests run without network
        judge(Path("no/such-judge"), **OWN)


def test_a_repository_is_downloaded_without_code_and_second_copies():
    small = ["config.json", "chat_template.jinja", "merges.txt", "tokenizer.json"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "modeling.py"]
    assert _wanted(small + weights + others, SUFFIXES) == small + weights
    assert _wanted(["modeling.py", *small], (*SUFFIXES, ".py")) == ["modeling.py", *small]
