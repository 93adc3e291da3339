"""Images are found inside their folder, measured from the header and decoded to RGB, or refused by name."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import pytest

from mmtrain.encoding import images
from mmtrain.encoding.images import MAX_PIXELS, decode, find_image
from mmtrain.records.chat import Image, SampleError

BAD = Path(__file__).parents[2] / "shared" / "data" / "bad_inputs"
ROWS: list[dict[str, Any]] = json.loads((BAD / "expected_pillow.json").read_text())["rows"] if BAD.is_dir() else []
NAMES = [row["file"].removeprefix("images/") for row in ROWS]

Pixels = npt.NDArray[np.uint8]

# Six colours, no two alike, in two rows of three.
SIX: Pixels = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [40, 80, 120]]], dtype=np.uint8
)


def read(path: Path) -> Pixels:
    """The pixels (height, width, 3), having checked that they are as many as were measured."""
    found = find_image(Image(path.name), path.parent)
    decoded = decode(found)
    assert decoded.mode == "RGB"
    assert decoded.size == found.size
    return np.asarray(decoded)


def refusal(name: str, root: Path, data: bytes | None = None) -> str:
    with pytest.raises(SampleError) as caught:
        find_image(Image(name, data), root)
    assert str(caught.value).isprintable()
    return str(caught.value)


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(pixels: npt.NDArray[Any], path: Path, mode: str | None = None, **options: Any) -> Path:
    image = PIL.Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of the given chunks, written by hand."""
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


# --- pixels ---


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("tiff", {}), ("ppm", {}), ("webp", {"lossless": True})]
)
def test_lossless_kinds_give_the_pixels_that_were_saved(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    pixels = noise(5, 7)
    assert (read(save(pixels, tmp_path / f"a.{suffix}", **options)) == pixels).all()


def test_a_jpeg_is_decoded_near_to_what_was_saved(tmp_path: Path) -> None:
    pixels = np.repeat(np.repeat(SIX, 16, 0), 16, 1)
    got = read(save(pixels, tmp_path / "a.jpg", quality=95, subsampling=0)).astype(int)
    assert np.abs(got - pixels).mean() < 4


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_header_says(tmp_path: Path, orientation: int, kind: str) -> None:
    """The eight meanings in the EXIF standard, where row 0 and column 0 of the file lie in the image."""
    upright = {
        1: SIX,
        2: SIX[:, ::-1],
        3: SIX[::-1, ::-1],
        4: SIX[::-1],
        5: SIX.transpose(1, 0, 2),
        6: SIX[::-1].transpose(1, 0, 2),
        7: SIX[::-1, ::-1].transpose(1, 0, 2),
        8: SIX[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    by_kind: dict[str, dict[str, Any]] = {
        "png": {},
        "webp": {"lossless": True},
        "tiff": {},
        "jpg": {"quality": 100, "subsampling": 0},
    }
    got = read(save(np.repeat(np.repeat(SIX, 8, 0), 8, 1), tmp_path / f"a.{kind}", exif=exif, **by_kind[kind]))
    assert got.shape == (upright.shape[0] * 8, upright.shape[1] * 8, 3)
    assert np.abs(got[4::8, 4::8].astype(int) - upright).max() <= 6


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert (read(save(SIX, tmp_path / "a.png", exif=exif)) == SIX).all()


def test_a_broken_exif_block_turns_nothing(tmp_path: Path) -> None:
    assert (read(save(SIX, tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")) == SIX).all()


def test_transparent_parts_are_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(6, 8, 4)
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    assert np.abs(read(save(pixels, tmp_path / "a.png")).astype(float) - expected).max() <= 1


def test_laying_on_white_some_rows_at_a_time_changes_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for height, width in ((7, 5), (1, 40), (40, 1)):
        path = save(noise(height, width, 4), tmp_path / "a.png")
        whole = read(path)
        monkeypatch.setattr(images, "_STRIP_PIXELS", 2 * width)
        assert (read(path) == whole).all()
        monkeypatch.undo()


def test_transparent_grey_is_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(6, 8, 2)
    PIL.Image.merge("LA", [PIL.Image.fromarray(pixels[..., i]) for i in range(2)]).save(tmp_path / "a.png")
    share = pixels[..., 1] / 255
    expected = pixels[..., 0] * share + 255 * (1 - share)
    assert np.abs(read(tmp_path / "a.png").astype(float) - expected[..., None]).max() <= 1


def test_a_palette_with_transparent_colours_is_laid_on_white(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0, 51]))
    assert read(tmp_path / "a.png").tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]


def test_a_gif_with_one_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "a.gif", transparency=1)
    assert read(tmp_path / "a.gif").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_keeps_its_tones(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 20 20 65535\n" + values.astype(">u2").tobytes())
    else:
        save(values, path)
    got = read(path).astype(float)
    assert np.abs(got - (values / 257)[..., None]).max() <= 1
    assert (got[0, 0, 0], got[-1, -1, 0]) == (0, 255)


def test_12_bit_grey_is_not_nearly_black(tmp_path: Path) -> None:
    """A TIFF of 12 bits a sample has 4,095 as its white."""
    rows, tags = b"\xff" * 24, []
    for tag, kind, value in [
        (256, 4, 4),
        (257, 4, 4),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (277, 3, 1),
        (278, 4, 4),
    ]:
        tags.append((tag, kind, value))
    tags += [(273, 4, 8), (279, 4, len(rows))]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in sorted(tags)
    )
    path = tmp_path / "a.tif"
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)
    )
    try:
        pixels = read(path)
    except SampleError as error:
        message = str(error)
        assert "12" in message
    else:
        assert (pixels >= 254).all()


