"""Question answering: a classifier over the training answers, on the fused question.

Shapes: B questions, L text positions, C answers, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from stoa_jax import objectives
from stoa_jax.data import pipeline
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import TextFeatures, VideoFeatures
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, encode_video, named, percent
from stoa_jax.text import Tokenizer

TOP = 5  # answers per question in `predictions.json`
QUESTION_WORDS = ("what", "who", "how", "when", "where")  # kinds of questions on real videos


class QuestionAnswering(TaskBase):
    """Question answering by cross-entropy over the frequent answers, with OTA and ASP."""

    name = "qa"
    kind = "qa"

    def model_config(self) -> ModelConfig:
        """Return the model's configuration with a class for each answer."""
        config = super().model_config()
        if config.answer_head == "first_piece":  # classifies over the whole vocabulary
            return dataclasses.replace(config, num_answers=0)
        kept = self.config.eval.num_answers or config.num_answers
        if not kept:
            raise UserError(
                "config.model.num_answers: 0; question answering needs a class for each answer, "
                "for example --config.model.num_answers=1500"
            )
        return dataclasses.replace(config, num_answers=kept)

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Describe batches of questions with their answers as classes."""
        return dataclasses.replace(super().batch_spec(train), answers=self.answers)

    @functools.cached_property
    def answers(self) -> tuple[str, ...]:
        """The most frequent training answers; equally frequent ones in alphabetical order."""
        split = self.open_split(self.train_set, self.config.data.train_split)
        counts = collections.Counter(
            answer for i in range(len(split)) for answer in split.metadata(i).answers
        )
        ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
        return tuple(ordered[: self.model_config().num_answers or None])

    @functools.cached_property
    def first_pieces(self) -> np.ndarray:
        """The first BPE piece of each answer, [answers]."""
        tokenizer = Tokenizer(self.model_config().vocab_size)
        return np.array([tokenizer.encode(answer)[1] for answer in self.answers])

    def extras(self) -> dict[str, Any]:
        """Return the answers in the order of the classes."""
        return {"answers": list(self.answers)}

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the cross-entropy of questions whose answer is a class."""
        video = encode_video(model, batch)
        text = model.encode_text(batch["tokens"])
        answer = batch["answer"]  # -1: not among the classes
        if model.config.answer_head == "first_piece":
            answer = jnp.where(answer >= 0, jnp.asarray(self.first_pieces)[answer], -1)
        logits = answer_logits(model, video, text, key)
        known = batch["valid"] & (answer >= 0)
        loss = objectives.mean(objectives.cross_entropy(logits, answer), known)
        right = logits.argmax(-1) == answer
        watch = {"loss_answer": loss, "accuracy": objectives.mean(right, batch["valid"])}
        return self.add_alignment(loss, model, video, text, batch, watch), watch

    def make_evaluator(self) -> "QuestionEvaluator":
        """Measure accuracy over all questions of the split."""
        return QuestionEvaluator(self)


def answer_logits(
    model: Stoa, video: VideoFeatures, text: TextFeatures, key: Array | None = None
) -> Array:
    """Return logits over the classes, or over first pieces as the authors do [B, C or V]."""
    if model.config.answer_head == "first_piece":
        return model.first_piece_logits(video, text, key)
    return model.answer_logits(model.pair(video, text))


def best_answers(
    model: Stoa, batch: Mapping[str, Array], video: VideoFeatures
) -> tuple[Array, Array]:
    """Return the likeliest classes, or first pieces, of each question, best first.

    Both results are [B, TOP]: their probabilities and their ids.
    """
    text = model.encode_text(batch["tokens"])
    logits = answer_logits(model, video, text).astype(jnp.float32)
    return jax.lax.top_k(jax.nn.softmax(logits, -1), min(TOP, logits.shape[-1]))


