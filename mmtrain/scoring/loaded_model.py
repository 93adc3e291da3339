"""A model on its device, ready to compute the loss of a batch: the one way that training and all scoring go."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmtrain.dataset.batch import Batch, Loader, Samples
from mmtrain.dataset.image_loader import ImageLoader
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.head import HeadKind
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.loss import supervised_logits, supervised_nll
from mmtrain.model.root_module import RootModule
from mmtrain.model.vision import VisionInputs
from mmtrain.runtime.processes import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, and how batches are made for it and computed by it."""

    model: Any
    processor: ChatProcessor
    root: RootModule
    """The model, as everything is computed through it."""
    make_inputs: InputMaker
    head_kind: HeadKind
    packing: bool
    """The samples of a micro-batch share one row."""
    alone: bool
    """A micro-batch has one sample."""
    runtime: Runtime
    load_images: ImageLoader

    def batches(self, samples: Samples, microbatches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """The batch of each micro-batch of sample indices, made ahead. Raises UserError naming a sample that fails."""
        store = self.make_inputs.store
        loader = Loader(samples, self.processor, self.packing, store, ROW_MULTIPLE, self.load_images)
        return loader.batches(microbatches)

    def nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(num_supervised,) twice: the negative log-likelihood of each supervised token, and whether it was the most
        likely one."""
        with self.runtime.autocast():
            found: tuple[Tensor, Tensor] = self.root(supervised_nll, self.head_kind, self.make_inputs(batch), batch)
        return found

    def logits(self, batch: Batch) -> Callable[[slice], Tensor]:
        """From a range of the batch's supervised tokens to their logits, (num_tokens, vocabulary) in float32."""
        with self.runtime.autocast():
            found: Callable[[slice], Tensor] = self.root(
                supervised_logits, self.head_kind, self.make_inputs(batch), batch
            )
        return found


def image_loader(
    processor: ChatProcessor, runtime: Runtime, vision: VisionInputs, say: Callable[[str], None]
) -> ImageLoader:
    """What decodes images for this process: its share of the cores, less one that feeds a GPU."""
    on_gpu, share = runtime.device.type == "cuda", runtime.num_cores
    max_processes = share - 1 if on_gpu or share < 2 else share
    return ImageLoader(processor, max_processes, on_gpu, vision.normalization is not None, say)
