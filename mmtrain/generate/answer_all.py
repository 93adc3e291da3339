"""The answers to all questions of data files, written to a file as they come."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmtrain.config.data_section import Source
from mmtrain.dataset.hashes import digest, model_fingerprints
from mmtrain.generate.answers_file import AnswersFile, Row
from mmtrain.generate.over_processes import known_to_all
from mmtrain.generate.questions import Questions
from mmtrain.generate.replies import Reply, batched
from mmtrain.generate.sampling import Sampling
from mmtrain.generate.target import Loaded
from mmtrain.model.adapter import CONFIG, WEIGHTS
from mmtrain.model.named_model import NamedModel
from mmtrain.progress import Progress
from mmtrain.records.chat import refused_at
from mmtrain.records.data_files import find_data_files
from mmtrain.safe_text import counted, visible


def answer_all(loaded: Loaded, data: Sequence[str], output: Path, batch_size: int, sampling: Sampling) -> None:
    """Write the answer to every question of the data files that `output` lacks.

    The batches are the same on any number of processes, and whether the command was stopped before or not, and so are
    the answers. The first process writes them.
    Raises UserError for what the user can fix and StorageError where the file cannot be written.
    """
    runtime = loaded.runtime
    progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
    drops_reasoning = loaded.target.labels.reasoning == "drop"
    questions = Questions([Source(path=path) for path in data], loaded.encoder, drops_reasoning)
    made_with = _made_with(loaded.target, data, batch_size, sampling)
    answers = AnswersFile(output, made_with) if runtime.is_main else None
    done = frozenset(runtime.from_first("answers", lambda: sorted(answers.done if answers else ())))
    if done:
        progress.say(f"{visible(str(output))}: {len(done):,} of {counted(len(questions), 'answer')} are there")
    batches = [list(batch) for batch in batched(len(questions), batch_size) if not done.issuperset(batch)]
    with progress.task("answering", len(questions), len(done)) as task:
        for start in range(0, len(batches), runtime.num_processes):
            rows = _rows_of_all(loaded, sampling, questions, batches[start : start + runtime.num_processes])
            if answers is not None:
                task.advance(answers.add(rows))
    progress.say(f"{visible(str(output))}: {counted(len(questions), 'answer')}")


def _rows_of_all(loaded: Loaded, sampling: Sampling, questions: Questions, batches: Sequence[list[int]]) -> list[Row]:
    """The rows of one batch for each process, some perhaps without one."""
    numbers = [number for batch in batches for number in batch]
    own: dict[int, Reply] = {}
    for batch in batches[loaded.runtime.index :][:1]:
        made = zip(batch, _replies(loaded, sampling, questions, batch), strict=True)
        own = {numbers.index(number): reply for number, reply in made}
    found, _ = known_to_all(own, len(numbers), sampling.max_new_tokens, loaded.generator, loaded.runtime)
    return [_row(questions, number, found[position]) for position, number in enumerate(numbers)]


def _replies(loaded: Loaded, sampling: Sampling, questions: Questions, numbers: Sequence[int]) -> list[Reply]:
    prompts = [questions.prompt(number) for number in numbers]
    with refused_at(f"{questions.place(numbers[0])} and the {len(numbers) - 1} after it"):
        return loaded.generator.replies(prompts, sampling, seed=sampling.seed + numbers[0])


def _row(questions: Questions, number: int, reply: Reply) -> Row:
    question = questions.questions[number]
    return {
        "question_index": number,
        "place": questions.place(number),
        "turn": question.turn,
        "question": question.text,
        "reference": question.reference,
        "answer": reply.text,
        "is_complete": reply.is_complete,
    }


def _made_with(target: NamedModel, data: Sequence[str], batch_size: int, sampling: Sampling) -> str:
    """A short hash of all that decides the answers: model, adapter, data, labels, options."""
    settings = target.processor_settings
    adapter = [] if target.adapter is None else [target.adapter / CONFIG, target.adapter / WEIGHTS]
    found = {
        **model_fingerprints(target.path, lambda: None),
        "adapter": digest(adapter),
        "chat_template": digest([Path(settings.chat_template)] if settings.chat_template else []),
        "image_processor": dict(settings.image_processor),
        "data": digest([file for path in data for file in find_data_files(path)]),
        "labels": target.labels.model_dump(),
        "dtype": [target.dtype, target.quantization],
        "batch_size": batch_size,
        "sampling": asdict(sampling),
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
