"""The answers to all questions of data files, written to a file as they come."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from mmtrain.config.data_section import Source
from mmtrain.dataset.hashes import digest, model_fingerprints
from mmtrain.errors import UserError
from mmtrain.generate.answers_file import AnswersFile, Row
from mmtrain.generate.questions import Questions
from mmtrain.generate.replies import batched
from mmtrain.generate.sampling import Sampling
from mmtrain.generate.target import Loaded, Target
from mmtrain.model.adapter import CONFIG, WEIGHTS
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError
from mmtrain.records.data_files import find_data_files
from mmtrain.safe_text import visible


def answer_all(loaded: Loaded, data: Sequence[str], output: Path, batch_size: int, sampling: Sampling) -> None:
    """Write the answer to every question of the data files that `output` lacks.

    The batches are the same whether the command was stopped before or not, and so are the answers.
    Raises UserError for what the user can fix and StorageError where the file cannot be written.
    """
    progress = Progress()
    drops_reasoning = loaded.target.labels.reasoning == "drop"
    questions = Questions([Source(path=path) for path in data], loaded.encoder, drops_reasoning)
    answers = AnswersFile(output, _made_with(loaded.target, data, batch_size, sampling))
    if answers.done:
        progress.say(f"{visible(str(output))}: {len(answers.done):,} of {len(questions):,} answers are there")
    batches = [batch for batch in batched(len(questions), batch_size) if not answers.done.issuperset(batch)]
    with progress.task("answering", len(questions), len(answers.done)) as task:
        for batch in batches:
            rows = _rows(loaded, sampling, questions, batch)
            task.advance(answers.add(rows))
    progress.say(f"{visible(str(output))}: {len(questions):,} answers")


def _rows(loaded: Loaded, sampling: Sampling, questions: Questions, batch: Collection[int]) -> list[Row]:
    numbers = list(batch)
    prompts = [questions.prompt(number) for number in numbers]
    try:
        replies = loaded.generator.replies(prompts, sampling, seed=sampling.seed + numbers[0])
    except SampleError as error:
        raise UserError(f"{questions.place(numbers[0])} and the {len(numbers) - 1} after it: {error}") from None
    rows = []
    for number, reply in zip(numbers, replies, strict=True):
        question = questions.questions[number]
        rows.append(
            {
                "question_index": number,
                "place": questions.place(number),
                "turn": question.turn,
                "question": question.text,
                "reference": question.reference,
                "answer": reply.text,
                "is_complete": reply.is_complete,
            }
        )
    return rows


def _made_with(target: Target, data: Sequence[str], batch_size: int, sampling: Sampling) -> str:
    """A short hash of all that decides the answers: model, adapter, data, labels, options."""
    adapter = [] if target.adapter is None else [target.adapter / CONFIG, target.adapter / WEIGHTS]
    found = {
        **model_fingerprints(target.model, lambda: None),
        "adapter": digest(adapter),
        "data": digest([file for path in data for file in find_data_files(path)]),
        "labels": target.labels.model_dump(),
        "dtype": [target.dtype, target.quantization],
        "batch_size": batch_size,
        "sampling": asdict(sampling),
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
