"""Commands on a run that trained a dual encoder: merge, compose, and those that need chats."""

import functools
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.compose.tower import directory_of_tower
from mmtrain.config.schema import Config
from mmtrain.contrastive import load as contrastive_load
from mmtrain.contrastive.load import load_embedder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.generate.target import find_target
from mmtrain.merge import towers
from mmtrain.merge.command import merge
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train
from mmtrain.train.trainable import add_trainable
from support.pair_data import pair_config, write_pairs
from support.tower_models import TOWERS

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
FULL = {"mode": "full"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """That of a finished run, whose adapter changes both towers and has the projections."""
    folder = tmp_path_factory.mktemp("dual")
    sections: dict[str, Any] = {
        "tune": {"vision": LORA, "language": LORA, "projector": FULL},
        "objective": {"scale": 20.0},
        "train": {"steps": 2, "batch_size": 6, "learning_rate": 1e-2},
    }
    made = pair_config(TOWERS["clip"](folder / "clip"), write_pairs(folder), folder / "run", **sections)
    train(made)
    return made


@torch.no_grad()
def embeddings(model: Any, path: str) -> Tensor:
    """As a user computes them, in plain transformers."""
    pixels = CLIPImageProcessorPil.from_pretrained(path)(
        images=PIL.Image.new("RGB", (40, 30), "red"), return_tensors="pt"
    )
    ids = AutoTokenizer.from_pretrained(path)(["it is green"], return_tensors="pt")
    made = model.eval()(**ids, **pixels)
    return torch.cat([made.image_embeds, made.text_embeds])


def test_a_merged_dual_encoder_is_base_and_adapter_in_plain_transformers(config: Config, tmp_path: Path) -> None:
    run, output = config.run.output_dir, tmp_path / "new" / "merged"
    result = CliRunner().invoke(app, ["merge", run, "-o", str(output)])
    assert result.exit_code == 0, result.exception
    assert "its embeddings of random images and texts differ" in result.stderr
    base = AutoModel.from_pretrained(config.model.path)
    alone = embeddings(base, config.model.path)
    expected = embeddings(PeftModel.from_pretrained(base, f"{run}/adapter").get_base_model(), config.model.path)
    found = embeddings(AutoModel.from_pretrained(output), str(output))
    assert torch.dist(found, expected) < 1e-5 * expected.norm()
    assert torch.dist(alone, expected) > 1e-3 * expected.norm()
    names = ("modules.json", "2_Normalize/config.json")
    assert all((output / name).read_bytes() == Path(run, "adapter", name).read_bytes() for name in names)
    assert directory_of_tower(str(output)) == str(output)


def test_a_merge_that_gives_other_embeddings_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(adapted: PeftModel) -> Any:
        return adapted.unload()

    monkeypatch.setattr(towers, "merge_weights", other)
    with pytest.raises(UserError, match="the merged model's embeddings differ by"):
        merge(Path(config.run.output_dir), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_commands_of_chats_refuse_it_in_one_line(config: Config) -> None:
    run = config.run.output_dir
    with pytest.raises(UserError, match="its model gives embeddings and no replies: use `mmtrain eval retrieval`"):
        find_target(run)
    with pytest.raises(UserError, match="clip: a dual encoder, which embeds texts and images and has no chats"):
        load_processor(config.model.path)
    with pytest.raises(UserError, match=r"adapter is an adapter: merge it with `mmtrain merge`"):
        directory_of_tower(run)


def test_compose_takes_the_directory_of_a_run(tmp_path: Path) -> None:
    model = TOWERS["clip"](tmp_path / "run" / "model")
    assert directory_of_tower(str(tmp_path / "run")) == str(model)
    assert directory_of_tower("openai/some-clip") == "openai/some-clip"


def test_what_the_class_freezes_stays_frozen_in_full_training(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although transformers makes every weight trainable that it reads from a file."""
    name = "vision_model.embeddings.position_embedding.weight"
    made = CLIPVisionEmbeddings.__init__

    def frozen(self: Any, config: Any) -> None:
        made(self, config)
        self.position_embedding.requires_grad_(False)

    monkeypatch.setattr(CLIPVisionEmbeddings, "__init__", frozen)
    tune = dict.fromkeys(("vision", "language", "projector"), FULL)
    full = pair_config(Path(config.model.path), Path(config.data.train[0].path), tmp_path / "run", tune=tune)
    runtime = Runtime("float32", device="cpu")
    embedder = load_embedder(full, runtime)
    numbers = functools.partial(contrastive_load.set_trained, full, embedder)
    add_trainable(full, embedder.model, embedder.family, runtime, Progress(), numbers)
    assert [own for own, value in embedder.model.named_parameters() if not value.requires_grad] == [name]
    assert f"tune.vision: 1 weights stay frozen, as in the model's own class: {name}" in capsys.readouterr().err
