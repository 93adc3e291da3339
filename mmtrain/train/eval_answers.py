"""Asks the model some questions of one evaluation set during a run, and scores its answers."""

import json
from pathlib import Path
from typing import Any

from mmtrain.answers.figures import verdict
from mmtrain.answers.filled import FilledBatches
from mmtrain.answers.judged import JUDGED, JudgedAnswers
from mmtrain.answers.question_set import QuestionSet, Replies
from mmtrain.atomic_files import write_text
from mmtrain.config.run_section import EvalAnswers
from mmtrain.errors import storage_faults
from mmtrain.generate.over_processes import known_to_all
from mmtrain.generate.replies import Generator, Reply, batched
from mmtrain.model.load import without_training_settings
from mmtrain.progress import Progress
from mmtrain.runtime.device import device_faults
from mmtrain.safe_text import counted
from mmtrain.train.step import Learner

FOLDER = "answers"


class AnswersEvaluation:
    """The answers to `questions`, scored by the metrics of `mmtrain eval answers`, next to the best blind answers."""

    kind = "answers"

    def __init__(
        self,
        name: str,
        questions: QuestionSet,
        settings: EvalAnswers,
        generator: Generator,
        learner: Learner,
        output_dir: Path,
        progress: Progress,
    ) -> None:
        self.name, self.every = name, settings.every
        self._questions, self._batch_size = questions, 1 if learner.alone else settings.batch_size
        self._generator, self._learner, self._progress = generator, learner, progress
        self._folder = output_dir / FOLDER
        self._filled = FilledBatches(questions, generator) if learner.sharded else None

    def row(self, step: int) -> dict[str, Any] | None:
        """The figures; None where a signal asked to stop meanwhile. The answers are written to `answers/`."""
        replies = self._replies(step)
        if replies is None:
            return None
        judged = JudgedAnswers(self._questions.questions, {"model": {i: one.text for i, one in replies.items()}})
        gain = judged.gain("blind", JUDGED)
        assert gain is not None  # every question has an answer and a blind one
        if self._learner.runtime.is_main:
            self._write(step, judged, replies)
        return {
            "num_answers": len(replies),
            "metric": self._questions.questions[0].metric,
            "metrics": _means(judged, "model"),
            "blind": _means(judged, "blind"),
            "beats_blind": gain.interval[0] > 0,
            "verdict": verdict(gain),
        }

    def line(self, row: dict[str, Any]) -> str:
        """What is printed."""
        metric = row["metric"]
        score, blind = row["metrics"][metric], row["blind"][metric]
        return f"{metric} {score:.1%}, best blind answer {blind:.1%} ({counted(row['num_answers'], 'answer')})"

    def _replies(self, step: int) -> Replies | None:
        """Each process generates those of some batches; the batches are the same on any number of processes."""
        runtime, questions = self._learner.runtime, self._questions
        batches = self._own_batches()
        own: Replies = {}
        lower = "lower run.eval_answers.batch_size"
        with (
            self._progress.task("answering", len(batches)) as task,
            without_training_settings(self._learner.model),
            device_faults(lambda: f"step {step}, the answers to {self.name}", lower),
        ):
            for batch in batches:
                if runtime.should_break(together=self._filled is not None):
                    break
                own |= dict(zip(batch, self._replies_to(batch), strict=False))
                task.advance()
        num = len(questions.questions)
        found, stop_signal = known_to_all(own, num, questions.max_new_tokens, self._generator, runtime)
        return found if stop_signal is None else None

    def _own_batches(self) -> list[list[int]]:
        """Where weights are sharded every process has as many, some perhaps empty."""
        runtime = self._learner.runtime
        batches = [list(batch) for batch in batched(len(self._questions.questions), self._batch_size)]
        if self._filled is not None:
            batches += [[]] * (-len(batches) % runtime.num_processes)
        return batches[runtime.index :: runtime.num_processes]

    def _replies_to(self, batch: list[int]) -> list[Reply]:
        """The replies to a batch, perhaps followed by one that is not used."""
        if self._filled is None:
            return self._questions.replies(self._generator, batch)
        return self._questions.replies(self._generator, self._filled.fill(batch), self._filled.max_new_tokens)

    def _write(self, step: int, judged: JudgedAnswers, replies: Replies) -> None:
        """One file for each step; the rows of another set in it are kept."""
        path = self._folder / f"step-{step:06d}.jsonl"
        with storage_faults(f"{path}: it cannot be written"):
            self._folder.mkdir(exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            rows = [row for row in map(json.loads, lines) if row["source"] != self.name]
            rows += [self._example(number, judged, reply) for number, reply in replies.items()]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), durable=False)

    def _example(self, number: int, judged: JudgedAnswers, reply: Reply) -> dict[str, Any]:
        question = self._questions.questions[number]
        return {
            "source": self.name,
            "place": self._questions.places[number],
            "question": question.text,
            "reference": question.reference,
            "answer": reply.text,
            "score": float(judged.scores["model"][JUDGED][number]),
            "blind_answer": judged.blind[number],
            "is_complete": reply.is_complete,
        }


def _means(judged: JudgedAnswers, kind: str) -> dict[str, float]:
    """By metric; `judged` is each answer's score by the metric of its source."""
    found = {metric: judged.mean(kind, metric) for metric in (*judged.metrics, JUDGED)}
    return {metric: one[0] for metric, one in found.items() if one is not None}
