"""The section `data`: the samples that are trained on and evaluated."""

import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from mmtrain.config.section import Count, FilePath, GivenPath, Marker, Section

RecordFormat = Literal[
    "auto",
    "openai",
    "messages",
    "conversations",
    "conversation",
    "gemini",
    "alpaca",
    "query",
    "question",
    "prompt",
    "prefix",
    "input",
    "texts",
    "caption",
]


LETTERS, LETTER = "letters", "letter"
_SPEC = re.compile(f"(0[1-9][0-9]?|{LETTERS}|{LETTER})?")
"""After the name of a column in a template: zeros before a number; a list as `A. …`, `B. …`; a number from 0 as `A`."""


class Source(Section):
    path: GivenPath
    """A file of records (.json, .jsonl, .parquet, .arrow, .csv, .tsv, .tar and so on), a folder of them, a glob, or
    `hub:owner/name`: a data set of the Hugging Face hub that is in the local cache."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Only the files of this split, such as `train`, `validation` or `test`: of a folder with several, by the names of
    files and folders as in the library `datasets`."""
    root: FilePath | Annotated[tuple[FilePath, ...], Strict(False), Field(min_length=1)] | None = None
    """What image paths are relative to and may not leave: a folder, a zip or tar file, or a list of them, in which an
    image is looked for in order; without it the data file's own folder."""
    format: RecordFormat = "auto"
    """The shape of the records, as docs/data.md lists them, or `auto`: detected for each record by its keys."""
    fields: dict[str, str] = Field(default={})
    """Which column of the data is which key of a record: `{image: img, question: q, answer: a}`. A value with braces
    is a template of several columns: `{prompt: "{context}\\n{question}"}`, with zeros before a number:
    `{image: "{image_id:012}.jpg"}`, and choices as letters: `{question: "{q}\\n{choices:letters}", answer:
    "{label:letter}"}`. `answers.0` is the first of a list, `body.messages` a key in an object; name the
    rest of such a column in `ignore_fields`."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """What the user asks in every record, for records of an image and a `caption` or `text` alone: `Describe the
    image.`"""
    image_mark: Annotated[str, Field(min_length=1)] | None = None
    """The text that stands for an image in the records; without it `<image>`, or another mark that docs/data.md lists
    and that a record with images has instead."""
    group: Annotated[str, Field(min_length=1)] | None = None
    """Contrastive training: the key that names a record's group. Pairs of a group are never negatives of each other."""
    max_samples: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """How many of its samples are used at most: a random choice, the same in every run."""

    @property
    def roots(self) -> tuple[str, ...]:
        """The entries of `root`, none without it."""
        return () if self.root is None else (self.root,) if isinstance(self.root, str) else self.root

    @field_validator("fields")
    @classmethod
    def _check_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        for source in fields.values():
            pieces = list(string.Formatter().parse(source))  # raises ValueError on a brace without its other
            if not source or any(
                name == "" or conversion or not _SPEC.fullmatch(spec or "") for _, name, spec, conversion in pieces
            ):
                raise ValueError('expected the name of a column, or a template such as "{context} {question}"')
        return fields


class TrainSource(Source):
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Passes over the source in one epoch: 2.5 is two whole passes and a random half."""
    batch: Literal["mixed", "own"] = "mixed"
    """`own`: the source has steps of its own. For contrastive training: a model can tell samples of different sources
    apart by their style alone."""


MetricName = Literal[
    "exact_match",
    "vqa_match",
    "anls",
    "relaxed_accuracy",
    "multiple_choice",
    "token_f1",
    "chrf",
    "json_accuracy",
    "box_iou",
    "box_accuracy",
]


class EvalSource(Source):
    path: FilePath = ""
    """As for `data.train`; required, except with `from: train`."""
    from_: Annotated[Literal["train"] | None, Field(alias="from")] = None
    """`train`: samples of `data.train` that are held out, so they are not trained on. Give `share` with it and no
    `path`."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the samples that is held out with `from: train`. Which ones follows from their content, so they
    stay the same when data is added. Samples with the same image are on the same side, and pairs also with the same
    text."""
    name: str | None = None
    """The name of the source in reports; without it the file's name, or `held-out`."""
    metric: MetricName | None = None
    """How `mmtrain eval answers` scores a generated answer (see docs/answers.md); without it a metric that suits the
    source's reference answers is chosen and named."""

    @property
    def title(self) -> str:
        """Its name in reports."""
        return self.name or (Path(self.path).name if self.path else "held-out")

    @model_validator(mode="after")
    def _is_a_path_or_held_out(self) -> "EvalSource":
        if (self.from_ is None) != (self.share is None):
            raise ValueError("`from: train` and `share` belong together: give both, or a path")
        if self.share is None and not self.path:
            raise ValueError("needs a path, or `from: train` with a share")
        keys = ("path", "split", "root", "format", "fields", "prompt", "image_mark")
        given = [key for key in keys if getattr(self, key) != type(self).model_fields[key].get_default()]
        if self.share is not None and given:
            raise ValueError(f"`from: train` reads what data.train says: remove {', '.join(given)}")
        return self


