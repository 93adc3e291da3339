"""`mmtrain compose`: an image encoder, a language model and a new projector as one model directory of transformers."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mmtrain.atomic_files import check_new, new_folder
from mmtrain.compose.language import Language, load_language, with_image_tokens
from mmtrain.compose.parts import (
    ProjectorName,
    check_fits,
    image_tokens,
    make_processor,
    num_image_tokens,
    put_together,
)
from mmtrain.compose.tower import Tower, directory_of_tower, load_tower
from mmtrain.encoding.directory import model_directory
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.model.load import load_model
from mmtrain.model.weight_files import GENERATION, check_weight_files, differing_weights, save_weights, stored_dtypes
from mmtrain.progress import Progress
from mmtrain.safe_text import shown, visible


@dataclass(frozen=True, slots=True)
class ComposeOptions:
    """What the command line says."""

    vision: str
    language: str
    output: Path
    projector: ProjectorName = "mlp2x-gelu"
    feature_layer: int = -2
    dtype: str | None = None
    """What both parts are cast to; None: they have the same type already."""
    seed: int = 0


def compose(options: ComposeOptions) -> None:
    """Write the composed model to a new directory.

    Raises UserError, and leaves nothing there, if the parts do not fit or what was written is not what was composed.
    """
    name, progress = visible(str(options.output)), Progress()
    check_new(options.output, "directory")
    options = replace(options, vision=directory_of_tower(options.vision))
    dtype = options.dtype or _common_dtype(options)
    tower = load_tower(options.vision, dtype, options.feature_layer)
    check_fits(tower, options.projector, options.vision)
    language = load_language(options.language, dtype)
    torch.manual_seed(options.seed)
    language = with_image_tokens(language, image_tokens(options.projector), options.language)
    model = put_together(tower, language, options.projector, dtype, options.language)
    with new_folder(options.output) as made:
        _write(made, model, make_processor(tower, language, options.projector), options)
        _check_written(made, model, dtype)
    for line in _report(tower, language, model, options):
        progress.say(line)
    progress.say(f"saved {name} in {dtype}: {type(model).__name__} of transformers")
    progress.say("next: train its projector, for example with configs/compose/projector.yaml")


def _common_dtype(options: ComposeOptions) -> str:
    """The type in which both parts are stored. Raises UserError if they differ."""
    found = {}
    for key, path in (("--vision", options.vision), ("--language", options.language)):
        directory = model_directory(path)
        check_weight_files(directory)
        found[f"{key} {path}"] = stored_dtypes(directory)
    dtypes = set().union(*found.values())
    if len(dtypes) != 1:
        stored = ", ".join(f"{part} is stored in {' and '.join(sorted(own))}" for part, own in found.items())
        raise UserError(f"{stored}: expected one type; choose the type of the composed model with --dtype")
    return dtypes.pop()


def _write(folder: Path, model: Any, processor: Any, options: ComposeOptions) -> None:
    """Write config, weights, tokenizer, template and image settings. Raises OSError."""
    save_weights(model, folder)
    processor.save_pretrained(folder)
    own = model_directory(options.language) / GENERATION
    if own.is_file():
        shutil.copyfile(own, folder / GENERATION)
    else:
        GenerationConfig.from_model_config(model.config.text_config).save_pretrained(folder)


def _check_written(folder: Path, model: Any, dtype: str) -> None:
    """Load what was written as training does. Raises UserError unless every weight is the composed model's."""
    saved = load_model(str(folder), dtype, load_processor(str(folder)))
    wrong = differing_weights(saved, model)
    if wrong:
        raise UserError(
            f"loaded back, {len(wrong)} weights are not those of the parts, such as {shown(wrong[0])}: "
            "transformers cannot store these parts as one model"
        )


def _report(tower: Tower, language: Language, model: Any, options: ComposeOptions) -> list[str]:
    """What was composed, in a line for each component."""
    size, side = tower.image_size, tower.side
    dropped = ", its class token dropped" if tower.has_class_token else ""
    num_new = sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    (token, id_), *_ = language.token_ids.items()
    was_tied, is_tied = (one.config.tie_word_embeddings for one in (language.model, model))
    untied = "; its head no longer shares the weight of its embeddings" if was_tied and not is_tied else ""
    return [
        f"vision: {type(tower.model).__name__}, hidden states {tower.feature_layer}{dropped}; {size}x{size} pixels, "
        f"{side}x{side} patches, {num_image_tokens(tower, options.projector)} tokens an image",
        f"projector: {options.projector}, {num_new:,} new parameters from seed {options.seed}",
        f"language: {type(language.model).__name__}; {token} is token {id_}, {language.num_new_rows} new embeddings"
        f"{untied}",
    ]
