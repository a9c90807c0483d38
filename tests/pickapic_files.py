"""Tiny parquet files in the exact Pick-a-Pic layout (19 columns), clean or messy as a test wants them."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def jpeg(shade: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """Returns a JPEG of one grey shade; (width, height)."""
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


RED, BLUE = jpeg(200), jpeg(50)


def row(
    caption: str | None = "a cat",
    first: bytes | None = RED,
    second: bytes | None = BLUE,
    labels: tuple[float | None, float | None] = (1.0, 0.0),
    **columns: Any,
) -> dict[str, Any]:
    """Returns one row; `columns` replaces any other column."""
    return {
        "are_different": True,
        "best_image_uid": "u0",
        "caption": caption,
        "created_at": datetime(2023, 5, 1),
        "has_label": True,
        "image_0_uid": "u0",
        "image_0_url": "",
        "image_1_uid": "u1",
        "image_1_url": "",
        "jpg_0": first,
        "jpg_1": second,
        "label_0": labels[0],
        "label_1": labels[1],
        "model_0": "sdxl",
        "model_1": "dreamlike",
        "ranking_id": 7,
        "user_id": 42,
        "num_example_per_prompt": 3,
        "__index_level_0__": 0,
        **columns,
    }


def write(
    path: Path, rows: list[dict[str, Any]], *, row_group_size: int | None = None, **options: Any
) -> Path:
    """Writes the rows and returns the path; `options` go to pyarrow's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=row_group_size, **options)
    return path


def spoil(path: Path, column: str, group: int = 0) -> None:
    """Overwrites the pages of one column in one row group: whoever reads them fails, nobody else notices."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    chunk = metadata.column(SCHEMA.get_field_index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


def messy_rows() -> list[dict[str, Any]]:
    """Returns 20 rows with every mess of the original; the comments are the row numbers."""
    wide = jpeg(120, (24, 16))
    return [
        row(),  # 0 decided, first preferred
        row("a dog", RED, wide, (0.0, 1.0)),  # 1 decided, second preferred, two sizes
        row("a fish", labels=(0.5, 0.5)),  # 2 tie
        row("a bird", labels=(0.5, 0.5), has_label=False),  # 3 unlabelled
        row("truncated", RED, jpeg(90, (64, 64))[:-60]),  # 4 corrupt
        row("no image", b"not an image", BLUE),  # 5 corrupt
        row("absent", RED, None),  # 6 missing
        row(),  # 7 exact duplicate of 0
        row("a cat", BLUE, RED, (0.0, 1.0)),  # 8 the same pair as 0, the other way round
        row("a cat", RED, BLUE, (0.0, 1.0)),  # 9 the same pair as 0 with the opposite label
        row("  "),  # 10 empty caption
        row("red " * 76),  # 11 caption too long for CLIP
        row("ein grünes Haus"),  # 12 not ASCII
        row("nan", labels=(float("nan"), 1.0)),  # 13 bad label
        row("both", labels=(1.0, 1.0)),  # 14 bad label
        row("dot", jpeg(10, (1, 1)), BLUE),  # 15 tiny
        row("tied and broken", RED, b"not an image", (0.5, 0.5)),  # 16 tie and corrupt
        row("null labels", labels=(None, None)),  # 17 unlabelled
        row("twins", RED, RED, (0.0, 1.0)),  # 18 the same picture twice
        row("no bytes", b"", BLUE, (0.0, 1.0)),  # 19 missing
    ]