def test_grey_without_a_known_white_is_refused_when_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.5, 7.0))
    save(np.array([[0, 70_000]], np.int32), tmp_path / "a.tiff")
    for name in ("a.pfm", "a.tiff"):
        assert f"'{name}'" in refusal(name, tmp_path)


def test_8_bit_and_1_bit_grey_become_rgb(tmp_path: Path) -> None:
    values = noise(4, 5, 1)[..., 0]
    assert (read(save(values, tmp_path / "a.png")) == values[..., None]).all()
    assert (read(save(values >= 128, tmp_path / "b.png")) == np.where(values >= 128, 255, 0)[..., None]).all()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, 16:, 0] = 255  # cyan on the right, bare paper on the left
    PIL.Image.frombytes("CMYK", (32, 16), ink.tobytes()).save(tmp_path / "a.jpg", quality=100)
    got = read(tmp_path / "a.jpg").astype(int)
    assert np.abs(got[:, 4:12] - [255, 255, 255]).max() <= 8
    assert np.abs(got[:, 20:28] - [0, 255, 255]).max() <= 8


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_an_animated_image_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert (read(tmp_path / f"a.{kind}") == [255, 0, 0]).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_and_narrow_images_are_read(tmp_path: Path, width: int, height: int) -> None:
    pixels = noise(height, width)
    assert (read(save(pixels, tmp_path / "a.png")) == pixels).all()


def test_the_bytes_of_a_data_uri_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(SIX).save(buffer, "PNG")
    found = find_image(Image("data URI", buffer.getvalue()), tmp_path)
    assert found.size == (3, 2)
    assert (np.asarray(decode(found)) == SIX).all()
    assert "cannot be read" in refusal("data URI", tmp_path, b"")
    assert "cannot be read" in refusal("data URI", tmp_path, base64.b64decode("AAAA"))
    assert "does not decode" in refusal("data URI", tmp_path, buffer.getvalue()[:-40])


# --- broken files ---


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_an_image_that_is_cut_off_is_refused_when_it_is_found(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(noise(64, 64), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert f"'a.{suffix}'" in refusal(path.name, tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.8])
def test_an_image_that_is_cut_off_is_never_trained_on(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(noise(64, 64), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SampleError, match=rf"'a\.{suffix}'"):
        read(path)


def test_an_image_with_a_wrong_suffix_is_read_by_what_it_is(tmp_path: Path) -> None:
    for name in ("a.jpg", "b", "c.txt"):
        assert (read(save(SIX, tmp_path / name, format="PNG")) == SIX).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"%!PS-Adobe-3.0 EPSF"],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    message = refusal("a.png", tmp_path)
    assert "'a.png'" in message
    assert "not an image of a known kind" in message


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "PDF"])
def test_other_kinds_are_not_even_opened(tmp_path: Path, kind: str) -> None:
    save(noise(16, 16), tmp_path / "a.png", format=kind)
    assert "not an image of a known kind" in refusal("a.png", tmp_path)


