"""`diffalign export` through the command line: what it writes, says on the card, refuses and uploads."""

from __future__ import annotations

import base64
import json
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import draws, files, manifest
from diffalign.models import load_model
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training.card import Exported, export_card
from tests.pickapic_files import jpeg, row, write

PROMPT = ("a ring", 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that can be written as one file."""
    return SDXL.tiny(tmp_path_factory.mktemp("base") / "base", text_widths=(12, 20)).path


def train(base: str, out: Path, pairs: Path, *more: str) -> Path:
    words = ["data=pickapic", f"data.path={pairs}", "objective=dpo", "num_steps=2", "optimizer.lr=1e-2"]
    assert cli.main(["train", "model=sdxl", f"model.path={base}", *words, f"out={out}", *more]) == 0
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    write(path, [row(f"a {name}", jpeg(200, (32, 32)), jpeg(40, (32, 32)), (1.0, 0.0)) for name in "abcd"])
    return path


@pytest.fixture(scope="module")
def run(base: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    return train(base, out, pairs, "adapter.rank=3", "adapter.rslora=true")


@pytest.fixture(scope="module")
def full_run(base: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("runs") / "full", pairs, "adapter.kind=full")


def words(base: str, adapter: Path, out: Path, *more: str) -> list[str]:
    return ["export", "model=sdxl", f"model.path={base}", f"adapter={adapter}", f"out={out}", *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a refusal prints."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def drawn_with(base: str, **options: Any) -> torch.Tensor:
    """Latents that our own model gives with the run's adapter or UNet."""
    adapter = options.pop("adapter", None)
    model: Any = load_model("sdxl", base, **options)
    if adapter is not None:
        model.load_adapter(str(adapter))
    latents = model.sample([PROMPT[0]], [PROMPT[1]], num_inference_steps=2)
    assert isinstance(latents, torch.Tensor)
    return latents


def drawn_by_the_card(out: Path) -> torch.Tensor:
    """Latents that the code of the card gives."""
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code is not None
    call = '"a ring", num_inference_steps=2, latents=noise, output_type="latent"'
    scope: dict[str, Any] = {"noise": draws.normal((1, 4, 16, 16), "initial", *PROMPT)}
    source = code[1].replace("path/to/this/folder", str(out)).replace('"a prompt"', call)
    exec(source.replace("image = ", "pipeline.unet.requires_grad_(False)\nimage = "), scope)
    assert isinstance(scope["image"], torch.Tensor)
    return scope["image"][None]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest one, as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


INSIDE = {
    "diffusers": {"pytorch_lora_weights.safetensors"},
    "kohya": {"lora.safetensors"},
    "merged": {
        *("model_index.json", "scheduler", "text_encoder", "text_encoder_2", "tokenizer"),
        *("tokenizer_2", "unet", "vae"),
    },
}


@pytest.mark.parametrize("form", INSIDE)
def test_what_a_run_learned_is_drawn_by_the_code_of_the_card(
    form: str, base: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli.main(words(base, run / "adapter", out, f"format={form}")) == 0
    assert {path.name for path in out.iterdir()} == INSIDE[form] | {
        *("README.md", "manifest.json", "recipe.json", ".lock")
    }
    ours = drawn_with(base, adapter=run / "adapter")
    assert difference(drawn_with(base), ours) > 1e-4
    assert difference(drawn_by_the_card(out), ours) <= (1e-5 if form == "merged" else 1e-6)
    said = files.read_json(out / "manifest.json")
    assert said["stage"] == "export" and said["recipe"]["format"] == form
    assert said["base"] == said["trained_on"] == files.read_json(run / "manifest.json")["base"]


def test_a_whole_unet_becomes_a_pipeline(base: str, full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(words(base, full_run / "adapter", out, "format=full")) == 0
    ours = drawn_with(base, unet=str(full_run / "adapter"))
    assert difference(drawn_with(base), ours) > 1e-4
    assert torch.equal(drawn_by_the_card(out), ours)


@pytest.mark.parametrize("form", ["merged", "full"])
def test_one_file_is_a_base_of_its_own(
    form: str, base: str, run: Path, full_run: Path, tmp_path: Path
) -> None:
    adapter = (run if form == "merged" else full_run) / "adapter"
    out = tmp_path / "out"
    assert cli.main(words(base, adapter, out, f"format={form}", "single_file=true")) == 0
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "README.md"}
    ours = drawn_with(base, adapter=adapter) if form == "merged" else drawn_with(base, unet=str(adapter))
    found = drawn_with(str(out / "model.safetensors"), config=base)
    assert difference(found, ours) <= 1e-5
    assert '.from_single_file("path/to/this/folder/model.safetensors")' in (out / "README.md").read_text()


def test_the_card_says_what_is_known(base: str, run: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report"
    interval = {"estimate": 0.625, "low": 0.5, "high": 0.75, "n": 8, "level": 0.95}
    reward = {"scale": "cosine", "base": 0.25, "aligned": 0.3, "win_rate": interval}
    reward["difference"] = {**interval, "estimate": 0.05, "low": 0.01, "high": 0.09}
    files.write_json(
        report / "report.json", {"level": 0.95, "pairs": 8, "prompts": 4, "rewards": {"clip": reward}}
    )
    more = (f"report={report}", "license=openrail++", "weight=0.5", "dtype=bf16")
    assert cli.main(words(base, run / "adapter", out, *more)) == 0
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "license": "openrail++",
        "library_name": "diffusers",
        "tags": ["diffalign", "diffusion_dpo", "lora"],
    }
    for said in (
        "aligned with diffusion_dpo",
        "for 2 steps on 4 examples (4 rows read).",
        "The adapter acts with weight 0.5 of its own.",
        "8 pairs of pictures, base against aligned, of 4 prompts; in brackets the 95 % intervals",
        "| clip (cosine) | 0.625 [0.5, 0.75] | 0.25 | 0.3 | 0.05 [0.01, 0.09] |",
        f"fingerprint `{files.read_json(run / 'manifest.json')['base']}`",
        "License of the base: openrail++",
        "rslora: true",
        "steps: 2",
    ):
        assert said in card
    state = load_file(out / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_the_card_of_an_unknown_adapter_on_a_hub_base() -> None:
    card = export_card(Exported("kohya", "lora.safetensors", {"name": "sdxl", "path": "org/base"}, "0123"))
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "unknown" and header["base_model"] == "org/base"
    assert "How it was trained is not known here." in card and "## Recipe" not in card
    assert 'load_lora_weights("path/to/this/folder", weight_name="lora.safetensors")' in card
    model = {"name": "sd", "path": "base.safetensors", "config": "org/base"}
    card = export_card(Exported("adapter", None, model, "0123"))
    assert (
        'pipeline = StableDiffusionPipeline.from_single_file("base.safetensors", config="org/base")' in card
    )
    assert "base_model" not in card


def test_a_card_shows_one_model(
    base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write_json(tmp_path / "report" / "report.json", {"mode": "images", "models": {}, "standings": {}})
    arguments = words(base, run / "adapter", tmp_path / "out", f"report={tmp_path / 'report'}")
    assert "report= compares several models: give an evaluate of aligned=FOLDER alone" in refused(
        capsys, arguments
    )


@pytest.mark.parametrize("form", ["kohya", "merged"])
def test_a_full_disk_leaves_no_folder(
    form: str, base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        said = refused(capsys, words(base, run / "adapter", tmp_path / "out", f"format={form}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said and not (tmp_path / "out").exists()


def test_nothing_of_others_is_written_over(base: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (run / "adapter", Path(base)):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert "holds other files" in refused(capsys, words(base, run / "adapter", out, "format=merged"))
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "holds the output of 'train'" in refused(capsys, words(base, run / "adapter", run))


def test_another_base_is_refused_or_said(
    run: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(tiny_sdxl, run / "adapter", tmp_path / "out", "format=kohya")
    assert re.search(
        r"was trained on another base \(.*\): give that base, or other_base", refused(capsys, arguments)
    )
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, "other_base=true"]) == 0
    assert "exported for this one all the same" in capsys.readouterr().err
    said = files.read_json(tmp_path / "out" / "manifest.json")
    assert said["base"] != said["trained_on"] == files.read_json(run / "manifest.json")["base"]


def test_an_adapter_from_elsewhere(
    base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "adapter" / "pytorch_lora_weights.safetensors").read_bytes())
    assert cli.main(words(base, alone, tmp_path / "out", "format=kohya")) == 0
    assert "no run beside it says which base it was trained on" in capsys.readouterr().err
    assert files.read_json(tmp_path / "out" / "manifest.json")["trained_on"] is None


@pytest.mark.parametrize("theirs", [[1], {"stage": "train"}, {"stage": "train", "base": "x"}])
def test_a_manifest_of_others_beside_an_adapter_is_no_run(
    theirs: Any, base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "theirs" / "adapter"
    shutil.copytree(run / "adapter", adapter)
    files.write_json(adapter.parent / "manifest.json", theirs)
    assert cli.main(words(base, adapter, tmp_path / "out", "format=kohya")) == 0
    assert "no run beside it says which base it was trained on" in capsys.readouterr().err


def test_the_same_command_again_writes_the_card_alone(
    base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = words(base, run / "adapter", out, "format=kohya")
    assert cli.main(arguments) == 0
    before = (out / "lora.safetensors").stat().st_mtime_ns
    assert cli.main([*arguments, "license=mit"]) == 0
    assert "holds this export already" in capsys.readouterr().err
    assert (out / "lora.safetensors").stat().st_mtime_ns == before
    assert "license: mit" in (out / "README.md").read_text()
    (out / "lora.safetensors").unlink()
    assert cli.main(arguments) == 0 and (out / "lora.safetensors").is_file()
    manifest.withdraw_manifest(out)  # as after a kill
    (out / ".tmp-left").mkdir()
    assert cli.main(arguments) == 0
    assert (out / "lora.safetensors").stat().st_mtime_ns != before and not (out / ".tmp-left").exists()
    assert "format was kohya, now merged" in refused(
        capsys, words(base, run / "adapter", out, "format=merged")
    )


REFUSED = {
    "a run": (("format=kohya",), "", r"is the folder of a run, not an adapter: give .*/adapter"),
    "full as lora": (("format=merged",), "full", "holds a whole unet, no LoRA: use format=full"),
    "lora as full": (("format=full",), "lora", "holds no folder unet: format=full exports adapter.kind=full"),
    "no weight": (("weight=0",), "lora", "weight=0: use a finite number other than 0"),
    "a weight of a UNet": (("format=full", "weight=0.5"), "full", "means nothing for a whole unet"),
    "one file of a LoRA": (
        ("single_file=true",),
        "lora",
        "single_file=true means nothing with format=diffusers",
    ),
    "two precisions": (
        ("format=merged", "model.dtype=bf16"),
        "lora",
        "leave model.dtype and model.vae_dtype out",
    ),
    "private nowhere": (("private=true",), "lora", "private=true without push=owner/name"),
    "a bad name": (("push=mine",), "lora", "push=mine: give a repository of the hub as owner/name"),
    "no report": (("report=nowhere",), "lora", "nowhere/report.json does not exist"),
    "a format": (("format=koya",), "lora", "format=koya: expected one of diffusers, kohya, merged, full"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    case: str,
    base: str,
    run: Path,
    full_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more, kind, told = REFUSED[case]
    adapter = {"": run, "lora": run / "adapter", "full": full_run / "adapter"}[kind]
    assert re.search(told, refused(capsys, words(base, adapter, tmp_path / "out", *more)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("report", [{"mode": "implicit"}, [], {"level": 0.95, "pairs": 1, "prompts": 1}])
def test_a_report_of_another_kind(
    report: Any, base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write_json(tmp_path / "report" / "report.json", report)
    arguments = words(base, run / "adapter", tmp_path / "out", f"report={tmp_path / 'report'}")
    assert "report= holds no comparison of pictures" in refused(capsys, arguments)


@pytest.fixture(scope="module")
def reports(base: str, run: Path, full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations of pictures of the base, of its LoRA and of its whole UNet, against those of the base."""
    folder = tmp_path_factory.mktemp("reports")
    drawn = [
        "generate",
        "model=sdxl",
        f"model.path={base}",
        "prompts=[a ring,a cat]",
        "num_inference_steps=1",
    ]
    uses = {
        "base": (),
        "lora": (f"adapter={run / 'adapter'}",),
        "full": (f"model.unet={full_run / 'adapter'}",),
    }
    for name, use in uses.items():
        assert cli.main([*drawn, *use, f"out={folder / name}"]) == 0
        sides = [f"base={folder / 'base'}", f"aligned={folder / name}", "scorers=[jpeg]"]
        assert cli.main(["evaluate", "mode=images", *sides, f"out={folder / f'about-{name}'}"]) == 0
    return folder


UNKNOWN = "nothing says which adapter its pictures were drawn with"


def test_the_report_of_the_exported_adapter(
    base: str,
    run: Path,
    full_run: Path,
    reports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = run / "adapter" / "pytorch_lora_weights.safetensors"  # as good as its folder
    for number, adapter in enumerate((run / "adapter", one)):
        out = tmp_path / str(number)
        assert cli.main(words(base, adapter, out, f"report={reports / 'about-lora'}")) == 0
        assert "## Scores" in (out / "README.md").read_text()
    more = ("format=full", f"report={reports / 'about-full'}")
    assert cli.main(words(base, full_run / "adapter", tmp_path / "full", *more)) == 0
    assert UNKNOWN not in capsys.readouterr().err


@pytest.mark.parametrize("about", ["base", "full", "lora"])
def test_the_report_of_another_adapter(
    about: str,
    base: str,
    run: Path,
    full_run: Path,
    reports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = (full_run if about == "lora" else run) / "adapter"
    more = (f"report={reports / f'about-{about}'}", *(["format=full"] if about == "lora" else []))
    assert f"about-{about} is about another adapter than {adapter}" in refused(
        capsys, words(base, adapter, tmp_path / "out", *more)
    )
    assert not (tmp_path / "out").exists()


def test_a_report_whose_pictures_are_gone_or_others_is_said(
    base: str, run: Path, reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = shutil.copytree(reports / "about-base", tmp_path / "about")
    said = files.read_json(about / "manifest.json")
    for number, path in enumerate((tmp_path / "gone", reports / "lora" / "images.jsonl")):
        said["inputs"]["aligned"]["path"] = str(path)
        files.write_json(about / "manifest.json", said)
        arguments = words(base, run / "adapter", tmp_path / str(number), f"report={about}")
        assert cli.main(arguments) == 0
        assert UNKNOWN in capsys.readouterr().err


def test_a_report_on_what_an_export_wrote_is_not_refused(
    base: str, run: Path, reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(base, run / "adapter", tmp_path / "half", "dtype=fp16")) == 0
    drawn = [f"model.path={base}", "prompts=[a ring,a cat]", "num_inference_steps=1"]
    use = [f"adapter={tmp_path / 'half'}", f"out={tmp_path / 'drawn'}"]
    assert cli.main(["generate", "model=sdxl", *drawn, *use]) == 0
    sides = [f"base={reports / 'base'}", f"aligned={tmp_path / 'drawn'}", "scorers=[jpeg]"]
    assert cli.main(["evaluate", "mode=images", *sides, f"out={tmp_path / 'about'}"]) == 0
    arguments = words(base, run / "adapter", tmp_path / "out", f"report={tmp_path / 'about'}")
    assert cli.main(arguments) == 0
    assert UNKNOWN in capsys.readouterr().err


@pytest.mark.parametrize("form", ["merged", "full"])
def test_text_encoders_of_one_width_are_not_written_as_one_file(
    form: str, pairs: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diffusers would read the second one for the first, and draw NaN."""
    kind = ("adapter.kind=full",) if form == "full" else ()
    adapter = train(tiny_sdxl, tmp_path / "run", pairs, *kind) / "adapter"
    arguments = words(tiny_sdxl, adapter, tmp_path / "out", f"format={form}", "single_file=true")
    assert "are 16 wide, and diffusers would mix them up in one file: use single_file=false" in refused(
        capsys, arguments
    )
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; what arrives is kept in `seen`."""

    seen: list[tuple[str, bytes]]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body))
        answer: dict[str, Any] = {"url": "https://huggingface.co/me/it"}
        if self.path.startswith("/api/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif "/commit/" in self.path:
            answer = {
                "commitUrl": "https://huggingface.co/me/it/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        content = json.dumps(answer).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_folder_is_uploaded_without_the_paths_of_this_machine(
    hub: type[Hub], base: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = words(base, run / "adapter", out, "format=kohya", "push=me/it", "private=true")
    assert cli.main(arguments) == 0
    sent = dict(hub.seen)
    made = json.loads(sent["/api/repos/create"])
    assert made["name"] == "it" and made["organization"] == "me"
    assert made.get("private") is True or made.get("visibility") == "private"
    lines = [json.loads(line) for line in sent["/api/models/me/it/commit/main"].splitlines()]
    uploaded = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert uploaded == {name: (out / name).read_bytes() for name in ("README.md", "lora.safetensors")}


def test_a_refused_upload_keeps_the_folder(
    hub: type[Hub], base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    arguments = words(base, run / "adapter", tmp_path / "out", "push=me/it")
    assert re.search(
        r"push=me/it failed \(.*401.*is complete: log in with `hf auth login`", refused(capsys, arguments)
    )
    assert StableDiffusionXLPipeline.lora_state_dict(str(tmp_path / "out"))[0]
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_an_upload_without_network(
    base: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(base, run / "adapter", tmp_path / "out", "push=me/it")
    assert re.search(r"push=me/it failed \(.*offline.*\); .*/out is complete", refused(capsys, arguments))
