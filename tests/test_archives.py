"""Images in zip and tar files and in several folders, and the index of a tar file that is kept."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmtrain.config.data_section import Source, TrainSource
from mmtrain.config.schema import Config
from mmtrain.encoding.images import decode, find_image
from mmtrain.errors import UserError
from mmtrain.records import archives, index_cache, tar_index
from mmtrain.records.chat import Image, SampleError
from mmtrain.records.record_set import RecordSet
from mmtrain.safe_text import shown
from support.builders import write_jsonl
from support.learning import learner_for


def png(color: str, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


MEMBERS = {"a.png": png("red"), "sub/b.png": png("blue", (20, 30))}


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {"zip": make_zip, "tar": make_tar}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub/b.png", "sub//b.png"])
def test_a_member_is_read_without_unpacking(tmp_path: Path, kind: str, name: str) -> None:
    path = MAKERS[kind](tmp_path / f"images.{kind}", {f"./{name}": content for name, content in MEMBERS.items()})
    found = find_image(Image(name), [path])
    assert found.source == MEMBERS["a.png" if name.endswith("a.png") else "sub/b.png"]
    assert decode(found).getpixel((0, 0)) == ((255, 0, 0) if "a" in name else (0, 0, 255))
    assert list(tmp_path.iterdir()) == [path]


def refusal(name: str, *roots: Path) -> str:
    with pytest.raises(SampleError) as caught:
        find_image(Image(name), roots)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_not_in_an_archive_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside.png").write_bytes(png("red"))
    path = MAKERS[kind](tmp_path / f"images.{kind}", MEMBERS)
    for name in ("c.png", "../outside.png", str(tmp_path / "outside.png"), "sub/../../outside.png"):
        assert refusal(name, path) == f"the image {shown(name)} in {path}: there is no such member"


def test_several_roots_are_searched_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", make_zip(tmp_path / "second.zip", {**MEMBERS, "c.png": png("green")})
    first.mkdir()
    (first / "a.png").write_bytes(png("white"))
    assert find_image(Image("a.png"), [first, second]).source == first / "a.png"
    assert find_image(Image("a.png"), [second, first]).source == MEMBERS["a.png"]
    assert find_image(Image("c.png"), [first, second]).source == png("green")
    assert refusal("d.png", first, second).startswith(f"the image 'd.png' is in none of {first}, {second}: ")


def test_a_member_that_is_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtrain.encoding.images.MAX_BYTES", 10_000)
    path = make_zip(tmp_path / "bomb.zip", {"a.png": b"\0" * 10_001, "b.png": b"\0" * 10_000})
    assert "10,001 bytes when unpacked, over the 10,000 allowed" in refusal("a.png", path)
    assert "not an image" in refusal("b.png", path)
    path = make_tar(tmp_path / "bomb.tar", {"a.png": b"\0" * 10_001})
    assert "has 10,001 bytes, over the 10,000 allowed" in refusal("a.png", path)


def test_a_member_whose_header_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    content = bytearray(make_zip(tmp_path / "a.zip", {"a.png": png("red", (300, 300))}).read_bytes())
    at = content.rindex(b"PK\1\2")  # its entry in the directory at the end
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path = tmp_path / "lies.zip"
    path.write_bytes(content)
    assert "'a.png'" in refusal("a.png", path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_an_archive_that_is_broken_is_one_line_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    data = write_jsonl(tmp_path / "a.jsonl", [{"query": "Q", "response": "A", "image": "a.png"}])
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: not a (whole zip|plain tar) file: "):
        RecordSet([Source(path=str(data), root=str(tmp_path / name))])


def with_root(config: Config, path: Path, root: Any) -> Config:
    source = TrainSource(path=str(path), root=root)
    return config.model_copy(update={"data": config.data.model_copy(update={"train": (source,)})})


@pytest.mark.slow("several runs")
def test_training_reads_the_same_from_a_folder_and_from_archives(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    rows = [{"query": f"<image>What is {name}?", "response": "A", "image": name} for name in MEMBERS]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    for name, content in MEMBERS.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    one, two = make_zip(tmp_path / "a.zip", MEMBERS), make_tar(tmp_path / "a.tar", MEMBERS)
    found = []
    for root in (str(tmp_path / "images"), str(one), (str(two),), (str(tmp_path), str(two), str(one))):
        _, dataset = learner_for(with_root(make_config("llava"), data, root))
        samples = [dataset.train.encoded(index) for index in range(2)]
        found.append([(s.ids.tolist(), [decode(i.image).tobytes() for i in s.images]) for s in samples])
    assert found[0] == found[1] == found[2] == found[3]


def test_a_changed_archive_is_read_again(tmp_path: Path) -> None:
    for kind, make in MAKERS.items():
        path = make(tmp_path / f"a.{kind}", MEMBERS)
        assert find_image(Image("a.png"), [path]).size == (30, 20)
        make(path, {"a.png": png("red", (50, 40)), "more.png": b"x" * 5000})
        assert find_image(Image("a.png"), [path]).size == (50, 40)


# --- the index of a tar file ---


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "_WORTH_KEEPING", 3)
    members = {f"ä{number}.txt": str(number).encode() for number in range(5)}
    return make_tar(tmp_path / "large.tar", members)


def contents(path: Path) -> list[tuple[str, bytes]]:
    index = tar_index.tar_index(path)
    with path.open("rb") as file:
        return [(index.name(i), index.content(i, file, 100)) for i in range(len(index))]


EXPECTED = [(f"ä{number}.txt", str(number).encode()) for number in range(5)]


def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of the tar files that are read through from here on."""
    seen: list[Path] = []
    scan = tar_index._members

    def noted(path: Path, file: Any) -> Any:
        seen.append(path)
        return scan(path, file)

    monkeypatch.setattr(tar_index, "_members", noted)
    return seen


