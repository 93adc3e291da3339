"""Files and folders are replaced as a whole, and nothing temporary stays."""

from pathlib import Path

import pytest

from mmtrain.atomic_files import replacing


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
