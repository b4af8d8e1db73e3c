"""Multiple choice: which of five captions describes the clip, by match score.

Shapes: B clips, O options, L text positions.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from stoa_jax import objectives
from stoa_jax.data import pipeline
from stoa_jax.data.records import OPTIONS
from stoa_jax.metrics import calibration
from stoa_jax.models.features import TextFeatures, VideoFeatures
from stoa_jax.models.stoa import Stoa, embed_text, embed_video
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, encode_video, named, percent

RIGHT = "right"  # kind of the right option


class MultipleChoice(TaskBase):
    """Multiple choice by cross-entropy over the options' match scores, with OTA and ASP.

    It trains on a set of choices, or on captions; then wrong options are sampled from the batch.
    """

    name = "multiple_choice"
    kind = "multiple_choice"

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Describe batches of choices; in training also of captions."""
        spec = super().batch_spec(train)
        if train and not self.train_set.endswith("/multiple_choice"):
            spec = dataclasses.replace(spec, kind="caption")
        return spec

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the cross-entropy over the options of each clip."""
        valid = batch["valid"]
        if batch["tokens"].ndim == 2:
            tokens, real, answer = sample_options(key, batch["tokens"], valid)
            tags = batch["tags"]
        else:
            tokens, answer = batch["tokens"], batch["answer"]
            real = jnp.ones(tokens.shape[:2], bool)
            tags = jnp.take_along_axis(batch["tags"], answer[:, None, None], 1)[:, 0]
        video = encode_video(model, batch)
        text = model.encode_text(flat(tokens))
        scores = jnp.where(real, match_scores(model, video, text), -jnp.inf)  # [B, O]
        # cross_entropy leaves out absent options, whose score is -inf.
        loss = objectives.mean(objectives.cross_entropy(scores, answer), valid)
        right = scores.argmax(-1) == answer
        watch = {"loss_choice": loss, "accuracy": objectives.mean(right, valid)}

        right_text = jax.tree.map(
            lambda x: jnp.take_along_axis(
                x.reshape(-1, OPTIONS, *x.shape[1:]), answer.reshape(-1, *[1] * x.ndim), 1
            )[:, 0],
            text,
        )
        right_tokens = jnp.take_along_axis(tokens, answer[:, None, None], 1)[:, 0]
        batch = {**batch, "tokens": right_tokens, "tags": tags}
        return self.add_alignment(loss, model, video, right_text, batch, watch), watch

    def make_evaluator(self) -> "ChoiceEvaluator":
        """Measure accuracy over all choices of the split."""
        return ChoiceEvaluator(self)


def sample_options(key: Array, tokens: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Make choices from captions [B, L]: tokens [B, O, L], which options exist [B, O], the answer.

    A clip's own caption comes first, followed by up to four others of the batch that differ from
    it.
    """
    same = (tokens[:, None] == tokens[None]).all(-1)
    other = ~same & valid[None]
    order = jnp.where(other, jax.random.uniform(key, other.shape), -1.0)
    # In a batch of fewer than five, missing options are marked as absent.
    best, which = jax.lax.top_k(order, min(OPTIONS - 1, len(tokens)))
    short = OPTIONS - 1 - best.shape[1]
    best = jnp.pad(best, ((0, 0), (0, short)), constant_values=-1.0)
    which = jnp.pad(which, ((0, 0), (0, short)))
    options = jnp.concatenate([tokens[:, None], tokens[which]], 1)
    real = jnp.concatenate([jnp.ones((len(tokens), 1), bool), best >= 0], 1)
    return options, real, jnp.zeros(len(tokens), jnp.int32)


def flat(tokens: Array) -> Array:
    """Join clips and options: [B, O, L] -> [B O, L]."""
    return tokens.reshape(-1, tokens.shape[-1])


def match_scores(model: Stoa, video: VideoFeatures, text: TextFeatures) -> Array:
    """Return the log-odds [B, O] that each option (texts [B O]) matches its clip."""
    options = text.sep.shape[0] // video.cls.shape[0]
    video = jax.tree.map(lambda x: jnp.repeat(x, options, 0), video)
    logits = model.match_logits(model.pair(video, text))
    return (logits[:, 1] - logits[:, 0]).reshape(-1, options)


