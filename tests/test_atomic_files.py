"""Files and folders are replaced as a whole, and nothing temporary stays."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from mmtrain.atomic_files import check_new, check_room, check_writable, replacing
from mmtrain.command_output import check_page, write_page
from mmtrain.errors import StorageError, UserError
from mmtrain.report.command import report


def write(path: Path, content: str, is_folder: bool) -> None:
    if is_folder:
        path.mkdir()
        (path / "inner").write_text(content)
    else:
        path.write_text(content)


def content_of(path: Path) -> str:
    return ((path / "inner") if path.is_dir() else path).read_text()


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("is_folder", [True, False])
def test_what_was_written_replaces_what_was_there(is_folder: bool, durable: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("old", "new"):
        with replacing(target, durable=durable) as made:
            write(made, content, is_folder)
            if content == "new":
                assert content_of(target) == "old"
        assert content_of(target) == content
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_failure_leaves_what_was_there_and_nothing_else(is_folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "old", is_folder)

    def fail() -> None:
        with replacing(target) as made:
            write(made, "half", is_folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content_of(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("was_folder", [True, False])
def test_what_a_killed_process_left_is_deleted_first(was_folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(tmp_path / ".target.new", "left", was_folder)
    with replacing(target) as made:
        assert made == tmp_path / ".target.new"
        assert not made.exists()
        write(made, "new", is_folder=False)
    with replacing(target, "1") as one, replacing(target, "2") as other:
        assert one != other
        write(one, "one", is_folder=False)
        write(other, "other", is_folder=False)


@pytest.mark.parametrize("name", ["/proc/none", "/proc/none/run", "file/run", "loop/run", "x" * 300, "x" * 251])
def test_what_cannot_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    for check in (check_writable, check_page, lambda path: check_new(path, "directory")):
        with pytest.raises(UserError) as caught:
            check(Path(name))
        assert len(caught.value.faults) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_page_that_fails_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    write_page(link, "first")

    def cut_off(path: Path, text: str, **options: object) -> int:
        with path.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(StorageError, match="it cannot be written: No space left on device"):
        write_page(link, "second")
    assert page.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html"]


def test_a_folder_that_does_not_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    target, free = tmp_path / "new" / "folder", shutil.disk_usage(tmp_path).free
    check_room(target, free // 2)
    with pytest.raises(StorageError, match=r"folder: it needs [\d,.]+ MB, [\d,.]+ MB are free: free space or name"):
        check_room(target, 2 * free)


def test_what_can_be_written_is_not_refused_and_nothing_is_made(tmp_path: Path) -> None:
    check_new(tmp_path / "new" / "folder", "directory")
    check_page(tmp_path / "page.html")
    check_page(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="it exists: give a new directory"):
        check_new(tmp_path / "link", "directory")


def test_a_page_does_not_replace_a_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="is not a file"):
        report([tmp_path], pipe, as_json=False)
    assert pipe.is_fifo()
