"""`mmtrain eval perplexity`: the number, its parts, what the pictures are worth, and comparisons of adapters."""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

from mmtrain.config import Config
from mmtrain.config.schema import EvalSource
from mmtrain.dataset.encode_all import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.validate import check_samples
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.evaluate.changed_images import CHANGES, ChangedPictures, encodable
from mmtrain.evaluate.report import image_verdict, print_comparison, print_report
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.components import is_as_loaded
from mmtrain.model.family import probe_family
from mmtrain.model.inputs import InputMaker
from mmtrain.model.load import length_limit, load_model
from mmtrain.model.root import Root
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring import statistics
from mmtrain.scoring.image_cache import find_features, make_store
from mmtrain.scoring.packing import choose_packing
from mmtrain.scoring.scorer import Scorer
from mmtrain.scoring.scores import Scores

BASE = "base"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the config."""

    adapter: Path | None = None
    compare: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    images: bool = False
    json: bool = False

    @property
    def adapters(self) -> list[str]:
        """The directories of all adapters that are asked for, each once."""
        alone = () if self.adapter is None else (str(self.adapter),)
        return [path for path in dict.fromkeys((*alone, *self.compare)) if path != BASE]


class Evaluation:
    """The samples of a config's evaluation sources, and scores of models on them."""

    def __init__(self, config: Config, options: Options) -> None:
        sources: Sequence[EvalSource] = config.data.eval
        if options.data:
            sources = [EvalSource(path=path) for path in options.data]
        if not sources:
            raise UserError("data.eval: there are no sources in the config; give some, or --data FILE")
        self._adapters = {path: read_adapter(path) for path in options.adapters}
        self._config = config
        self._runtime = Runtime(config.model.dtype)
        self._console = Console(stderr=True, quiet=not self._runtime.is_main)
        self._say = functools.partial(self._console.print, markup=False, highlight=False, soft_wrap=True)
        self._processor = load_processor(config.model.path)
        self._limit = length_limit(config.model.path, config.data.max_length)
        self.names = [source.name or Path(source.path).name for source in sources]
        spec = EncodingSpec.of(config, sources)
        self.encoder = spec.encoder(self._processor)
        self.samples, checked = check_samples(spec, self._processor, self._limit, config.data.too_long)
        self.numbers = checked.used
        self.dropped = [{"place": str(self.samples.place(index)), "reason": why} for index, why in checked.dropped]
        for entry in self.dropped:
            self._say(f"dropped: {entry['place']}: {entry['reason']}")
        self._lengths: list[int] = checked.num_tokens[self.numbers].tolist()
        self._base = load_model(config.model.path, config.model.dtype, self._processor)
        self._base.requires_grad_(False)
        self._family = probe_family(self._base, self._processor, self._say)
        self._base.to(self._runtime.device)
        self._packing = choose_packing(self._base, self._processor, config, self._runtime, self._say)
        self._store = make_store(config, self._runtime, self._say)
        self._model: Any = self._base
        self._num_loaded = 0

    @property
    def is_main(self) -> bool:
        return self._runtime.is_main

    def scores(self) -> Scores:
        return self._score(Scorer(self.samples, self.encoder, self.numbers, self._lengths))

    def changed_scores(self, change: Any) -> tuple[Scores, Indices, int] | None:
        """The scores with changed pictures, the samples they are of, and how many with pictures are left out because
        they cannot be changed so; None where no sample can."""
        with_images = self.numbers[[bool(self.samples.records.conversation(int(n)).images) for n in self.numbers]]
        changed = ChangedPictures(self.samples, self.encoder, change, with_images)
        numbers, lengths = encodable(
            changed, with_images if changed.numbers is None else changed.numbers, self._limit.num_tokens
        )
        if not len(numbers):
            return None
        scores = self._score(Scorer(self.samples, self.encoder, numbers, lengths, changed))
        return scores, numbers, len(with_images) - len(numbers)

    @contextmanager
    def adapter(self, path: str | None) -> Iterator[None]:
        """Put the adapter at `path` on the base model; None or `base`: the base model alone."""
        if path is None or path == BASE:
            if isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    yield
            else:
                yield
            return
        self._model = load_adapter(self._model, self._adapters[path], f"adapter_{self._num_loaded}")
        self._num_loaded += 1
        yield

    def _score(self, scorer: Scorer) -> Scores:
        self._model.to(self._runtime.device)
        same = is_as_loaded(self._model, self._family.components, ("vision", "projector"))  # with any adapter
        store = self._store if same else None
        features = find_features(self._model, self._processor, self._runtime, store, self._say)
        if same and features is None:
            self._store = None  # it is the same with every adapter
        make_inputs = InputMaker(self._model, self._processor, features)
        scores = scorer.score(
            Root(self._model),
            self._family.head_kind,
            make_inputs,
            self._runtime,
            self._config.run.microbatch_tokens,
            self._packing,
            console=self._console,
        )
        assert scores is not None  # only a run that is supervised stops on the way
        return scores


def eval_perplexity(config: Config, options: Options) -> None:
    """Evaluate or compare, and print. Raises UserError for what the user can mend."""
    evaluation = Evaluation(config, options)
    row: Any = _compare(evaluation, options.compare) if options.compare else _report(evaluation, options)
    if not evaluation.is_main:
        return
    if options.json:
        print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        return
    console = Console(highlight=False, emoji=False, markup=False)
    if options.compare:
        print_comparison(row, console)
    else:
        print_report(row, console)


def _report(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    path = str(options.adapter) if options.adapter is not None else None
    with evaluation.adapter(path):
        scores = evaluation.scores()
        least, most = statistics.extremes(scores)
        return {
            **statistics.summary(scores),
            "dropped": evaluation.dropped,
            "sources": statistics.by_source(scores, evaluation.names),
            "turns": statistics.by_answer(scores),
            "modality": statistics.by_image(scores),
            "lengths": statistics.by_length(scores),
            "least_likely": [_placed(evaluation, *entry) for entry in least],
            "most_likely": [_placed(evaluation, *entry) for entry in most],
            "images": _images(evaluation, scores) if options.images else None,
        }


def _placed(evaluation: Evaluation, number: int, nll: float) -> dict[str, Any]:
    return {"place": str(evaluation.samples.place(number)), "nll": nll}


def _images(evaluation: Evaluation, right: Scores) -> dict[str, Any]:
    """What the right pictures are worth against others, grey ones and none, over the samples that can be changed."""
    found: dict[str, Any] = {}
    for change in CHANGES:
        changed = evaluation.changed_scores(change)
        if changed is not None:
            scores, numbers, num_left_out = changed
            found[change] = {
                **statistics.difference(right.of(numbers), scores),
                "nll": statistics.summary(scores)["nll"],
                "num_samples": len(numbers),
                "num_left_out": num_left_out,
            }
    if not found:
        raise UserError("--images: no sample has an image that could be changed")
    return {**found, "verdict": image_verdict(found)}


def _compare(evaluation: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each adapter (or `base`), with its paired difference from the first."""
    rows: list[dict[str, Any]] = []
    first: Scores | None = None
    for name in names:
        with evaluation.adapter(name):
            scores = evaluation.scores()
        found = statistics.summary(scores)
        difference = None if first is None else statistics.difference(first, scores)
        first = scores if first is None else first
        kept = {key: found[key] for key in ("perplexity", "nll", "token_accuracy", "bits_per_byte", "interval")}
        rows.append({"name": name, **kept, "difference": difference})
    return rows
