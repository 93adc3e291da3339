"""What the commands do, as Python functions, for notebooks and scripts. Each imports its modules when it is called.

The command line calls them too. Everything runs in this process, on one device. A fault that the user can correct is a
`mmtrain.errors.UserError`, whose `faults` are the lines that the command line prints.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmtrain.runtime.environment import set_environment

if TYPE_CHECKING:
    from mmtrain.config import Config
    from mmtrain.encoding.encode import Encoded

__all__ = ["encode", "evaluate", "generate", "load_config", "train"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> "Config":
    """The config in a YAML file, with `section.key=value` overrides. Raises UserError with every fault."""
    from mmtrain.config import load_config as load

    return load(Path(path), overrides)


def train(config: "Config", fresh: bool = False, accept_change: Sequence[str] = ()) -> Path:
    """Start or resume the run of a config; gives its directory.

    `fresh`: delete an earlier run in `run.output_dir` and start over. `accept_change`: keys that changed since the
    checkpoint from which the run resumes all the same. Raises UserError, and Stopped if a signal stops the run.
    """
    set_environment()
    from mmtrain.report.after_run import report_after_run
    from mmtrain.train.folder import reserved
    from mmtrain.train.run import train as run

    folder = Path(config.run.output_dir)
    with reserved(config, fresh):
        if run(config, accept_change):
            report_after_run(folder)
    return folder


def encode(config: "Config", records: Sequence[Mapping[str, Any]], root: str | Path = ".") -> "list[Encoded]":
    """Each record, in any of the shapes of a data file, as training gets it: `ids`, and `supervised`, which is true for
    the tokens that are trained on; both (num_tokens,). `root` is the folder of the images.

    A record whose replies the chat template rewrites once others follow gives several. Raises UserError for a record
    that cannot be trained on.
    """
    set_environment()
    from mmtrain.dataset.encoding_spec import EncodingSpec
    from mmtrain.encoding.load import processor_of
    from mmtrain.records.chat import refused_at

    processor = processor_of(config.model)
    spec = EncodingSpec.of(config, config.data.train)
    encoder = spec.encoder(processor)
    found = []
    for number, record in enumerate(records):
        with refused_at(f"record {number}"):
            found += [encoder.encode(one, Path(root)) for _, one in encoder.sequences(spec.read(record))]
    return found


def evaluate(
    config: "Config",
    adapter: str | Path | None = None,
    measure: Literal["answers", "perplexity", "retrieval"] = "answers",
) -> dict[str, Any]:
    """What `mmtrain eval answers --json`, `eval perplexity --json` or `eval retrieval --json` prints, for `data.eval`.

    `adapter`: the directory of a run or of an adapter; without it the base model is evaluated. Raises UserError.
    """
    set_environment()
    path = None if adapter is None else Path(adapter)
    if measure == "perplexity":
        from mmtrain.evaluate import command as perplexity

        return perplexity.perplexity_figures(config, perplexity.PerplexityOptions(path))
    if measure == "retrieval":
        from mmtrain.retrieval import command as retrieval

        return retrieval.retrieval_figures(config, retrieval.RetrievalOptions(path))[0]
    from mmtrain.answers import command as answers

    return answers.answer_figures(config, answers.AnswersOptions(path))[0]


def generate(
    path: str | Path,
    questions: Sequence[str],
    images: Sequence[str | Path] = (),
    base: str | None = None,
    *,
    system: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The reply to each question, all about the same images: the most likely one, or by the options, which have the
    names that transformers gives them.

    `path`: the directory of a run, an adapter or a model; `base`: the base model of an adapter, without it the one that
    it names; `system`: a system prompt; `dtype`: of the weights, without it the run's, or bfloat16. Raises UserError.
    """
    set_environment()
    from mmtrain.generate.command import GenerateOptions, replies
    from mmtrain.generate.sampling import Sampling

    sampling = Sampling(max_new_tokens, do_sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    found = tuple(Path(image) for image in images)
    return replies(
        GenerateOptions(str(path), images=found, system=system, base=base, dtype=dtype, sampling=sampling), questions
    )