@pytest.mark.parametrize("size", [(7_072, 7_072), (10_001, 10_000), (13_000, 13_000), (50_000, 50_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "a.png").write_bytes(png(header(*size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))
    assert "pixels" in refusal("a.png", tmp_path)


@pytest.mark.parametrize(
    ("name", "header_of", "row_bytes"),
    [
        ("a.ppm", b"P6 %d %d 255\n", 3),
        ("a.pgm", b"P5 %d %d 255\n", 1),
        ("a.pbm", b"P4 %d %d\n", 1 / 8),
        ("b.pgm", b"P5 %d %d 65535\n", 1),
        ("b.ppm", b"P3 %d %d 255\n", 3),
    ],
)
def test_a_file_far_too_short_for_its_header_is_refused_when_it_is_found(
    tmp_path: Path, name: str, header_of: bytes, row_bytes: float
) -> None:
    (tmp_path / name).write_bytes(header_of % (6_000, 7_000) + bytes(100))
    message = refusal(name, tmp_path)
    assert "cut off" in message
    assert "6000x7000" in message
    assert int(message.split()[-1].replace(",", "")) - 42_000_000 * row_bytes < 100


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(s, m) for s in ("bmp", "tiff", "ppm") for m in ("RGB", "L", "1", "P") if (s, m) != ("ppm", "P")],
)
def test_an_uncompressed_file_is_long_enough_to_the_byte(tmp_path: Path, suffix: str, mode: str) -> None:
    for width, height in ((7, 5), (1, 1), (33, 2)):
        save(noise(height, width), tmp_path / f"a.{suffix}", mode)
        assert read(tmp_path / f"a.{suffix}").shape == (height, width, 3)
    save(noise(300, 300), tmp_path / f"a.{suffix}", mode)
    (tmp_path / f"a.{suffix}").write_bytes((tmp_path / f"a.{suffix}").read_bytes()[:600])
    assert f"'a.{suffix}'" in refusal(f"a.{suffix}", tmp_path)


def test_plain_text_pixels_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.pbm").write_bytes(b"P1 3 2\n010101")
    (tmp_path / "a.pgm").write_bytes(b"P2 2 1 1\n0 1")
    assert read(tmp_path / "a.pbm")[..., 0].tolist() == [[255, 0, 255], [0, 255, 0]]
    assert read(tmp_path / "a.pgm")[..., 0].tolist() == [[0, 255]]


PEAK = """
import sys
from pathlib import Path
from mmtrain.records.chat import Image
from mmtrain.encoding.images import decode, find_image
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
decode(find_image(Image(sys.argv[2]), Path(sys.argv[1])))
print(peak() - before)
"""
OTHER_FORMATS = pytest.mark.slow("a process for each format")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("png", 12),
        *(pytest.param(kind, limit, marks=OTHER_FORMATS) for kind, limit in (("webp", 22), ("gif", 12), ("tiff", 12))),
    ],
)
def test_a_transparent_image_is_decoded_without_whole_copies(tmp_path: Path, kind: str, limit: int) -> None:
    """The documented bound of `MAX_PIXELS`, in bytes a pixel; whole copies took 17 to 28."""
    image = PIL.Image.new("RGBA", (3_000, 2_000), (1, 2, 3, 4))
    options: dict[str, Any] = {"lossless": True, "method": 0} if kind == "webp" else {}
    image.save(tmp_path / f"a.{kind}", **options)
    words = [sys.executable, "-c", PEAK, str(tmp_path), f"a.{kind}"]
    peak = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert peak < limit * 6_000_000 + 4_000_000


def test_pillow_prints_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(header(10_000, 9_500), (b"IDAT", b""), (b"IEND", b"")))
    (tmp_path / "exif.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(100))
    palette = PIL.Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0, 51]))
    code = (
        "import sys, warnings\nfrom pathlib import Path\nfrom mmtrain.records.chat import Image, SampleError\n"
        "from mmtrain.encoding.images import decode, find_image\n"
        "import PIL.Image\n"
        "for name in sys.argv[2:]:\n"
        "    try: decode(find_image(Image(name), Path(sys.argv[1])))\n"
        "    except SampleError as error: print(error)\n"
    )
    odd = [row["file"] for row in ROWS if "DecompressionBomb" in str(row) or row["file"].endswith((".tif", ".tiff"))]
    for root, names in ((tmp_path, ["bomb.png", "exif.tif", "palette.png"]), (BAD, odd)):
        done = subprocess.run([sys.executable, "-c", code, str(root), *names], capture_output=True, text=True)
        assert done.returncode == 0
        assert "Warning" not in done.stderr
        assert "More samples" not in done.stderr


def test_a_text_that_unpacks_to_megabytes_is_refused(tmp_path: Path) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(80_000_000))
    pixels = (b"IDAT", zlib.compress(b"\0abc"))
    (tmp_path / "a.png").write_bytes(png(header(1, 1), (b"zTXt", text), pixels, (b"IEND", b"")))
    assert "'a.png'" in refusal("a.png", tmp_path)