def both_scores(
    model: Stoa, batch: Mapping[str, Array], video: VideoFeatures
) -> tuple[Array, Array]:
    """Return the scores [B, O] of the options by fusion and by the dual encoder."""
    text = model.encode_text(flat(batch["tokens"]))
    by_fusion = match_scores(model, video, text)
    each = embed_text(text).reshape(*by_fusion.shape, -1)
    return by_fusion, jnp.einsum("bod,bd->bo", each, embed_video(video))


class ChoiceEvaluator(SplitEvaluator):
    """Accuracy over every choice of the split."""

    prefix = "multiple_choice"

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield accuracy in percent, by fusion and by the dual encoder."""
        self.predictions = {}
        answer = self.answers
        n = len(answer)
        for variant in self.variants:
            name = named(self.prefix, variant)
            video = self.encode(model, mesh, variant)
            fusion, dual = self.run(both_scores, model, mesh, video)
            probabilities = calibration.softmax(fusion / self.calibration.temperature)
            self.predictions[name] = {
                str(i): {
                    "video": self.choices[i][0],
                    "chosen": int(fusion[i].argmax()),
                    "right": int(answer[i]),
                    "probabilities": probabilities[i].tolist(),
                }
                for i in range(n)
            }
            by = f"percent right of {OPTIONS} options, ties counted against us; by"
            if "fusion/match" not in self.untrained:
                accuracy = percent(chosen_right(fusion, answer))
                yield Row(named(name, "accuracy"), accuracy, n, f"{by} match score")
                yield from self.by_kind(name, fusion)
            accuracy = percent(chosen_right(dual, answer))
            yield Row(named(name, "dual_encoder", "accuracy"), accuracy, n, f"{by} cosine")
        yield Row(named(self.prefix, "chance", "accuracy"), 100 / OPTIONS, n, "a random option")
        share = 100 * np.bincount(answer, minlength=OPTIONS).max() / n
        yield Row(
            named(self.prefix, "majority", "accuracy"),
            float(share),
            n,
            "always the position that is most often right",
        )

    def by_kind(self, name: str, scores: np.ndarray) -> Iterator[Row]:
        """Yield the accuracy against the wrong options of each kind, if the set has kinds."""
        if self.kinds is None:
            return
        rows = np.arange(len(scores))
        for kind in np.unique(self.kinds[self.kinds != RIGHT]):
            asked = (self.kinds == kind).any(1)
            others = np.where(self.kinds == kind, scores, -np.inf)
            others[rows, self.answers] = scores[rows, self.answers]
            yield Row(
                named(name, "kind", str(kind), "accuracy"),
                percent(chosen_right(others, self.answers)[asked]),
                int(asked.sum()),
                f"percent whose right option scores above all wrong ones of the kind {str(kind)!r}",
            )

    @functools.cached_property
    def kinds(self) -> np.ndarray | None:
        """The kind of each option [n, O], `RIGHT` for the right one; None: the set has no kinds."""
        if not self.task.eval_set.startswith("synthetic/"):
            return None
        from stoa_jax.data.synthetic import reading

        kinds = [
            [reading.option_kind(options[right], option) for option in options]
            for _, options, right in self.choices
        ]
        found = np.array(kinds, dtype=object).astype(str)
        found[np.arange(len(found)), self.answers] = RIGHT
        return found

    @functools.cached_property
    def answers(self) -> np.ndarray:
        """The position of the right option of each example, in the loader's order."""
        return np.array([right for _, _, right in self.choices])

    @functools.cached_property
    def choices(self) -> list[tuple[str, tuple[str, ...], int]]:
        """(video, options, position of the right one) of each example in the loader's order."""
        found = []
        for i in range(len(self.split)):
            m = self.split.metadata(i)
            for item, answer in enumerate(m.answers):
                options = m.texts[item * OPTIONS : (item + 1) * OPTIONS]
                found.append((m.video_id, options, int(answer)))
        return found[: self.limit or None]


def chosen_right(scores: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return whether the right option scores above all others [B]."""
    rows = np.arange(len(scores))
    others = scores.copy()
    others[rows, answer] = -np.inf
    return scores[rows, answer] > others.max(1)
