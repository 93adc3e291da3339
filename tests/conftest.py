"""Models made once a session, on one thread: bits depend on the number of threads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.config.schema import Config
from support.builders import MAKERS, mixed_rows, train_and_run, write_jsonl

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: a long file that starts last keeps one process busy while the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What mmtrain keeps in the user's cache is made anew by every session of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        yield


OTHER_KINDS = pytest.mark.slow("the same with the two other kinds of models")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name == "qwen2_5_vl" else OTHER_KINDS) for name in sorted(MAKERS)],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture
def make_config(model_dirs: dict[str, Path], tmp_path: Path) -> Callable[..., Config]:
    """A config for a kind of model over the mixed samples; keywords are keys of `train` and `run`."""

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
