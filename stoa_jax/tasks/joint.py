"""One training with pre-training's losses, captions, questions and choices of the same clips.

Shapes: B clips, Q questions per clip, O options per clip, L text positions.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from stoa_jax import objectives
from stoa_jax.data import pipeline
from stoa_jax.data.records import OPTIONS
from stoa_jax.errors import UserError
from stoa_jax.joint_loss import encode_video, joint_loss
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import SplitEvaluator, TaskBase
from stoa_jax.tasks.captioning import CaptioningEvaluator
from stoa_jax.tasks.multiple_choice import ChoiceEvaluator, MultipleChoice, flat, match_scores
from stoa_jax.tasks.qa import QuestionAnswering, QuestionEvaluator
from stoa_jax.tasks.retrieval import RetrievalEvaluator


class Joint(TaskBase):
    """One model with all heads.

    The clips and captions are those of `data.sets`; `data.questions` and `data.choices` name sets
    of questions and choices about the same videos.
    """

    name = "joint"

    def model_config(self) -> ModelConfig:
        """Return the model's configuration with a class for each answer."""
        return self._questions.model_config()

    @functools.cached_property
    def _questions(self) -> QuestionAnswering:
        return QuestionAnswering(self._about(self.config.data.questions))

    @functools.cached_property
    def _choices(self) -> MultipleChoice:
        return MultipleChoice(self._about(self.config.data.choices))

    def _about(self, dataset: str) -> ConfigDict:
        """Return the configuration with another data set."""
        if not dataset:
            raise UserError(
                "config.data.questions and config.data.choices: name sets about the same clips, "
                "for example synthetic/qa and synthetic/multiple_choice"
            )
        c = self.config.copy_and_resolve_references()
        c.data.sets = ((dataset, 1.0),)
        return c

    @property
    def answers(self) -> tuple[str, ...]:
        """Classes of the answer head."""
        return self._questions.answers

    @answers.setter
    def answers(self, answers: tuple[str, ...]) -> None:
        self._questions.answers = answers

    def extras(self) -> dict[str, Any]:
        """Return the answers in the order of the classes."""
        return self._questions.extras()

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Describe batches of captions, without pixels if the vision tower's outputs are kept."""
        return dataclasses.replace(
            super().batch_spec(train), pixels=not (train and self.config.train.keep_vision)
        )

    def open_loader(self, start_step: int) -> "JointLoader":
        """Open batches of captions with questions and choices about the same clips."""
        c = self.config
        return JointLoader(
            self.open_split(self.train_set, c.data.train_split),
            self._questions.open_split(c.data.questions, c.data.train_split),
            self._choices.open_split(c.data.choices, c.data.train_split),
            self.batch_spec(train=True),
            answers=self.answers,
            questions=c.data.questions_per_clip,
            options=c.data.options_per_clip,
            batch_size=c.train.batch_size,
            seed=c.seed,
            prefetch=c.data.prefetch,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the joint loss plus the cross-entropies over answers and options."""
        video = encode_video(model, batch)
        total, watch = joint_loss(model, batch, key, self.settings, video=video, **self.loss_tables)
        valid = batch["valid"]
        if self.settings["answer"]:
            count = batch["questions"].shape[1]
            text = model.encode_text(flat(batch["questions"]))
            repeated = jax.tree.map(lambda x: jnp.repeat(x, count, 0), video)
            logits = model.answer_logits(model.pair(repeated, text))
            answer = batch["answers"].reshape(-1)  # -1: none
            counts = (answer >= 0) & jnp.repeat(valid, count)
            loss = objectives.mean(objectives.cross_entropy(logits, answer), counts)
            watch["loss_answer"] = loss
            watch["accuracy"] = objectives.mean(logits.argmax(-1) == answer, counts)
            total += self.settings["answer"] * loss
        if self.settings["choice"]:
            text = model.encode_text(flat(batch["options"]))
            scores = match_scores(model, video, text)  # [B, O], the first is right
            there = valid & batch["has_options"]
            right = jnp.zeros(len(valid), jnp.int32)
            loss = objectives.mean(objectives.cross_entropy(scores, right), there)
            watch["loss_choice"] = loss
            watch["choice_accuracy"] = objectives.mean(scores.argmax(-1) == 0, there)
            total += self.settings["choice"] * loss
        return total, watch

    @functools.cached_property
    def _evaluators(self) -> dict[str, SplitEvaluator]:
        evaluators = (
            QuestionEvaluator(self._questions),
            ChoiceEvaluator(self._choices),
            CaptioningEvaluator(self),
            RetrievalEvaluator(self),
        )
        return {evaluator.prefix: evaluator for evaluator in evaluators}


class JointLoader:
    """Batches of captions with questions and options about the same videos.

    Adds `questions` [B, Q, L] with classes `answers` [B, Q] (-1: none), `options` [B, O, L], the
    right one first, and `has_options` [B]. The choice of questions and options is a function of
    seed, step and row.
    """

    def __init__(
        self,
        captions: pipeline.Split,
        asked: pipeline.Split,
        choices: pipeline.Split,
        spec: pipeline.BatchSpec,
        *,
        answers: tuple[str, ...],
        questions: int,
        options: int,
        batch_size: int,
        seed: int,
        prefetch: int,
        start_step: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._loader = pipeline.Loader(
            captions,
            spec,
            batch_size=batch_size,
            seed=seed,
            train=True,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
            start_step=start_step,
        )
        if not 2 <= options <= OPTIONS:
            raise UserError(f"data.options_per_clip is {options}; choose from 2 to {OPTIONS}")
        self.steps_per_epoch = self._loader.steps_per_epoch
        self._captions, self._asked, self._choices = captions, asked, choices
        self._spec, self._seed, self._start = spec, seed, start_step
        self._counts = questions, options
        self._first = process_index * batch_size // process_count
        self._classes = {answer: i for i, answer in enumerate(answers)}
        self._by_id = [_clips_by_id(split) for split in (asked, choices)]

    def __iter__(self) -> Iterator[pipeline.Batch]:
        for step, batch in enumerate(self._loader, self._start):
            yield self._with_questions(step, batch)

    def _with_questions(self, step: int, batch: pipeline.Batch) -> pipeline.Batch:
        (questions, options), rows = self._counts, len(batch["index"])
        length = self._spec.text_length
        out = {
            "questions": np.zeros((rows, questions, length), np.int32),
            "answers": np.full((rows, questions), -1, np.int32),
            "options": np.zeros((rows, options, length), np.int32),
            "has_options": np.zeros(rows, bool),
        }
        for row, index in enumerate(batch["index"]):
            video = self._captions.metadata(int(index)).video_id
            rng = np.random.default_rng((self._seed, step, self._first + row))
            asked, choices = (by_id.get(video) for by_id in self._by_id)
            if asked is not None:
                tokens, _ = self._asked.tokens(asked, length, self._spec.vocab_size)
                known = self._asked.metadata(asked).answers
                which = rng.permutation(len(known))[:questions]
                out["questions"][row, : len(which)] = tokens[which]
                out["answers"][row, : len(which)] = [self._classes.get(known[i], -1) for i in which]
            if choices is not None:
                tokens, _ = self._choices.tokens(choices, length, self._spec.vocab_size)
                item = int(rng.integers(len(tokens) // OPTIONS))
                five = tokens[item * OPTIONS : (item + 1) * OPTIONS]
                right = int(self._choices.metadata(choices).answers[item])
                wrong = rng.permutation([i for i in range(OPTIONS) if i != right])
                out["options"][row] = five[[right, *wrong[: options - 1]]]
                out["has_options"][row] = True
        return {**batch, **out}


def _clips_by_id(split: pipeline.Split) -> dict[str, int]:
    return {split.metadata(i).video_id: i for i in range(len(split))}
