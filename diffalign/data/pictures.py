"""Encoded pictures: where their bytes come from, and how they are decoded, upright and whole or not."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffalign.common.errors import UserError, brief
from diffalign.common.files import printable

__all__ = ["PICTURE_SUFFIXES", "BadImage", "ImageRef", "digest", "usual_suffix"]

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright (CIPA DC-008, "Orientation")."""
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}
"""Pillow's name of a format -> its usual suffix, where that is another word."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Of files in a folder that are taken for pictures."""


def digest(content: bytes) -> bytes:
    """Returns 16 bytes that identify `content` (blake2b)."""
    return hashlib.blake2b(content, digest_size=16).digest()


class BadImage(UserError):
    """A picture that cannot be used.

    Attributes:
        name: which picture (a path, or row and column).
        reason: `missing_image` (no bytes, no file), `corrupt_image` (bytes that do not decode completely)
            or `tiny_image` (a side below the asked minimum).
    """

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"picture {name}: {detail}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of a picture come from: a file (`path`), memory (`data`), or nowhere (both None).

    `name` is what messages call the picture; by default the path.
    """

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.path) if self.path is not None else "(in memory)")

    def read(self) -> bytes:
        """Returns the encoded bytes. Raises BadImage (missing_image) when there are none."""
        if self.data is not None:
            if not self.data:
                raise BadImage(self.name, "missing_image", "has no bytes")
            return self.data
        if self.path is None:
            raise BadImage(self.name, "missing_image", "is absent")
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise BadImage(
                self.name, "missing_image", f"cannot be read ({error.strerror or error})"
            ) from error
        except ValueError as error:  # a NUL, or characters that no file name can have
            name = printable(self.name)
            raise BadImage(name, "missing_image", f"cannot be read ({error})") from error
        if not content:
            raise BadImage(self.name, "missing_image", "is an empty file")
        return content

    def open(self, *, min_side: int = 1) -> Image.Image:
        """Returns the decoded picture, mode RGB, upright (EXIF orientation applied), all pixels in memory.

        Convention: transparent pixels are put on white, as a browser shows them (a plain conversion would
        reveal whatever colour hides under them). 16-bit grey is scaled to 8 bits.

        Raises:
            BadImage: missing, corrupt (also truncated: a half-decoded picture is never returned) or with a
                side below `min_side` pixels.
        """
        return self.decode(self.read(), min_side=min_side)

    def decode(self, content: bytes, *, min_side: int = 1) -> Image.Image:
        """Returns what `open` does, for bytes that `read` has already returned."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                picture = _to_rgb(_upright(image))
        except UnidentifiedImageError as error:
            raise BadImage(self.name, "corrupt_image", "is no picture in a known format") from error
        except MemoryError:
            raise
        except Exception as error:  # PIL reports broken files through many classes, depending on the format
            raise BadImage(self.name, "corrupt_image", f"cannot be decoded ({brief(error)})") from error
        if min(picture.size) < min_side:
            width, height = picture.size
            raise BadImage(self.name, "tiny_image", f"is {width}x{height} pixels, below {min_side}")
        return picture

    def digest(self) -> bytes:
        """Returns the `digest` of the encoded bytes. Raises BadImage when there are none."""
        return digest(self.read())


def usual_suffix(content: bytes, name: str) -> str:
    """Returns the suffix that files of the format of encoded bytes have, such as ".jpg".

    Raises:
        BadImage: no known format (the picture `name` is not decoded).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = str(image.format)
    except MemoryError:
        raise
    except Exception as error:  # PIL reports broken headers through many classes
        raise BadImage(name, "corrupt_image", "is no picture in a known format") from error
    return SUFFIXES.get(kind, f".{kind.lower()}")


def _upright(image: Image.Image) -> Image.Image:
    """Returns the picture turned as its EXIF says; a block that cannot be read says nothing."""
    try:
        turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # struct.error, TypeError and more: the pixels are whole all the same
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        if image.mode != "F":  # 16-bit grey; convert("RGB") would clip everything above 255 to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        return image.convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
