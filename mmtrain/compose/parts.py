"""The projectors, each with the class of transformers that has it, and the model put together from its parts."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmtrain.compose.language import IMAGE_TOKEN, Language
from mmtrain.compose.tower import Tower
from mmtrain.errors import UserError
from mmtrain.safe_text import one_line

ProjectorName = Literal["mlp2x-gelu", "linear", "pixel-shuffle"]
"""`mlp2x-gelu`: two linear layers with GELU between them, as in LLaVA-1.5. `linear`: the same class without GELU, the
second layer being the identity at first. `pixel-shuffle`: four neighbouring patches become one vector, followed by a
gated MLP."""

_OTHER = "use another language model"
_DOWNSAMPLING = 2
_PATCH, _START, _TILE, _END = "<image_patch>", "<image_start>", "<image_tile>", "<image_end>"


def image_tokens(projector: ProjectorName) -> tuple[str, ...]:
    """The tokens that the tokenizer needs; the first one stands for an image in a conversation."""
    return (IMAGE_TOKEN, _PATCH, _START, _TILE, _END) if projector == "pixel-shuffle" else (IMAGE_TOKEN,)


def check_fits(tower: Tower, projector: ProjectorName, path: str) -> None:
    """Raises UserError if the projector cannot take the tower's patches."""
    if projector == "pixel-shuffle" and tower.side % _DOWNSAMPLING:
        raise UserError(
            f"--projector pixel-shuffle: {path} has {tower.side} patches in a row: expected an even number; "
            "use mlp2x-gelu"
        )


def num_image_tokens(tower: Tower, projector: ProjectorName) -> int:
    """The vectors that stand for one image in the language model's input."""
    side = tower.side // _DOWNSAMPLING if projector == "pixel-shuffle" else tower.side
    return side**2


def put_together(tower: Tower, language: Language, projector: ProjectorName, dtype: str, path: str) -> Any:
    """One model of the modules of both parts themselves and a new projector, which torch's own generator initializes.
    `path` names the language model in errors.

    Raises UserError where transformers has no such model, or where it computes something else than the language model
    alone.
    """
    config, base = _config(tower, language, projector), language.model.base_model
    made = _of_parts(_CLASSES[projector], config, tower.model, base)
    inner = made.model
    inner.multi_modal_projector = _new_projector(type(inner.multi_modal_projector), config, projector).to(
        getattr(torch, dtype)
    )
    inner.vision_tower, inner.language_model = tower.model, base
    made.lm_head = language.model.get_output_embeddings()
    _check_text(made, language.model, path)
    _check_image(made, tower)
    _check_both(made, tower, num_image_tokens(tower, projector), f"--language {path}: {type(language.model).__name__}")
    if not config.tie_word_embeddings and language.model.config.tie_word_embeddings:
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
    return made.eval()


def _of_parts(of: Any, config: Any, vision: Any, base: Any) -> Any:
    """A model of the class `of`, without weights. Raises UserError where transformers makes it of other parts."""
    try:
        with torch.device("meta"):
            made = of(config)
        found = type(made.model.vision_tower), type(made.model.language_model)
    except ValueError:  # an encoder that transformers makes only within its own family
        found = None
    if found != (type(vision), type(base)):
        raise UserError(
            f"transformers has no {of.__name__} with {type(vision).__name__} and {type(base).__name__}: use other parts"
        )
    return made


_CLASSES: dict[str, Any] = {
    "mlp2x-gelu": LlavaForConditionalGeneration,
    "linear": LlavaForConditionalGeneration,
    "pixel-shuffle": AyaVisionForConditionalGeneration,
}


def _config(tower: Tower, language: Language, projector: ProjectorName) -> Any:
    text = language.model.config
    tied = text.tie_word_embeddings and _ties_head(_CLASSES[projector], language.model.base_model)
    common: dict[str, Any] = {
        "vision_config": _settings(tower.model.config),
        "text_config": _settings(text) | {"tie_word_embeddings": tied},
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": tower.selection,
        "tie_word_embeddings": tied,
        "dtype": text.dtype,
    }
    if projector == "pixel-shuffle":
        return AyaVisionConfig(**common, image_token_index=language.token_ids[_PATCH], downsample_factor=_DOWNSAMPLING)
    return LlavaConfig(
        **common,
        image_token_index=language.token_ids[IMAGE_TOKEN],
        image_seq_length=num_image_tokens(tower, projector),
        projector_hidden_act="linear" if projector == "linear" else "gelu",
    )


