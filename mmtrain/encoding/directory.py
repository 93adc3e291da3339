"""What transformers makes of a model directory: config, tokenizer and the family's processor. Nothing of it is run."""

import copy
import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

from mmtrain.encoding.processor_settings import TEMPLATE_FILE, check_image_settings, write_image_settings
from mmtrain.errors import UserError
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, shown, visible
from mmtrain.text_files import json_object

_LFS = b"version https://git-lfs.github.com/spec/"
"""How the file begins that git has in place of a large one."""
_NAMES_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
"""Files that may name the processor's class, in the order in which transformers asks them."""
_PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "*processor_config.json",
)


NO_OWN_CODE = (
    "the model needs code that is in its directory, which mmtrain never runs: expected a model of a class that "
    "transformers has"
)


@dataclass(frozen=True, slots=True)
class DirectoryParts:
    """What a chat processor is made from."""

    tokenizer: Any
    """Shared with nobody: a processor switches padding on in the native part of its own."""
    processor: Any | None
    """None for a model that takes no images."""
    eos_ids: frozenset[int]
    """Every id that ends generation."""
    image_token_id: int | None


def model_directory(path: str) -> Path:
    """The directory that `path` is, or that the hub id `path` has in the local cache. Raises UserError."""
    directory = Path(path) if Path(path).is_dir() else _in_hub_cache(path)
    _check_fetched(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{visible(path)}: {_what_it_is(directory)}")
    return directory


def _in_hub_cache(path: str) -> Path:
    if Path(path).exists():
        raise UserError(f"{shown(path)}: expected a model directory, not a file")
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except HFValidationError:
        raise UserError(
            f"{shown(path, 4096)}: there is no such directory, and it is not a hub id (name/model)"
        ) from None
    except (OSError, ValueError):
        raise UserError(
            f"{shown(path, 4096)}: no such directory, and not in the local hub cache: run `hf download {path}`"
        ) from None


_NEEDED = ("config.json", "model*.safetensors", "tokenizer*.json")


def _check_fetched(directory: Path) -> None:
    """Raises UserError, naming the file, where git cloned a model without git-lfs, or a link of the hub's cache was
    copied without its file."""
    for file in sorted(directory.iterdir()):
        if file.is_symlink() and not file.exists() and any(map(file.match, _NEEDED)):
            raise UserError(
                f"{visible(str(file))}: a link that leads nowhere: copy the model again with the files that its links "
                "lead to (cp -rL)"
            )
    for file in files_in(directory, ("*.safetensors", "*.json", "*.model")):
        try:
            with open_regular(file) as opened:
                is_pointer = opened.read(len(_LFS)) == _LFS
        except OSError as error:
            raise UserError(f"{visible(str(file))}: cannot be read: {error.strerror}") from None
        if is_pointer:
            raise UserError(
                f"{visible(str(file))}: a pointer of git-lfs, not the file itself: run `git lfs pull` there"
            )


def _what_it_is(directory: Path) -> str:
    """What a directory without config.json has in place of a model, and what to do."""
    if (directory / "adapter_config.json").is_file():
        return "an adapter: expected its base model here, and the adapter as model.adapter or --adapter"
    if (directory / "model" / "config.json").is_file():
        return f"no config.json: the model is in {visible(str(directory / 'model'))}"
    if (directory / "adapter" / "adapter_config.json").is_file():
        return "a run with an adapter: expected its base model here, and the run as model.adapter or --adapter"
    gguf = files_in(directory, ("*.gguf",))
    other = f", found {shown(gguf[0].name)}, which only serves for inference" if gguf else ""
    return f"no config.json: expected a model in the transformers format{other}"


def files_in(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in `folder` that match any of the patterns, in the order of their names."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def processor_files(directory: Path) -> list[Path]:
    """The files that decide how text and images become ids: hashed, and copied to what a run exports."""
    return files_in(directory, _PROCESSOR_FILES)


def copy_processor(source: Path, target: Path, given_template: str | None, image_settings: Mapping[str, Any]) -> None:
    """Copy the processor's files from one directory to another, with the chat template and the settings of the image
    processor that are given in place of its own."""
    for path in processor_files(source):
        shutil.copyfile(path, target / path.name)
    write_image_settings(target, image_settings)
    if given_template is None:
        return
    for path in target.glob("chat_template*"):
        path.unlink()
    for path in target.glob("*processor_config.json"):  # a template in it would be used before the file
        settings = json_object(path)
        if settings.pop("chat_template", None) is not None:
            path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (target / TEMPLATE_FILE).write_text(given_template, encoding="utf-8")


def load_parts(directory: Path, given_template: str | None, image_settings: Mapping[str, Any]) -> DirectoryParts:
    """The parts of a chat processor; `given_template` and `image_settings` are in place of the model's own.

    Raises UserError with transformers' reason where the directory is broken or names code of its own."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if is_dual_encoder(config):
            raise UserError(
                "a dual encoder, which embeds texts and images and has no chats: expected a chat model; for this one "
                "use `mmtrain train` with objective.kind: contrastive, and `mmtrain eval retrieval`"
            )
        if takes_images(config) and getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "a model with an encoder for the prompt and a decoder for the reply: expected an image-text model that "
                "reads the prompt and writes the reply with one language model"
            )
        _check_chat_class(config)
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.pad_token is None:  # processors pad; what they add is taken off again
            tokenizer.pad_token = tokenizer.eos_token
        processor = _family_processor(directory, config, tokenizer, image_settings) if takes_images(config) else None
        eos_ids = _eos_ids(directory, config)
    except UserError:
        raise
    except Exception as error:  # a broken directory makes transformers raise anything
        if needs_own_code(error):
            raise UserError(NO_OWN_CODE) from None
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise UserError(f"the processor cannot be loaded: {kind}{one_line(error)}") from None
    for part in (tokenizer, processor):
        if part is not None and given_template is not None:
            part.chat_template = given_template
    if image_settings and processor is None:
        raise UserError("model.image_processor: this model takes no images: remove the key")
    # the constructor of a processor may add tokens, so the copy is made after it
    return DirectoryParts(copy.deepcopy(tokenizer), processor, eos_ids, _image_token_id(config))


def needs_own_code(error: Exception) -> bool:
    """Whether transformers raised this because it would have to run code of the directory."""
    return "trust_remote_code" in str(error)


def _check_chat_class(config: Any) -> None:
    """Raises UserError for a model for which transformers has no class that replies in chats."""
    own = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)  # some in this list are text models
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(own, "__name__", "").endswith("ForCausalLM")
    if takes_images(config) or is_text:
        return
    others = (getattr(config, name) for name in config.sub_configs)
    inner = next((one for one in others if takes_images(one) and one.model_type.startswith(config.model_type)), None)
    if inner is not None:
        name = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(inner)].__name__
        raise UserError(
            f"a model of the type {config.model_type}, of which only {inner.model_type} replies in chats: expected it "
            f"alone: {name}.from_pretrained(this directory).save_pretrained(another one), and the tokenizer's and "
            "processor's files copied"
        )
    raise UserError(
        f"a model of the type {config.model_type}, which neither replies in chats nor embeds texts and images "
        "apart: expected a chat model or a dual encoder"
    )


def takes_images(config: Any) -> bool:
    """Whether a model with this configuration takes images: those that take sound too have a list of their own, and
    some of the list for images are text models."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return hasattr(config, "vision_config") or hasattr(config, "image_token_id")
    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and hasattr(config, "vision_config")


def is_dual_encoder(config: Any) -> bool:
    """Whether a model with this configuration embeds texts and images apart, each with a tower of its own."""
    if takes_images(config) or type(config) not in MODEL_MAPPING:
        return False
    found = MODEL_MAPPING[type(config)]
    return all(hasattr(found, name) for name in ("get_text_features", "get_image_features"))


def _image_token_id(config: Any) -> int | None:
    """The token whose place an image's features take, from the configuration of the model or of its vision tower."""
    own: int | None = getattr(config, "image_token_id", None)
    return getattr(getattr(config, "vision_config", None), "image_token_id", None) if own is None else own


def load_image_processor(directory: Path, settings: Mapping[str, Any]) -> Any:
    """The image processor of a model, with these settings in place of its own. Raises UserError for a setting that it
    does not have or that changes nothing."""
    check_image_settings(functools.partial(make_image_processor, directory), settings, directory)
    return make_image_processor(directory, settings)


def make_image_processor(directory: Path, settings: Mapping[str, Any]) -> Any:
    """The same without a check. It is always Pillow's, so that pixels do not depend on what is installed."""
    return AutoImageProcessor.from_pretrained(
        directory, backend="pil", local_files_only=True, trust_remote_code=False, **copy.deepcopy(dict(settings))
    )


def _family_processor(directory: Path, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
    """The family's processor from its tokenizer and image processor alone.

    Loading the whole raises where torchvision is absent: its video part needs it.
    """
    parts: dict[str, Any] = {"tokenizer": tokenizer, "image_processor": load_image_processor(directory, settings)}
    family = processor_class(directory, config)

    class ImageTextProcessor(family):  # type: ignore[misc, valid-type]
        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [parts.get(name, _Absent()) for name in cls.get_attributes()]

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if isinstance(argument, _Absent) else super().check_argument_for_proper_class(name, argument)

    ImageTextProcessor.__name__ = family.__name__  # transformers names it where a package is missing
    processor = ImageTextProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not isinstance(getattr(processor, "image_token", None), str):
        raise UserError(f"{family.__name__} has no placeholder for an image in its text: this family is not supported")
    return processor


class _Absent(dict[str, Any]):
    """In the place of a processor's part for video or sound, whose settings some families read. A dict, because
    transformers prints a processor as JSON."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def processor_class(directory: Path, config: Any) -> Any:
    """The class that the directory names, as AutoProcessor looks for it, or else the one of the model's family. Raises
    UserError where there is none."""
    for name in _NAMES_PROCESSOR:
        if (directory / name).is_file():
            named = json_object(directory / name).get("processor_class")
            found = processor_class_from_name(named) if isinstance(named, str) else None
            if found is not None:
                return found
    family = PROCESSOR_MAPPING.get(type(config), None)
    if family is None:
        raise UserError(
            f"no processor for a model of the type {config.model_type}: expected processor_class, a class of "
            "transformers, in processor_config.json"
        )
    return family


def _eos_ids(directory: Path, config: Any) -> frozenset[int]:
    """Every id that ends generation, from generation_config.json where there is one."""
    path = directory / "generation_config.json"
    ids = json_object(path).get("eos_token_id") if path.is_file() else getattr(config, "eos_token_id", None)
    found = ids if isinstance(ids, list) else [ids]
    if any(id_ is not None and type(id_) is not int for id_ in found):
        raise UserError(f"eos_token_id is {shown(ids)}: expected a token id or a list of them")
    return frozenset(found) - {None}
