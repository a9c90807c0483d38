"""The prompt sets that papers report on, by name: fetched once from a named commit, and checked.

    name           prompts  pictures each  meta                       source, licence
    parti            1,632         1       Category, Challenge, Note  google-research/parti, Apache-2.0
    hpsv2            3,200         1       style                      AIDC-AI/Diffusion-SDPO, Apache-2.0
    geneval            553         4       tag, include, exclude      djghosh13/geneval, MIT
    t2i_compbench    2,400        10       category                   Karine-Huang/T2I-CompBench, MIT
    imagereward        100        10       id                         THUDM/ImageReward, Apache-2.0

The files are those of their authors, byte for byte. They are kept in `$DIFFALIGN_CACHE/prompts/NAME`, by
default `~/.cache/diffalign/prompts/NAME`, where a person without a network can put them too. Of GenEval the
meta is what the scorer geneval reads as a picture's context.

Pictures a prompt are those of the authors' own protocols (PartiPrompts: of those that report on it; GenEval:
README; T2I-CompBench: README, on the validation lists; ImageReward: README, benchmark).

Convention: the one published list of all HPSv2 prompts names no styles. The benchmark has four of 800 each;
that the list holds them in the order anime, concept-art, paintings, photo is inferred from its content, which
changes in kind at every 800th prompt.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.common import files
from diffalign.common.errors import UserError, brief

__all__ = ["CACHE_VARIABLE", "SETS", "PromptSet", "cache_folder", "similar_set"]

CACHE_VARIABLE = "DIFFALIGN_CACHE"
"""Environment variable: the folder that holds what is fetched once."""

TIMEOUT_SECONDS = 30.0
"""How long a server may be silent."""

MOST_BYTES = 16_000_000
"""No set is nearly as large: whoever sends more sends something else."""

ALIKE = 0.75
"""How much of two words must agree (difflib's ratio) for one to be a misspelling of the other."""

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PromptSet:
    """A published list of prompts.

    Attributes:
        title: what its authors call it.
        base: address of the folder of its files, at a commit.
        files: name of each file -> its sha256.
        licence: of the list.
        images_per_prompt: pictures that its protocol draws of each prompt.
        columns: of its files, those that are kept beside the prompt.
        styles: names of the equal parts that its one file consists of.
        category: the file's name tells the category of its prompts.
    """

    title: str
    base: str
    files: Mapping[str, str]
    licence: str
    images_per_prompt: int = 1
    columns: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    category: bool = False

    def meta(self, file: Path, index: int, count: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is kept beside prompt `index` of the `count` of a file, `row` being its columns."""
        kept = {name: row[name] for name in self.columns if name in row}
        if self.styles:
            kept["style"] = self.styles[index * len(self.styles) // count]
        if self.category:
            kept["category"] = file.stem.removesuffix("_val")
        return kept

    def fetch(self, name: str) -> list[Path]:
        """Returns the set's files in the cache, after fetching those that are not there.

        Processes that ask at once wait for the first, which fetches.

        Args:
            name: of the set, and of its folder in the cache.

        Raises:
            UserError: no network, or bytes that are not the set's; says what to fetch where.
        """
        folder = cache_folder() / name
        paths = [folder / file for file in self.files]
        if not all(path.is_file() for path in paths):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with files.waiting_lock(folder, "fetch"):
                    files.remove_leftovers(folder)
                    for path in paths:
                        if not path.is_file():
                            self._fetch(name, path)
            except OSError as error:
                raise UserError(
                    f"prompts={name}: {folder} cannot be written to ({brief(error)}): set "
                    f"{CACHE_VARIABLE} to a folder that can"
                ) from error
        for path in paths:
            if _sha256(path.read_bytes()) != self.files[path.name]:
                raise UserError(
                    f"prompts={name}: {path} is not the file of {self.base}/{path.name}: remove it, and it "
                    "is fetched again"
                )
        return paths

    def _fetch(self, name: str, path: Path) -> None:
        """Fetches one file, whole and right or not at all."""
        address = f"{self.base}/{path.name}"
        try:
            content = _download(address)
        except Exception as error:  # urllib, ssl, http.client and socket each have classes of their own
            missing = [file for file in self.files if not (path.parent / file).is_file()]
            raise UserError(
                f"prompts={name}: {address} cannot be fetched ({brief(error)}): fetch {', '.join(missing)} "
                f"of {self.base} yourself and put it into {path.parent}"
            ) from error
        if _sha256(content) != self.files[path.name]:
            raise UserError(
                f"prompts={name}: {address} gave {len(content)} bytes that are not the published file "
                f"(sha256 {_sha256(content)[:16]}, expected {self.files[path.name][:16]}): nothing is kept, "
                "try again"
            )
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(content)


def cache_folder() -> Path:
    """Returns the folder that keeps prompt sets."""
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named) if named else Path.home() / ".cache" / "diffalign") / "prompts"


def similar_set(word: str) -> str | None:
    """Returns the set that a word is most likely a misspelling or a longer name of, or None."""
    lowered = word.lower().replace("-", "_")
    close = difflib.get_close_matches(lowered, SETS, n=1, cutoff=ALIKE)
    longer = [name for name in SETS if lowered.startswith(name)]
    return next(iter([*close, *longer]), None)


def _download(address: str) -> bytes:
    """Returns the bytes behind an address; what is cut short is an error."""
    from http.client import IncompleteRead
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    request = Request(address, headers={"User-Agent": "diffalign"})
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read(MOST_BYTES)
            announced = response.headers.get("Content-Length")
    except HTTPError as error:  # it holds the connection
        error.close()
        raise
    if announced is not None and len(content) < int(announced):  # a read with a limit does not complain
        raise IncompleteRead(content, int(announced) - len(content))
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SETS: dict[str, PromptSet] = {
    "parti": PromptSet(
        title="PartiPrompts",
        base=f"{GITHUB}/google-research/parti/5a657978134374ce28973948331b319adef164bd",
        files={"PartiPrompts.tsv": "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"},
        licence="Apache-2.0",
        columns=("Category", "Challenge", "Note"),
    ),
    "hpsv2": PromptSet(
        title="the HPSv2 benchmark",
        base=f"{GITHUB}/AIDC-AI/Diffusion-SDPO/84fb241c1b89705a247da8b0d6047798ca49830d/prompts",
        files={"hpsv2.json": "417a2ce00b3307780402c1d27528a0e41ed26651384687bbf3aa06c4c7e559fd"},
        licence="Apache-2.0",
        styles=("anime", "concept-art", "paintings", "photo"),
    ),
    "geneval": PromptSet(
        title="GenEval",
        base=f"{GITHUB}/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts",
        files={
            "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
        },
        licence="MIT",
        images_per_prompt=4,
        columns=("tag", "include", "exclude"),
    ),
    "t2i_compbench": PromptSet(
        title="T2I-CompBench++",
        base=f"{GITHUB}/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset",
        files={
            "color_val.txt": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
            "shape_val.txt": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
            "texture_val.txt": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
            "spatial_val.txt": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
            "3d_spatial_val.txt": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
            "numeracy_val.txt": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
            "non_spatial_val.txt": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
            "complex_val.txt": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
        },
        licence="MIT",
        images_per_prompt=10,
        category=True,
    ),
    "imagereward": PromptSet(
        title="the ImageReward benchmark",
        base=f"{GITHUB}/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/benchmark",
        files={"benchmark-prompts.json": "34682e824ebb3ad8e2531b3cde1b362dc72e1e29946ff6fab77bb49e9edb4b21"},
        licence="Apache-2.0",
        images_per_prompt=10,
        columns=("id",),
    ),
}
"""name -> prompt set."""