class QuestionEvaluator(SplitEvaluator):
    """Accuracy over every question of the split."""

    task: "QuestionAnswering"
    prefix = "qa"
    needs = ("fusion/answer",)

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield accuracy in percent; an answer outside the classes is wrong."""
        answers = self.task.answers
        questions = self.questions
        wanted = [answer for _, _, answer in questions]
        n = len(wanted)
        by_piece = model.config.answer_head == "first_piece"
        tokenizer = Tokenizer(model.config.vocab_size)

        @functools.cache
        def first(text: str) -> int:
            return int(tokenizer.encode(text)[1])

        classes = f"classifier over {len(answers)} training answers"
        if by_piece:
            classes = "over the whole vocabulary"
        self.predictions = {}
        for variant in self.variants:
            name = named(self.prefix, variant)
            video = self.encode(model, mesh, variant)
            probabilities, ids = self.run(best_answers, model, mesh, video)
            # A head may have more classes than answers; the others have no meaning.
            spell = (lambda i: tokenizer.decode([i])) if by_piece else answers.__getitem__
            listed = [
                [
                    (spell(i), float(p))
                    for i, p in zip(row, shares, strict=True)
                    if by_piece or i < len(answers)
                ]
                or [("", 0.0)]
                for row, shares in zip(ids, probabilities, strict=True)
            ]
            predicted = [row[0][0] for row in listed]
            pieces = list(ids[:, 0]) if by_piece else [first(answer) for answer in predicted]
            self.predictions[name] = {
                f"{i}: {video}: {question}": {
                    "answer": listed[i][0][0],
                    "right": right,
                    "probability": listed[i][0][1],
                    "top": [list(pair) for pair in listed[i]],
                }
                for i, (video, question, right) in enumerate(questions)
            }
            yield Row(
                named(name, "accuracy"),
                percent([a == b for a, b in zip(predicted, wanted, strict=True)]),
                n,
                f"percent exact, {classes}; an answer outside it counts as wrong",
            )
            yield from self.by_kind(name, [a == b for a, b in zip(predicted, wanted, strict=True)])
            yield Row(
                named(name, "authors", "accuracy"),
                percent([a == first(b) for a, b in zip(pieces, wanted, strict=True)]),
                n,
                f"as STOA-VLP's authors: percent whose first BPE piece is right; {classes}",
            )
        yield Row(
            named(self.prefix, "majority", "accuracy"),
            percent([answer == answers[0] for answer in wanted]),
            n,
            f"for every question the most frequent training answer, {answers[0]!r}",
        )
        yield Row(
            named(self.prefix, "covered"),
            percent([answer in answers for answer in wanted]),
            n,
            "percent of questions whose answer is one of the classes",
        )

    def by_kind(self, name: str, right: Sequence[bool]) -> Iterator[Row]:
        """Yield the accuracy of each kind of question."""
        kinds = [self.kind_of(question) for _, question, _ in self.questions]
        for kind in dict.fromkeys(sorted(kinds)):
            chosen = [r for r, k in zip(right, kinds, strict=True) if k == kind]
            yield Row(
                named(name, "kind", kind, "accuracy"),
                percent(chosen),
                len(chosen),
                f"percent exact, questions of the kind {kind!r}",
            )

    def kind_of(self, question: str) -> str:
        """Return the kind of a question: its form in the synthetic world, else its first word."""
        if self.task.eval_set.startswith("synthetic/"):
            from stoa_jax.data.synthetic import reading

            return reading.question_kind(question)
        word = question.lower().split(maxsplit=1)[:1]
        return word[0] if word and word[0] in QUESTION_WORDS else "other"

    @functools.cached_property
    def questions(self) -> list[tuple[str, str, str]]:
        """(video, question, answer) of each example in the loader's order."""
        found = []
        for i in range(len(self.split)):
            m = self.split.metadata(i)
            found += [(m.video_id, *pair) for pair in zip(m.texts, m.answers, strict=True)]
        return found[: self.limit or None]
