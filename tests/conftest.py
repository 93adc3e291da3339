"""Models made once a session, on one thread: bits depend on the number of threads.

torch is imported by the tests and not here: the process that only hands the tests out does not need it.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mmtrain.config.schema import Config
    from support.forked import Server

gc.disable()


def pytest_collection_finish() -> None:
    """What importing and collecting made stays: the garbage collector need not look at a million objects again."""
    gc.freeze()
    gc.enable()


LONGEST = ("torture", "family_proof", "fake_cuda", "family_resume", "config_keys", "peak_memory", "labels", "train")
"""The files that take longest, the longest waits first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then all with slow tests: one that starts last keeps one process busy while the others are
    done."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), item.get_closest_marker("slow") is None))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What mmtrain keeps in the user's cache is made anew by every session of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        yield


KINDS = ("llava", "qwen2_5_vl", "text")
OTHER_KINDS = pytest.mark.slow("the same with the two other kinds of models")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name == "qwen2_5_vl" else OTHER_KINDS) for name in KINDS],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from support.builders import MAKERS

    assert set(MAKERS) == set(KINDS)
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def server() -> "Iterator[Server]":
    """Runs commands in processes of their own, which need not import anything."""
    from support.forked import Server

    made = Server()
    yield made
    made.close()


@pytest.fixture
def make_config(model_dirs: dict[str, Path], tmp_path: Path) -> "Callable[..., Config]":
    """A config for a kind of model over the mixed samples; keywords are keys of `train` and `run`."""
    from mmtrain.config.schema import Config
    from support.builders import mixed_rows, train_and_run, write_jsonl

    def make(kind: str, tune: dict[str, Any] | None = None, **settings: Any) -> Config:
        data = tmp_path / f"data-{kind}" / "mixed.jsonl"
        if not data.exists():
            write_jsonl(data, mixed_rows(data.parent, with_images=kind != "text"))
        return Config.model_validate(
            {
                "model": {"path": str(model_dirs[kind]), "dtype": "float32"},
                "tune": tune or {"language": {"mode": "lora", "rank": 4, "alpha": 8.0}},
                "data": {"train": [{"path": str(data)}]},
                **train_and_run(
                    **{"output_dir": str(tmp_path / "run"), "batch_size": 8, "learning_rate": 1e-2, **settings}
                ),
            }
        )

    return make
