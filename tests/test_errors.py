"""Faults that are alike are one line; what the file system refuses is reported with a remedy."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.config.schema import Config
from mmtrain.errors import MAX_SIMILAR, StorageError, UserError, grouped, refused_by_system, storage_faults
from mmtrain.train.folder import locked, reserved, start_over
from mmtrain.train.resume import _accepting


def test_faults_that_differ_are_printed_as_they_are() -> None:
    faults = ["a.jsonl:1: no turns", "a.jsonl:2: unknown role 'bot'", "c.yaml:3: train.steps: required", "no place"]
    assert grouped(faults) == faults
    assert grouped([]) == []


def test_faults_with_another_word_are_not_alike() -> None:
    faults = [
        f"a.jsonl:{n}: unknown role '{role}'" for n, role in enumerate(("bot", "tool", "me", "you", "it"), start=1)
    ]
    assert grouped(faults) == faults


def test_a_few_that_are_alike_are_printed_one_by_one() -> None:
    faults = [f"a.jsonl:{n}: no turns" for n in range(MAX_SIMILAR)]
    assert grouped(faults) == faults
    assert len(grouped([*faults, "a.jsonl:9: no turns"])) == 1


def test_many_that_are_alike_become_the_worst_of_them() -> None:
    lengths = {3: "900", 5: "4,312", 7: "4,311", 12: "1,000", 15: "999"}
    faults = [f"d/a.jsonl:{n}: {length} tokens, over the 512 allowed" for n, length in lengths.items()]
    assert grouped(["x", *faults, "y"]) == [
        "x",
        "d/a.jsonl:5 (and 4 more lines: 3, 7, 12 …): 4,312 tokens, over the 512 allowed",
        "y",
    ]


def test_many_with_equal_numbers_become_the_first() -> None:
    faults = [f"a.json:1 item {n}: the image 'images/{n}.png' in /data: No such file" for n in (4, 5, 6, 70)]
    assert grouped(faults) == [
        "a.json:1 item 4 (and 3 more lines: 1, 1, 1): the image 'images/4.png' in /data: No such file"
    ]


def test_many_in_several_files_name_the_files() -> None:
    faults = [f"{name}.jsonl:{n}: no turns" for name in "ab" for n in (1, 2, 3)]
    assert grouped(faults) == [
        "a.jsonl:1 (and 5 more places: a.jsonl:2, a.jsonl:3, b.jsonl:1 …): no turns",
    ]


def test_many_without_a_place_are_counted() -> None:
    faults = [f"d/part-{n}.csv: only .json and .jsonl files are read" for n in range(5)]
    assert grouped(faults) == ["d/part-0.csv: only .json and .jsonl files are read (and 4 more like it)"]


def test_a_million_digits_are_no_trouble() -> None:
    faults = [f"a:{n}: {'9' * 10_000} {n}" for n in range(5)]
    assert len(grouped(faults)) == 1


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EACCES, "allow writing there"), (errno.EROFS, "allow writing there")],
)
def test_what_the_file_system_refuses_has_its_own_remedy(code: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=f"it cannot be written: .*{remedy}"), storage_faults("it cannot be written"):
        raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError), storage_faults("it cannot be written"):
        raise FileNotFoundError(errno.ENOENT, "a bug of ours")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "full", "a/b"), 4, "'a/b': No space left on device; free space and run the same"),
        (OSError(errno.ENAMETOOLONG, "long", "x" * 300), 2, f"'{'x' * 80}': File name too long; name another path"),
        (OSError(errno.ELOOP, "loop", "loop"), 2, "'loop': Too many levels of symbolic links; name another path"),
        (MemoryError(), 8, "the memory of this machine is full, or limited: see `free -m`, `ulimit -v` and cgroups"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 8, "the memory of this machine is"),
    ],
)
def test_what_the_system_refuses_anywhere_is_one_line(error: Exception, code: int, line: str) -> None:
    found = refused_by_system(error)
    assert found is not None
    assert found.exit_code == code
    assert found.faults[0].startswith(line)
    assert refused_by_system(FileNotFoundError(errno.ENOENT, "a bug of ours", "a/b")) is None


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name", ["file", "file/run", "x" * 300, "x/" * 3000, "link", "loop/run", "/proc/run", "/dev/null"]
)
def test_an_output_dir_that_can_be_none_is_a_fault_of_the_config(
    tmp_path: Path, name: str, fresh: bool, make_config: Callable[..., Config]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    config = make_config("text", output_dir=str(tmp_path / name))
    with pytest.raises(UserError, match=r"^run\.output_dir: ") as caught, reserved(config, fresh):
        pytest.fail("it was made")
    assert caught.value.exit_code == 2
    assert len(caught.value.faults) == 1


def test_the_lock_of_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="does not lock files"), locked(tmp_path / "run"):
        pytest.fail("it was locked")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name", ["config.yaml", "model/config.json", "adapter/mine.txt", "checkpoints/a", "report.html"]
)
def test_files_of_the_user_are_neither_overwritten_nor_deleted(
    name: str, fresh: bool, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config("text", output_dir=str(tmp_path / "out"))
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (tmp_path / "out" / "notes.txt").touch()
    first = name.partition("/")[0]
    with pytest.raises(UserError, match=f"out has {first}, which is not of a run: name a new"), reserved(config, fresh):
        pytest.fail("it was taken")
    assert own.read_text() == "mine"
    own.unlink()
    if own.parent.name != "out":
        own.parent.rmdir()
    with reserved(config, fresh):
        own.parent.mkdir(exist_ok=True)
        own.write_text("of the run")
    with reserved(config, fresh):  # now a run was there
        assert own.exists() == (not fresh or name == "config.yaml")


@pytest.mark.parametrize("key", ["path", "adapter"])
def test_starting_over_does_not_delete_what_the_run_starts_from(
    key: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config("text", output_dir=str(tmp_path / "out"))
    inside = tmp_path / "out" / "model"
    with reserved(config):
        inside.mkdir()
    link = tmp_path / "link"
    link.symlink_to(inside)
    config = config.model_copy(update={"model": config.model.model_copy(update={key: str(link)})})
    with pytest.raises(UserError, match=rf"^model\.{key}: .*link is in run.output_dir"), reserved(config, fresh=True):
        pytest.fail("it was taken")
    assert inside.is_dir()
    with reserved(config):
        assert inside.is_dir()


def test_starting_over_where_nothing_can_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="an earlier run cannot be deleted"):
        start_over(tmp_path)


def test_the_keys_to_accept_are_named() -> None:
    assert _accepting(["train.seed"]) == "--accept-change train.seed"
    assert _accepting(["a.b.c", "a.b.d"]) == "--accept-change a.b.c --accept-change a.b.d"
    many = [f"data.train.{n}.path" for n in range(9)] + ["train.seed"]
    assert _accepting(many) == "--accept-change data.train --accept-change train.seed"
