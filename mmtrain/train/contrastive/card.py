"""README.md of a saved embedder: what it is, code that loads it, and how good it is."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from mmtrain import __version__
from mmtrain.config import Config
from mmtrain.train.model_card import (
    LOAD_ADAPTER,
    LOAD_MODEL,
    as_code,
    card_text,
    config_lines,
    figure_lines,
)

_SENTENCE_TRANSFORMERS = """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")  # this directory, or the id of this repository
image = Image.new("RGB", (224, 224), "red")  # yours: Image.open("photo.jpg")
texts = model.encode_query(["a red square", "a blue circle"])
images = model.encode_document([image])
print(model.similarity(texts, images))
"""
_SENTENCE_TRANSFORMERS_TEXT = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")  # this directory, or the id of this repository
queries = model.encode_query(["what is red?"])
documents = model.encode_document(["a red square", "a blue circle"])
print(model.similarity(queries, documents))
"""


def embedder_card(
    config: Config,
    auto_class: str,
    is_adapter: bool,
    takes_images: bool,
    num_pairs: int,
    instructions: Mapping[str, Set[str]] | None,
    step: int | None,
) -> str:
    """The card of an embedder. `auto_class`: the class of transformers that loads the base model; `instructions`: those
    of queries and documents, None where sentence-transformers cannot load the embedder. Other figures are read from the
    run's metrics, up to `step` if that is not the last."""
    tags = ["mmtrain", *(["lora"] if is_adapter else [])]
    library = "peft" if is_adapter else "transformers"
    if instructions is not None:
        library, tags = "sentence-transformers", [*tags, "sentence-transformers"]
    header: dict[str, Any] = {"library_name": library, "tags": tags}
    kind = "A LoRA adapter that makes a model an embedder" if is_adapter else "An embedder"
    usage = list(_usage(config, auto_class, is_adapter, takes_images, instructions))
    figures = [f"- training pairs: {num_pairs:,}", *figure_lines(config, Path(config.run.output_dir), step)]
    title = f"{kind}, trained by mmtrain {__version__}"
    return card_text(config.model.path, header, title, usage, [*figures, "", *config_lines(config)])


def _usage(
    config: Config, auto_class: str, is_adapter: bool, takes_images: bool, instructions: Mapping[str, Set[str]] | None
) -> Iterator[str]:
    packages = ["torch", "transformers", *(["peft"] if is_adapter else [])]
    if instructions is None:
        load = LOAD_ADAPTER if is_adapter else LOAD_MODEL
        yield from (f"Load it, after `pip install {' '.join(packages)}`:", "")
        yield from as_code(load.format(auto_class=auto_class, dtype=config.model.dtype))
        return
    packages = ["sentence-transformers", *packages[2:], *(["pillow torchvision"] if takes_images else [])]
    yield from ("", f"Load it, after `pip install {' '.join(packages)}`:", "")
    yield from as_code(_SENTENCE_TRANSFORMERS if takes_images else _SENTENCE_TRANSFORMERS_TEXT)
    yield from ("", 'An item can be a text, an image, or `{"image": image, "text": text}`.' if takes_images else "")
    for side, own in instructions.items():
        if len(own) > 1:
            yield f"Each {side} of the training data had one of {len(own):,} instructions: give one as `prompt=`."
    if config.objective.dims:
        widths = ", ".join(map(str, config.objective.dims))
        yield f'Embeddings can be cut to {widths} values: `SentenceTransformer(".", truncate_dim=N)`.'