def _ties_head(composed: Any, base: nn.Module) -> bool:
    """Whether the class of the composed model finds the embeddings by the name to which it ties its head. Some
    language models have another one, such as GPT-2's `wte`: then the head gets a weight of its own."""
    names = {name.removeprefix("model.language_model.") for name in composed._tied_weights_keys.values()}
    return names <= base.state_dict().keys()


def _settings(config: Any) -> dict[str, Any]:
    """Without the path that the part was loaded from."""
    return {key: value for key, value in config.to_dict().items() if not key.startswith("_")}


def _new_projector(of: type[nn.Module], config: Any, projector: ProjectorName) -> Any:
    made: Any = of(config)
    if projector == "linear":
        nn.init.eye_(made.linear_2.weight)
        nn.init.zeros_(made.linear_2.bias)
    return made


@torch.no_grad()
def _check_text(made: Any, language: Any, path: str) -> None:
    """Raises UserError unless the logits of a text are the language model's, bit for bit."""
    name, alone = type(made).__name__, type(language).__name__
    if getattr(made.lm_head, "bias", None) is not None:  # the class has none, so it would be lost
        raise UserError(f"--language {path}: the head of {alone} has a bias, and that of {name} none: {_OTHER}")
    inputs = {"input_ids": torch.arange(8)[None], "use_cache": False}  # the caches of some cannot be made
    try:
        expected, found = language(**inputs).logits, made(**inputs).logits
    except Exception as error:  # a decoder that is called differently can raise anything
        raise UserError(f"--language {path}: {name} cannot run {alone}: {one_line(error)}: {_OTHER}") from None
    if not torch.equal(found, expected):
        raise UserError(
            f"--language {path}: {name} gives other logits for a text than {alone}, which changes them after its "
            f"head: {_OTHER}"
        )


@torch.no_grad()
def _check_image(made: Any, tower: Tower) -> None:
    """Raises UserError unless the composed model gives its projector the tower's features of an image."""
    expected = made.model.multi_modal_projector(tower.probe_features)
    name, layer = type(made).__name__, f"--feature-layer {tower.feature_layer}"
    try:
        found = torch.cat([*made.get_image_features(pixel_values=tower.probe_pixels).pooler_output])
    except Exception as error:  # transformers' own mistakes can raise anything
        raise UserError(f"{layer}: {name} has no features of an image: {one_line(error)}: use another layer") from None
    if not torch.allclose(found.reshape(-1), expected.reshape(-1)):
        raise UserError(f"{layer}: {name} has other features of an image than the encoder: use another layer")


@torch.no_grad()
def _check_both(made: Any, tower: Tower, num_tokens: int, name: str) -> None:
    """Raises UserError, with the `name` of the language model, unless the composed model runs an image of `num_tokens`
    after a text: some language models need the ids of all tokens."""
    ids = torch.tensor([[*range(8), *[made.config.image_token_id] * num_tokens]])
    try:
        made(input_ids=ids, pixel_values=tower.probe_pixels, use_cache=False)
    except Exception as error:  # a decoder that takes something else can raise anything
        raise UserError(f"{name} cannot run an image's features: {one_line(error)}: {_OTHER}") from None


def make_processor(tower: Tower, language: Language, projector: ProjectorName) -> Any:
    """The processor of transformers for the composed model: tokenizer, chat template and the tower's image settings."""
    if projector != "pixel-shuffle":
        return LlavaProcessor(
            tower.image_processor,
            language.tokenizer,
            patch_size=tower.patch_size,
            vision_feature_select_strategy=tower.selection,
            chat_template=language.template,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=int(tower.has_class_token),
        )
    size = {"height": tower.image_size, "width": tower.image_size}
    own = tower.image_processor
    one_tile = GotOcr2ImageProcessorPil(
        size=size, image_mean=own.image_mean, image_std=own.image_std, resample=own.resample, max_patches=1
    )
    return AyaVisionProcessor(
        one_tile,
        language.tokenizer,
        patch_size=tower.patch_size,
        img_size=tower.image_size,
        downsample_factor=_DOWNSAMPLING,
        image_token=IMAGE_TOKEN,
        img_patch_token=_PATCH,
        start_of_img_token=_START,
        tile_global_token=_TILE,
        end_of_img_token=_END,
        chat_template=language.template,
    )
