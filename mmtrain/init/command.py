"""`mmtrain init`: writes a commented config that works at once."""

import math
import shlex
from contextlib import suppress

from mmtrain.atomic_files import check_new
from mmtrain.config import load_config
from mmtrain.config.data_section import Source
from mmtrain.config.yaml_file import yaml_text
from mmtrain.encoding.directory import is_dual_encoder
from mmtrain.errors import UserError, grouped, storage_faults
from mmtrain.init.options import InitOptions
from mmtrain.init.pairs import pair_config_text
from mmtrain.init.survey import Survey, survey
from mmtrain.model.load import load_config as load_model_config
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.record_set import RecordSet
from mmtrain.safe_text import counted, visible

_TEXT = """\
# Written by `mmtrain init`. `mmtrain config show {output}` prints all keys, docs/config.md explains them.

model:
  path: {model}
{template}  dtype: {dtype}
{quantization}
tune:                            # each component: frozen, lora or full; what is not named is frozen
  language: {{mode: lora, rank: 16, alpha: 32}}

data:
  train: {train}
{evaluation}
  max_length: {max_length}                # tokens; {length_reason}

train:
  epochs: {epochs}                       # {samples}: {steps}
  batch_size: {batch_size}                  # samples in one optimizer step
  learning_rate: 1.0e-4
  warmup_steps: {warmup_steps}

run:
  output_dir: {output_dir}
  microbatch_tokens: {microbatch_tokens}        # lower it when memory runs out: the result stays the same
  activation_checkpointing: auto    # as the GPU's memory requires; `mmtrain plan` shows what fits
  eval_every: {every}
  checkpoint_every: {every}
"""


def needs_prompt(model: str, train: str) -> bool:
    """Whether the model chats, and the first record of the data says what it replies and not to what. Raises
    UserError."""
    if is_dual_encoder(load_model_config(model)):
        return False
    try:
        RecordSet([Source(path=train)]).conversation(0)
    except SampleError:
        with suppress(SampleError):
            RecordSet([Source(path=train, prompt="?")]).conversation(0)
            return True
    return False


def init(options: InitOptions) -> None:
    """Write a config to a new file. Raises UserError if the model, the data or an option cannot be used."""
    output, progress = options.output, Progress()
    name = visible(str(output))
    check_new(output, "file")
    if is_dual_encoder(load_model_config(options.model)):
        for option, value in (("--chat-template", options.chat_template), ("--prompt", options.prompt)):
            if value is not None:
                raise UserError(f"{option}: a dual encoder has no chats: leave it out")
        text, faults = pair_config_text(options)
    else:
        found = survey(options)
        text, faults = config_text(found, options), list(found.faults)
    for line in grouped(faults):
        progress.say(f"warning: {line}")
    with storage_faults(f"{name}: it cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    load_config(output)
    word = shlex.quote(name)
    progress.say(f"wrote {name}; next: mmtrain inspect-labels {word} --all, then mmtrain train {word}")


def config_text(found: Survey, options: InitOptions) -> str:
    """The config. Chosen from the survey: type and quantization of the weights, lengths, batch size, steps, memory."""
    batch_size = min(32, 2 ** int(math.log2(max(1, found.num_samples / 20))))
    epochs = 3 if found.num_samples < 10_000 else 1
    share = 0.0 if found.gpu_memory is None else 2 * found.num_parameters / found.gpu_memory
    max_length, template = _max_length(found), options.chat_template
    length_reason = "the longest sample has" if found.is_complete else "the longest of some samples has"
    return _TEXT.format(
        **options.values(found.num_samples, batch_size, epochs),
        template="" if template is None else f"  chat_template: {yaml_text(template)}\n",
        dtype="bfloat16" if found.has_bfloat16 else "float32",
        quantization="  quantization: nf4              # the weights fill the GPU otherwise\n" if share > 0.6 else "",
        train=_source(options.train, options.prompt),
        evaluation=_evaluation(found, options.evaluation, options.prompt),
        max_length=max_length,
        length_reason=f"{length_reason} {found.longest:,}",
        samples=counted(found.num_samples, "sample"),
        microbatch_tokens=max(8192 if found.gpu_memory is not None else 2048, max_length),
    )


def _max_length(found: Survey) -> int:
    """With a quarter more than the longest sample if not all were encoded; a multiple of 256."""
    wanted = found.longest if found.is_complete else 1.25 * found.longest
    return min(found.max_positions, 256 * math.ceil(wanted / 256))


def _source(path: str, prompt: str | None) -> str:
    return yaml_text(path) if prompt is None else f"{{path: {yaml_text(path)}, prompt: {yaml_text(prompt)}}}"


def _evaluation(found: Survey, evaluation: str | None, prompt: str | None) -> str:
    if evaluation is not None:
        return f"  eval: {_source(evaluation, prompt)}"
    share = 0.1 if found.num_samples < 2_000 else min(0.05, 500 / found.num_samples)
    return f"  eval: {{from: train, share: {share:.2g}}}  # held out and not trained on, or the path of a file"