def test_an_index_is_made_once(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scans(monkeypatch)
    assert contents(large) == contents(large) == EXPECTED
    assert seen == [large]
    (kept,) = (tmp_path / "cache" / "mmtrain" / "index").iterdir()
    assert kept.suffix == ".npz"


def test_an_index_of_a_changed_file_is_made_again(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents(large)
    seen = scans(monkeypatch)
    make_tar(large, {f"b{number}.txt": b"!" for number in range(4)})
    assert contents(large) == [(f"b{number}.txt", b"!") for number in range(4)]
    os.utime(large, ns=(1, 1))
    contents(large)
    assert seen == [large] * 2


def test_an_index_that_nobody_uses_any_more_is_removed(large: Path, tmp_path: Path) -> None:
    other = make_tar(tmp_path / "other.tar", {f"{number}.txt": b"!" for number in range(3)})
    contents(large)
    contents(other)
    folder = tmp_path / "cache" / "mmtrain" / "index"
    for kept in folder.iterdir():
        os.utime(kept, (0, 0))
    contents(other)  # it is in use again
    index_cache._remove_unused.cache_clear()  # as in another process
    contents(make_tar(tmp_path / "third.tar", {f"{number}.txt": b"?" for number in range(3)}))
    used = [index_cache.CachedIndex(path, tar_index._KIND)._path for path in (other, tmp_path / "third.tar")]
    assert set(folder.iterdir()) == set(used)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "a folder"])
def test_a_damaged_index_is_made_again(large: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents(large)
    (kept,) = (tmp_path / "cache" / "mmtrain" / "index").iterdir()
    content = bytearray(kept.read_bytes())
    if how == "a folder":
        kept.unlink()
        kept.mkdir()
    else:
        content[content.index(b"\xc3\xa4")] ^= 1
        kept.write_bytes(bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[how]))
    seen = scans(monkeypatch)
    assert contents(large) == EXPECTED
    assert seen == [large]


def test_an_index_that_cannot_be_kept_is_made_every_time(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    seen = scans(monkeypatch)
    assert contents(large) == contents(large) == EXPECTED
    assert len(seen) == 2


def test_an_archive_is_opened_once(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", MEMBERS)
    assert archives.open_archive(path) is archives.open_archive(path)
