"""Makes the directory of a trained embedder one that sentence-transformers loads as it is.

It reads the weights and the processor as transformers does, whether a whole model or an adapter; four small files say
which class to load, which of its outputs to take, and how one vector is made of it. They are as its version 6 saves
them: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.contrastive.embedder import SentenceModules

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
NORMALIZE = "2_Normalize/config.json"
SETTINGS = "config_sentence_transformers.json"
FILES = (MODULES, TRANSFORMER, POOLING, NORMALIZE, SETTINGS)
_CLASSES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "2_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def write_sentence_files(folder: Path, modules: SentenceModules, width: int, prompts: Mapping[str, str]) -> None:
    """`width`: values of an embedding. `prompts`: the instructions of a `query` and of a `document`. Raises OSError."""
    used = [path for path in _CLASSES if modules.pooling is not None or path != "1_Pooling"]
    entries = [{"idx": n, "name": str(n), "path": path, "type": _CLASSES[path]} for n, path in enumerate(used)]
    output = "sentence_embedding" if modules.pooling is None else "token_embeddings"
    _write(folder / MODULES, entries)
    _write(
        folder / TRANSFORMER,
        {
            "transformer_task": modules.task,
            "modality_config": dict(modules.methods),
            "module_output_name": output,
            "processing_kwargs": dict(modules.processing),
        },
    )
    if modules.pooling is not None:
        pooling = {"embedding_dimension": width, "pooling_mode": modules.pooling, "include_prompt": True}
        _write(folder / POOLING, pooling)
    _write(folder / NORMALIZE, dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding"))
    settings = {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / SETTINGS, {"model_type": "SentenceTransformer", **settings})


def delete_sentence_files(folder: Path) -> None:
    """Raises OSError."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for folder_of_module in filter(None, _CLASSES):
        if (folder / folder_of_module).is_dir():
            (folder / folder_of_module).rmdir()


def name_processor(folder: Path, name: str) -> None:
    """Let the tokenizer's settings name the processor's class, if no file does: the directory of an adapter has no
    config.json, by which transformers would find it. Raises OSError."""
    files = [folder / f"{kind}_config.json" for kind in ("processor", "preprocessor", "tokenizer")]
    settings = {path: json.loads(path.read_text(encoding="utf-8")) for path in files if path.is_file()}
    if files[-1] in settings and not any("processor_class" in one for one in settings.values()):
        _write(files[-1], settings[files[-1]] | {"processor_class": name})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
