"""Images: found without leaving their folder, measured from the header, decoded the same way everywhere.

An image becomes RGB as inference makes it: turned as its EXIF header says, laid on white where it is transparent.
16-bit greyscale is scaled to 8 bits; `convert("RGB")` alone turns it white.
"""

import io
import logging
import os
import stat
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from mmtrain.errors import UserError
from mmtrain.records.archives import is_archive, open_archive
from mmtrain.records.chat import Image, SampleError
from mmtrain.safe_text import shown, visible

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 50_000_000
"""Decoding needs at most 20 bytes of memory a pixel (WebP; other kinds 6 to 12): less than a GiB."""
# What Pillow warns of and logs is refused or fixed here. For good: threads share the filters, and one that sets and
# restores them would change those of the others.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_STRIP_PIXELS = 2**20
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_TOO_MANY_PIXELS = f"over the {MAX_PIXELS:,} pixels allowed: scale it down"
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that was found: where its bytes are, and its size (width, height) as trained on."""

    name: str
    source: Path | bytes
    size: tuple[int, int]


Roots = Path | Sequence[Path]
"""Where images are looked for by their paths: a folder, or several folders and archives, in order."""


def find_image(image: Image, roots: Roots) -> FoundImage:
    """Measure an image from its header, without decoding it.

    A path is relative to one of `roots` and may not leave it. Raises SampleError where the image is missing, outside,
    of no known kind, too large, or where its end shows that it is cut off.
    """
    source = _source(image, roots)
    try:
        with _open(source) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise SampleError(f"{opened.width}x{opened.height}: {_TOO_MANY_PIXELS}")
            size = opened.size if _orientation(opened) < 5 else (opened.height, opened.width)
            _white(opened)
            _check_length(opened, _num_bytes(source))
            found = FoundImage(image.name, source, size)
            complete = _end_is_there(source, opened.format)
    except SampleError as error:
        raise SampleError(f"the image {shown(image.name)}: {error}") from None
    except Exception as error:  # Pillow's plugins raise anything on a broken file, SyntaxError included
        raise SampleError(f"the image {shown(image.name)} cannot be read: {_cause(error)}") from None
    if not complete:
        decode(found)
    return found


def locate(image: Image, roots: Roots, size: tuple[int, int]) -> FoundImage:
    """An image that was measured before; `decode` finds out whether it still is of that size.

    Raises SampleError where it is missing or outside `roots`.
    """
    return FoundImage(image.name, _source(image, roots), size)


def decode(found: FoundImage) -> PIL.Image.Image:
    """The image as 8-bit RGB of the size measured before. Raises SampleError where it does not decode."""
    try:
        rgb, turn = _opened_rgb(found.source)
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"the image {shown(found.name)} does not decode: {_cause(error)}") from None
    rgb = rgb if turn is None else rgb.transpose(turn)
    if rgb.size != found.size:
        raise SampleError(f"the image {shown(found.name)} changed: it was {found.size} and is {rgb.size}")
    return rgb


def read_bytes(found: FoundImage) -> bytes:
    """The file's bytes. Raises SampleError where it cannot be read."""
    if isinstance(found.source, bytes):
        return found.source
    try:
        return found.source.read_bytes()
    except OSError as error:
        raise SampleError(f"the image {shown(found.name)} cannot be read: {_cause(error)}") from None


def _source(image: Image, roots: Roots) -> Path | bytes:
    """The bytes of an image, or the path of its file."""
    if image.data is not None:
        return image.data
    faults = []
    several = [roots] if isinstance(roots, Path) else roots
    for root in several:
        try:
            return _member(image.name, root) if is_archive(root) else _inside(image.name, root)
        except SampleError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    names = ", ".join(visible(str(root)) for root in several)
    raise SampleError(f"the image {shown(image.name)} is in none of {names}: {faults[0]}")


def _member(name: str, archive: Path) -> bytes:
    where = f"the image {shown(name)} in {visible(str(archive))}"
    try:
        found = open_archive(archive).read(name, MAX_BYTES)
    except (SampleError, UserError) as error:
        raise SampleError(f"{where}: {error}") from None
    if found is None:
        raise SampleError(f"{where}: there is no such member")
    return found


