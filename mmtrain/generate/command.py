"""`mmtrain generate`: a reply to one question, a chat, or the answers to all questions of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.atomic_files import check_writable
from mmtrain.errors import UserError
from mmtrain.generate.answer_all import answer_all
from mmtrain.generate.chat import Chat, read_image, run_chat
from mmtrain.generate.prompts import prompt_for
from mmtrain.generate.replies import batched
from mmtrain.generate.sampling import Sampling
from mmtrain.generate.target import Loaded, find_target, load_target
from mmtrain.records.chat import Conversation, Message, Text, refused_at
from mmtrain.runtime.processes import Runtime


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What the command line says."""

    path: str
    question: str | None = None
    images: tuple[Path, ...] = ()
    interactive: bool = False
    system: str | None = None
    data: tuple[str, ...] = ()
    output: Path | None = None
    base: str | None = None
    dtype: str | None = None
    batch_size: int = 16
    sampling: Sampling = field(default_factory=Sampling)

    def check(self) -> None:
        """Raises UserError, before anything is loaded, where the options do not go together."""
        self.sampling.check()
        if [self.question is not None, self.interactive, bool(self.data)].count(True) != 1:
            raise UserError("generate: expected a question, or -i for a chat, or --data FILE: give one of them")
        if bool(self.data) != (self.output is not None):
            raise UserError("generate: --data FILE and -o FILE go together: give both or none")
        if self.output is not None:
            check_writable(self.output)
        if self.data and (self.images or self.system):
            raise UserError("generate: --image and --system are for a question or a chat, not for --data: remove them")


def replies(options: GenerateOptions, questions: Sequence[str]) -> list[str]:
    """The reply to each question, all about the same images. Raises UserError for what the user can fix."""
    options.sampling.check()
    images = [read_image(path) for path in options.images]
    loaded = _loaded(options)
    system = () if options.system is None else (Message("system", (Text(options.system),)),)
    found: list[str] = []
    with refused_at("generate"):
        asked = [Conversation((*system, Message("user", (*images, Text(one))))) for one in questions]
        prompts = [prompt_for(loaded.encoder, conversation, Path()) for conversation in asked]
        for batch in batched(len(prompts), options.batch_size):
            seed = options.sampling.seed + batch[0]
            made = loaded.generator.replies([prompts[number] for number in batch], options.sampling, seed)
            found += [reply.text for reply in made]
    return found


def generate(options: GenerateOptions) -> None:
    """Write the answers, or chat. Raises UserError for what the user can fix."""
    images = [read_image(path) for path in options.images]
    loaded = _loaded(options)
    if options.output is None:
        run_chat(Chat(loaded, options.sampling, options.system), images)
    else:
        answer_all(loaded, options.data, options.output, options.batch_size, options.sampling)
        loaded.runtime.close()


def _loaded(options: GenerateOptions) -> Loaded:
    target = find_target(options.path, options.base, options.dtype)
    runtime = Runtime(target.dtype)
    if runtime.num_processes > 1 and options.output is None:
        raise UserError("generate: several processes are for --data FILE: start it in one")
    return load_target(target, runtime)