def test_an_image_that_changed_since_it_was_measured_is_refused(tmp_path: Path) -> None:
    found = find_image(Image("a.png"), save(SIX, tmp_path / "a.png").parent)
    save(noise(9, 9), tmp_path / "a.png")
    with pytest.raises(SampleError, match="changed"):
        decode(found)
    (tmp_path / "a.png").unlink()
    with pytest.raises(SampleError, match=r"'a\.png'"):
        decode(found)


# --- paths ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an image, next to an image that it must not reach."""
    (tmp_path / "root" / "deeper").mkdir(parents=True)
    save(SIX, tmp_path / "root" / "in.png")
    save(SIX, tmp_path / "out.png")
    return tmp_path / "root"


def test_an_image_in_the_folder_is_found_by_any_path_that_stays_inside(root: Path) -> None:
    (root / "link.png").symlink_to("in.png")
    for name in ("in.png", "./in.png", "deeper/../in.png", "link.png", str(root / "in.png")):
        assert find_image(Image(name), root).size == (3, 2)


def test_the_folder_may_itself_be_a_link(root: Path) -> None:
    other = root.parent / "other"
    other.symlink_to(root)
    assert find_image(Image("in.png"), other).size == (3, 2)


@pytest.mark.parametrize(
    "name", ["../out.png", "deeper/../../out.png", "../root/../out.png", "/etc/passwd", "link.png", "up/out.png"]
)
def test_a_path_that_leaves_the_folder_is_refused(root: Path, name: str) -> None:
    (root / "link.png").symlink_to("../out.png")
    (root / "up").symlink_to("..")
    assert "leaves" in refusal(name, root)


def test_a_folder_whose_name_begins_alike_is_outside(root: Path) -> None:
    (root.parent / "root2").mkdir()
    save(SIX, root.parent / "root2" / "a.png")
    assert "leaves" in refusal("../root2/a.png", root)


def test_what_is_not_a_file_is_refused_at_once(root: Path) -> None:
    os.mkfifo(root / "fifo.png")
    for name in ("deeper", "fifo.png", "", "."):
        assert "is not a file" in refusal(name, root)


def test_a_loop_of_links_and_a_link_to_nothing_are_refused(root: Path) -> None:
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    (root / "c.png").symlink_to("nothing.png")
    for name in ("a.png", "c.png"):
        assert f"'{name}'" in refusal(name, root)


@pytest.mark.parametrize(
    "name",
    ["nowhere.png", "in.png/a.png", "a\0.png", "\ud800.png", "x" * 300 + ".png", "x/" * 3000, "~/a.png", "in.png "],
)
def test_a_path_to_nothing_is_refused(root: Path, name: str) -> None:
    message = refusal(name, root)
    assert "image" in message
    assert len(message) < 300 + len(str(root))


@pytest.mark.parametrize(
    "name", ["a\nb.png", "é.png", "名.png", "a b.png", "\u2028.png", "a'\".png", "%20.png", "*.png"]
)
def test_strange_names_are_read_and_reported_on_one_line(root: Path, name: str) -> None:
    assert "image" in refusal(name, root)
    save(SIX, root / name, format="PNG")
    assert (read(root / name) == SIX).all()


# --- the odd images ---


@pytest.mark.skipif(not ROWS, reason="the shared data is not there")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_an_odd_image_is_decoded_upright_or_refused(row: dict[str, Any]) -> None:
    try:
        found = find_image(Image(row["file"]), BAD)
        decoded = decode(found)
    except SampleError as error:
        message = str(error)
        assert message.isprintable()
        assert row["file"].removeprefix("images/")[:20] in message
        if row["expected"] == "accept":
            raises = isinstance(row["upright_size"], str)  # Pillow cannot read it to its end
            assert raises or row["format"] in ("AVIF", "ICO") or row["mode"] == "F"
        return
    assert row["expected"] == "accept"
    assert decoded.mode == "RGB"
    assert list(decoded.size) == list(found.size) == row["upright_size"]
    with PIL.Image.open(BAD / row["file"]) as opened:
        plain = not opened.has_transparency_data and opened.mode in ("1", "L", "P", "RGB", "CMYK")
        if plain:
            assert (np.asarray(decoded) == np.asarray(PIL.ImageOps.exif_transpose(opened).convert("RGB"))).all()


@pytest.mark.skipif(not ROWS, reason="the shared data is not there")
def test_all_odd_images_are_in_the_table() -> None:
    assert sorted(NAMES) == sorted(path.name for path in (BAD / "images").iterdir())
    assert len(NAMES) == 67
