"""Images as tensors, made here or by a process of their own."""

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from mmtrain.dataset.workers import Server, start_server
from mmtrain.encoding.images import FoundImage, decode
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.errors import STOP_SIGNALS, UserError
from mmtrain.records.chat import SampleError

ImageSamples = Sequence[Sequence[FoundImage]]
"""The images of each of some samples."""
Loaded = tuple[dict[str, Any], list[int]]
"""The tensors for the images, and the ids of their spans, one after the other."""


def load_images(processor: ChatProcessor, samples: ImageSamples, ids: Sequence[int] | None, raw: bool) -> Loaded:
    """See `ImageProcessor.inputs`. Raises SampleError where an image does not decode."""
    return processor.image_inputs([[decode(image) for image in images] for images in samples], ids, raw)


class ImageProcess:
    """A process that makes tensors of images. The values of tensors go from its memory into this process's in one copy
    by the system, into page-locked memory if `pinned`."""

    def __init__(self, origin: tuple[str, ProcessorSettings], raw: bool, pinned: bool) -> None:
        """Starts it, and does not wait until it is ready. See `start_server` for the thread in which this is to be
        called. Raises OSError."""
        self._server: Server = start_server(serve_images, *origin, raw)
        self._pinned = pinned

    def is_ready(self) -> bool:
        """Whether it has loaded its processor. Raises UserError where it has failed."""
        try:
            return self._server.connection.poll() and self._server.connection.recv() is None
        except (EOFError, OSError):
            raise self._ended() from None

    def load(self, samples: ImageSamples, ids: Sequence[int] | None) -> Loaded:
        """The same as `load_images` here. Raises UserError where the process has ended."""
        connection = self._server.connection
        try:
            connection.send((samples, ids))
            found = connection.recv()
            if isinstance(found, str):
                raise SampleError(found)
            inputs, shapes, laid_out = found
            for name, shape, dtype in shapes:
                inputs[name] = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
                _receive(connection, inputs[name])
        except (EOFError, OSError):
            raise self._ended() from None
        return inputs, laid_out

    def end(self) -> None:
        self._server.end()

    def _ended(self) -> UserError:
        code = self._server.exit_code()
        if code < 0:
            name = signal.Signals(-code).name
            return UserError(f"a process that decodes images was killed by {name}: free memory, or check the images")
        return UserError(f"a process that decodes images ended with exit code {code}")


def serve_images(connection: Connection, path: str, settings: ProcessorSettings, raw: bool) -> None:
    """Answer until the other side closes the connection: with the reason where images are refused."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # the process that it works for decides when to stop
    processor = load_processor(path, settings, tried=True)
    connection.send(None)
    while True:
        try:
            samples, ids = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            inputs, laid_out = load_images(processor, samples, ids, raw)
        except SampleError as error:
            connection.send(str(error))
            continue
        tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: None if name in tensors else value for name, value in inputs.items()}
        connection.send((others, [(name, value.shape, value.dtype) for name, value in tensors.items()], laid_out))
        for value in tensors.values():
            _send(connection, value)


def _bytes_of(value: Tensor) -> memoryview:
    return value.view(-1).view(torch.uint8).numpy().data if value.numel() else memoryview(b"")


def _send(connection: Connection, value: Tensor) -> None:
    left = _bytes_of(value)
    while left:
        left = left[os.write(connection.fileno(), left) :]


def _receive(connection: Connection, value: Tensor) -> None:
    left = _bytes_of(value)
    while left:
        count = os.readv(connection.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]
