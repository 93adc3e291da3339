"""A chat with a model, in the terminal."""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from mmtrain.errors import UserError
from mmtrain.generate.prompts import prompt_for
from mmtrain.generate.sampling import Sampling
from mmtrain.generate.target import Loaded
from mmtrain.records.chat import Conversation, Image, Message, Part, Text, refused_at
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import visible

HELP = "/image FILE adds an image to your next message, /new starts a new chat, /quit ends it."


class Chat:
    """A conversation with a model, the replies of which become part of it."""

    def __init__(self, loaded: Loaded, sampling: Sampling, system: str | None = None) -> None:
        self._loaded, self._sampling = loaded, sampling
        self._start = () if system is None else (Message("system", (Text(system),)),)
        self._messages: tuple[Message, ...] = self._start

    def new(self) -> None:
        """Forget all turns."""
        self._messages = self._start

    def reply(self, question: str, images: Iterable[Image] = ()) -> str:
        """The model's reply to the question, with its images before the text. Raises UserError where it cannot be
        asked; the chat is then as it was."""
        parts: list[Part] = [*images, *([Text(question)] if question else [])]
        asked = (*self._messages, Message("user", tuple(parts)))
        with refused_at("generate"):
            prompt = prompt_for(self._loaded.encoder, Conversation(asked), Path())
            (reply,) = self._loaded.generator.replies([prompt], self._sampling)
        said = Message("assistant", (Text(reply.text),)) if reply.text else None
        self._messages = (*asked, said) if said else self._messages  # templates refuse empty replies
        return reply.text


def run_chat(chat: Chat, images: list[Image]) -> None:
    """Read messages from standard input until its end, and print the replies."""
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                chat.new()
                images = []
            elif command == "/image":
                images.append(read_image(Path(argument.strip())))
            elif line:
                print(chat.reply(line, images), flush=True)
                images = []
        except UserError as error:
            console.print(str(error))


def read_image(path: Path) -> Image:
    """The image of a file, wherever it is. Raises UserError where it cannot be read."""
    if path.is_dir():
        raise UserError(
            f"image {visible(str(path))}: that is a folder: name one file; docs/answers.md shows how to ask about all"
        )
    try:
        with open_regular(path) as file:
            return Image(str(path), file.read())
    except OSError as error:
        raise UserError(f"image {visible(str(path))}: cannot be read: {error.strerror}") from None
