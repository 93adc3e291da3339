"""The samples of evaluation sources, checked, and the same with other images."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import SelectedSources
from mmtrain.dataset.validate import CheckedSamples, FaultPolicy, check_samples
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress
from mmtrain.scoring.changed_images import Change, ChangedImages, encodable


def sources_to_evaluate(config: Config, data: Sequence[str]) -> Sequence[EvalSource]:
    """The files `data`, or without any the sources of `data.eval`. Raises UserError where there are none either."""
    sources = [EvalSource(path=path) for path in data] or config.data.eval
    if not sources:
        raise UserError("data.eval: there are no sources in the config; give some, or --data FILE")
    return sources


@dataclass(frozen=True, slots=True)
class EvalSamples:
    """The samples of a list of evaluation sources."""

    samples: StoredSamples
    checked: CheckedSamples
    encoder: Encoder
    names: tuple[str, ...]
    """Of the sources, in order."""
    max_length: int
    """Tokens of the longest sample that can be used."""

    @classmethod
    def of(
        cls, config: Config, sources: Sequence[EvalSource], processor: ChatProcessor, progress: Progress
    ) -> "EvalSamples":
        """Encode and check them as `config` says. Raises UserError where a sample cannot be used."""
        limit = length_limit(config.model.path, config.data.max_length)
        selected = SelectedSources.for_evaluation(config.data, sources)
        spec, policy = EncodingSpec.of(config, selected.sources), FaultPolicy.of(config.data)
        samples, checked = check_samples(spec, processor, limit, policy, progress, selected.choices)
        return cls(samples, checked, spec.encoder(processor), selected.names, limit.num_tokens)

    @property
    def indices(self) -> Indices:
        """Of the samples that are used."""
        return self.checked.used

    @property
    def dropped(self) -> list[dict[str, str]]:
        """Where each sample is that is left out, and why."""
        return [{"place": str(self.samples.place(index)), "reason": why} for index, why in self.checked.left_out]

    def with_images(self) -> Indices:
        """Of the used samples that have images."""
        return self.indices[[bool(self.samples.records.conversation(int(i)).images) for i in self.indices]]

    def changed(self, change: Change) -> tuple[ChangedImages, Indices, list[int]]:
        """The samples with their images swapped, grey or left out, the indices of those that can be changed so and are
        short enough then, and the tokens of each."""
        with_images = self.with_images()
        changed = ChangedImages(self.samples, self.encoder, change, with_images)
        possible = with_images if changed.indices is None else changed.indices
        return changed, *encodable(changed, possible, self.max_length)
