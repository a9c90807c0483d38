"""What every data source shares: its keys, the subset by prompt, and how it names itself in manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.data.records import Record
from diffalign.data.select import ScoreFacts, UsableGroups, check_share, check_ties


@dataclass
class Source:
    """Base of every data source plug-in.

    Attributes:
        path: where the data is.
        limit: read only the first so many rows (after the subset by prompt).
        prompts: a text file with one caption per line: only rows with one of these captions are read.
        ties: `drop` or `soft` (train ties with target 0.5).
        max_bad_share: refuse when more than this share of the rows is bad.
    """

    path: str
    limit: int | None = None
    prompts: str | None = None
    ties: Literal["drop", "soft"] = "drop"
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not str(self.path).strip():
            raise UserError("data.path is empty: give the path of the data")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit={self.limit}: give a number of rows of at least 1, or leave it out")
        check_ties(self.ties)
        check_share(self.max_bad_share)

    def rows(self) -> Iterator[Record]:
        """Yields every row as a record, in order, before `prompts` and `limit`; a source has this."""
        raise NotImplementedError

    def size(self) -> int | None:
        """Returns how many records will come, where that is known without reading them; else None."""
        return None

    def files(self) -> list[Path]:
        """Returns the files that are read (none for data on a hub)."""
        return [Path(self.path)]

    def records(self) -> Iterator[Record]:
        """Yields every row as a record, in order: ties, unlabelled and broken rows too, labels as they are.

        Raises:
            UserError: the data is missing, of another layout, or has no rows (with one of the asked
                captions).
        """
        wanted = self.wanted_prompts()
        found = self.rows()
        if wanted is not None:
            found = (record for record in found if record.prompt.strip() in wanted)
        count = 0
        for record in islice(found, self.limit):
            count += 1
            yield record
        if not count:
            subset = f" with a caption of data.prompts={self.prompts}" if wanted is not None else ""
            raise UserError(f"data.path={self.path} has no rows{subset}")

    def usable(
        self,
        *,
        unit: str = "pair",
        undesirable: bool = False,
        reject: Callable[[Record], str | None] | None = None,
        unlabelled: bool = False,
        limit: int | None = None,
        ties: Literal["drop", "soft"] | None = None,
    ) -> UsableGroups:
        """Returns the usable groups under `ties` (None: the source's own) and `max_bad_share`.

        `limit` counts usable records, not rows; the other arguments are those of `UsableGroups`.
        """
        return UsableGroups(
            self.records(),
            unit=unit,
            undesirable=undesirable,
            reject=reject,
            unlabelled=unlabelled,
            ties=ties or self.ties,
            max_bad_share=self.max_bad_share,
            limit=limit,
            what=self.path,
        )

    def score_facts(self) -> dict[str, ScoreFacts]:
        """Returns what is known of the scores in the data, by scorer; nothing where no manifest tells."""
        return {}

    def wanted_prompts(self) -> frozenset[str] | None:
        """Returns the captions of the `prompts` file, stripped; None without such a file."""
        if self.prompts is None:
            return None
        try:
            lines = Path(self.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"data.prompts={self.prompts} is no readable text file: give one caption a line"
            ) from error
        wanted = frozenset(line.strip() for line in lines if line.strip())
        if not wanted:
            raise UserError(f"data.prompts={self.prompts} holds no caption: give one caption a line")
        return wanted

    def inputs(self) -> dict[str, Path | str]:
        """Returns what a manifest records as input, and what must be equal for a run to go on."""
        found = self.data_inputs()
        if self.prompts is not None:
            found[f"{plugin_name(self)} prompts"] = Path(self.prompts)
        return found

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the inputs without `prompts`: the files read, or sizes and tails where that is much.

        Hashing 300 GB of shards would take longer than many runs, so above 1 GB in all each file is named by
        its size and the hash of its last 64 KiB, which for parquet holds the footer with the statistics of
        every column.
        """
        paths = self.files()
        label = plugin_name(self)
        names = [f"{label}:{path.name}" for path in paths]
        if len(set(names)) < len(paths):
            names = [f"{label}:{path}" for path in paths]
        if sum(path.stat().st_size for path in paths) <= files.FULL_HASH_LIMIT:
            return dict(zip(names, paths, strict=True))
        tails = [files.file_identity(path, whole_up_to=0) for path in paths]
        words = [" ".join(f"{key}={value}" for key, value in tail.items()) for tail in tails]
        return dict(zip(names, words, strict=True))