class Streaming(Section):
    window: Count = 1000
    """Records that are read, checked and shuffled together. A window reads from 64 files at most."""


def _streaming(value: Any) -> Any:
    """`true` is the section with its defaults, `false` none."""
    return {} if value is True else None if value is False else value


def in_full(sources: Any) -> Any:
    """Sources as a list of sections: a path alone, or among others, is the section that has only this path."""
    listed = [sources] if isinstance(sources, str | dict) else sources
    if not isinstance(listed, list | tuple):
        return listed
    return [{"path": source} if isinstance(source, str) else source for source in listed]


_NEEDS_ALL = "does not work with streaming, because it needs all samples before the first step"


class Data(Section):
    train: Annotated[
        tuple[TrainSource, ...],
        Strict(False),
        Field(min_length=1),
        BeforeValidator(in_full, str | TrainSource | Annotated[list[str | TrainSource], Field(min_length=1)]),
    ]
    """What is trained on: a path, a section, or a list of them."""
    eval: Annotated[
        tuple[EvalSource, ...],
        Strict(False),
        Marker.SAME_RESULT,
        BeforeValidator(in_full, str | EvalSource | list[str | EvalSource]),
    ] = ()
    """What is evaluated during training and never trained on: a path, a section, or a list of them.
    With `{from: train, share: 0.05}` a share of the training data is held out."""
    streaming: Annotated[Streaming | None, BeforeValidator(_streaming, bool | Streaming | None)] = None
    """Read the training data as the run goes, for data that is too large to be read before the first step: `true`, or
    a section. Needs `train.steps`. The order is random by file and within a window; docs/data.md says what differs."""
    dedup: bool = False
    """Leave out each training sample that is the same as an earlier one: the same tokens, the same labels and the same
    image files. It is listed in dropped.jsonl."""
    max_length: Count = 4096
    """The longest allowed sample, in tokens, image placeholders included."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a longer sample: refuse it before the first step, or leave it out and list it in
    dropped.jsonl. It is never truncated."""
    on_fault: Literal["error", "skip"] = "error"
    """What to do with a sample that cannot be used, such as one with a broken image: refuse it before the first step,
    or leave it out and list it with its reason in dropped.jsonl. One that is too long follows `too_long`."""
    max_skipped: Annotated[int, Field(ge=0, le=10**9)] | Annotated[float, Field(gt=0, lt=1)] = 0.01
    """How many samples of a set `on_fault: skip` leaves out at most: a number of them, or below 1 a share. With more
    the run is refused. With `streaming` the number is for each epoch, and the share is of what was read so far."""
    decode_images: Annotated[bool, Marker.SAME_RESULT] = True
    """Decode every image once before the first step, and remember those that are sound. Without it a damaged image
    stops the run at the step that uses it."""
    ignore_fields: Annotated[tuple[str, ...], Strict(False)] = ()
    """Keys of records, turns and content parts to ignore. Any other key that is neither understood nor plainly
    metadata (`id`, `source`, `timestamp` and the like) is refused by line and name."""

    @model_validator(mode="after")
    def _can_be_streamed(self) -> "Data":
        if self.streaming is None:
            return self
        if self.dedup:
            raise ValueError(f"dedup {_NEEDS_ALL}: remove duplicates from the files")
        if any(source.from_ for source in self.eval):
            raise ValueError(f"`from: train` of eval {_NEEDS_ALL}: give eval files of its own")
        for number, source in enumerate(self.train):
            if source.max_samples is not None:
                raise ValueError(f"train.{number}.max_samples {_NEEDS_ALL}: name fewer files")
            if source.weight != 1:
                raise ValueError(f"train.{number}.weight {_NEEDS_ALL}: name a file as often as it is to be read")
            if source.batch == "own":
                raise ValueError(f"train.{number}.batch: own {_NEEDS_ALL}: set it to mixed")
        return self

    @model_validator(mode="after")
    def _holds_out_once(self) -> "Data":
        if sum(source.share is not None for source in self.eval) > 1:
            raise ValueError("more than one entry of eval is `from: train`: keep one")
        return self