def _inside(name: str, root: Path) -> Path:
    if "\0" in name:
        raise SampleError(f"the image path {shown(name)} has a null character")
    root = root.resolve()
    try:
        path = _spelled(root / name).resolve()
        if not path.is_relative_to(root):
            raise SampleError(f"the image path {shown(name)} leaves {visible(str(root))}; set a wider `root`")
        status = path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SampleError(f"the image {shown(name)} in {visible(str(root))}: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SampleError(f"the image {shown(name)} is not a file")
    if status.st_size > MAX_BYTES:
        raise SampleError(f"the image {shown(name)} is larger than {MAX_BYTES:,} bytes")
    return path


def _spelled(path: Path) -> Path:
    """`path`, or where no file has it the one of its other spellings that a file has."""
    return path if path.exists() else next((other for other in spellings(path) if other.exists()), path)


def spellings(path: Path) -> list[Path]:
    """Other spellings of the same path: with the backslashes of Windows, and composed or decomposed as on macOS."""
    name = str(path)
    plain = name.replace("\\", "/")
    return [
        Path(other)
        for other in (plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD")))
        if other != name
    ]


def _open(source: Path | bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _opened_rgb(source: Path | bytes) -> tuple[PIL.Image.Image, PIL.Image.Transpose | None]:
    """The pixels in RGB, and how they are to be turned; what the file was opened as is not kept in memory."""
    with _open(source) as opened:
        turn = _TRANSPOSE.get(_orientation(opened))  # before the pixels are loaded: see `_orientation`
        return _rgb(opened), turn


def _orientation(opened: PIL.Image.Image) -> int:
    """The EXIF orientation (1 to 8) in the header, 1 where there is none.

    Read from the header alone: Pillow's own `exif_transpose` decodes some PNGs to look for it after the pixels,
    and raises on others.
    """
    exif = PIL.Image.Exif()
    try:
        if (header := opened.info.get("exif")) is None:
            raw = opened.info.get("Raw profile type exif", "")  # as ImageMagick writes it into a PNG
            header = bytes.fromhex("".join(raw.split("\n")[3:]))
        exif.load(header)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _white(opened: PIL.Image.Image) -> int | None:
    """The value that stands for white where it takes more than 8 bits, None where it does not."""
    if opened.mode == "I" and opened.format in ("PPM", "PNG"):  # these hold 16 bits in a wider mode
        return 65_535
    if opened.mode in ("I", "F"):
        raise SampleError("greyscale of 32 bits has no known white: save it with 8 or 16 bits")
    if opened.mode.startswith("I;16"):
        (bits,) = getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return int(2**bits - 1)
    return None


def _rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    white = _white(opened)
    if white is not None:
        return opened.point(lambda value: value * (255 / white)).convert("L").convert("RGB")
    return _on_white(opened) if opened.has_transparency_data else opened.convert("RGB")


def _on_white(opened: PIL.Image.Image) -> PIL.Image.Image:
    """A transparent image on white, some rows at a time: whole copies would take three times as much memory."""
    width, height = opened.size
    rgb = PIL.Image.new("RGB", opened.size)
    num_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        strip = opened.crop((0, top, width, min(height, top + num_rows))).convert("RGBA")
        white = PIL.Image.new("RGBA", strip.size, "white")
        rgb.paste(PIL.Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


def _check_length(opened: PIL.Image.Image, length: int) -> None:
    """Raises SampleError where a file that is not compressed is too short for what its header says.

    `length` in bytes. A lower bound where the kind of file leaves the bits of a pixel open.
    """
    bits = 8 * len(opened.getbands()) if opened.format == "PPM" and opened.mode != "1" else 1
    for codec, extents, offset, parameters in getattr(opened, "tile", ()):
        if codec not in ("raw", "ppm", "ppm_plain") or extents is None:
            continue
        left, top, right, bottom = extents
        last_row = (right - left) * bits // 8
        row = parameters[1] if codec == "raw" and isinstance(parameters, tuple) and len(parameters) > 1 else 0
        needed = offset + (bottom - top - 1) * max(row, last_row) + last_row
        if length < needed:
            raise SampleError(f"cut off: {length:,} bytes, and {opened.width}x{opened.height} need {needed:,}")


def _num_bytes(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _end_is_there(source: Path | bytes, format_name: str | None) -> bool:
    """False where a JPEG or PNG lacks its closing marker: then only decoding shows whether it is whole."""
    marker = _ENDS.get(format_name or "")
    if marker is None:
        return True
    if isinstance(source, bytes):
        return marker in source[-4096:]
    with source.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return marker in file.read()


def _cause(error: Exception) -> str:
    if isinstance(error, PIL.Image.DecompressionBombError):
        return _TOO_MANY_PIXELS
    text = str(error) or type(error).__name__
    known = f"not an image of a known kind ({', '.join(FORMATS)}): save it as one of them"
    return text if "cannot identify" not in text else known
