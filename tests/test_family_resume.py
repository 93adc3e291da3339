"""A run of every family that is resumed after its first step ends with the bits of one that was not stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.schema import Config
from mmtrain.train.run import train
from support.builders import write_jsonl
from support.family_reference import FAMILIES, as_rows, conversations, directory, given_template, is_usable, save_images
from support.learning import LORA

SPLIT = ("phi4_multimodal",)
"""Families whose projector has weights next to the vision tower's modules: it takes no full training next to LoRA."""
NAMES = [name for name in FAMILIES if is_usable(name)]


def config_of(name: str, folder: Path) -> Config:
    """Two steps, of what the family takes: a text and an image, two texts, or two images; a checkpoint after each."""
    root = save_images(folder)
    cases = ("one_image", "two_images") if FAMILIES[name].given_template else ("text", "one_image")
    tried = [one for case, one in conversations(name).items() if case in cases]
    data = write_jsonl(folder / "data.jsonl", as_rows(tried))
    projector = LORA if name in SPLIT else {"mode": "full"}
    modes: dict[str, Any] = {"language": LORA} | ({"projector": projector} if FAMILIES[name].images else {})
    return Config.model_validate(
        {
            "model": {"path": str(directory(name)), "dtype": "float32", "chat_template": given_template(name)},
            "tune": modes,
            "data": {"train": [{"path": str(data), "root": str(root)}]},
            "labels": {"end_of_turn": not FAMILIES[name].unended},
            "train": {"steps": 2, "batch_size": 1, "learning_rate": 1e-2},
            "run": {"output_dir": str(folder / "run"), "checkpoint_every": 1},
        }
    )


@pytest.mark.slow("two runs of every family of models")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_resumed_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of its last checkpoint: the trained weights and the optimizer's moments."""
    monkeypatch.setattr("mmtrain.train.run.write_outputs", lambda *run: None)  # test_family_proof exports each family
    config = config_of(name, tmp_path)
    checkpoints, metrics = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"

    def ended() -> dict[str, bytes]:
        train(config)
        assert [checkpoint.name for checkpoint in sorted(checkpoints.glob("step-*"))] == ["step-000001", "step-000002"]
        return {file.name: file.read_bytes() for file in (checkpoints / "step-000002").glob("*.safetensors")}

    expected, first_row = ended(), metrics.read_text().splitlines()[0]
    shutil.rmtree(checkpoints / "step-000002")
    assert ended() == expected
    assert len(expected) == 2
    assert metrics.read_text().splitlines()[0] == first_row  # the first step was not taken again
