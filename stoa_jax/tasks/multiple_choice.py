"""Multiple choice: which of five captions belongs to the clip, by match score.

Shapes: B clips, O options, L text places.
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
from stoa_jax.joint_loss import active_losses, align
from stoa_jax.models.stoa import Stoa, TextFeatures, VideoFeatures, embed_text, embed_video
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, encode_video, named
from stoa_jax.tasks.qa import percent


class MultipleChoice(TaskBase):
    """Cross-entropy over the options' match scores, and OTA and ASP where they are on.

    It trains on a set of choices, or on captions: then the wrong options are drawn from the batch.
    """

    name = "multiple_choice"
    kind = "multiple_choice"

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Choices; in training also captions."""
        spec = super().batch_spec(train)
        if train and not self.train_set.endswith("/multiple_choice"):
            spec = dataclasses.replace(spec, kind="caption")
        return spec

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Which option is it?"""
        valid = batch["valid"]
        if batch["tokens"].ndim == 2:
            tokens, real, answer = draw_options(key, batch["tokens"], valid)
            tags = batch["tags"]
        else:
            tokens, answer = batch["tokens"], batch["answer"]
            real = jnp.ones(tokens.shape[:2], bool)
            tags = jnp.take_along_axis(batch["tags"], answer[:, None, None], 1)[:, 0]
        video = encode_video(model, batch)
        text = model.encode_text(flat(tokens))
        scores = jnp.where(real, match_scores(model, video, text), -jnp.inf)  # [B, O]
        # cross_entropy leaves out -inf of options that are not there.
        loss = objectives.mean(objectives.cross_entropy(scores, answer), valid)
        right = scores.argmax(-1) == answer
        watch = {"loss_choice": loss, "accuracy": objectives.mean(right, valid)}

        on = active_losses(model.config, self.settings) & {"ota", "asp"}
        if on:
            own = jax.tree.map(
                lambda x: jnp.take_along_axis(
                    x.reshape(-1, OPTIONS, *x.shape[1:]),
                    answer.reshape(-1, *[1] * x.ndim),
                    1,
                )[:, 0],
                text,
            )
            batch = {**batch, "tags": tags}
            losses = align(model.config, video, own, batch, self.settings, on, watch)
            for name, value in losses.items():
                loss += self.settings[name] * value
                watch[f"loss_{name}"] = value
        return loss, watch

    @functools.cached_property
    def _evaluators(self) -> dict[str, SplitEvaluator]:
        return {"multiple_choice": ChoiceEvaluator(self)}

    def evaluators(self) -> dict[str, SplitEvaluator]:
        """Accuracy over all choices of the split."""
        return self._evaluators


def draw_options(key: Array, tokens: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Captions [B, L] as choices: tokens [B, O, L], which options are there [B, O], the answer.

    A caption's own comes first; four others of the batch follow, none equal to it.
    """
    same = (tokens[:, None] == tokens[None]).all(-1)
    other = ~same & valid[None]
    order = jnp.where(other, jax.random.uniform(key, other.shape), -1.0)
    # In a batch of fewer than five, options repeat as absent ones.
    best, which = jax.lax.top_k(order, min(OPTIONS - 1, len(tokens)))
    short = OPTIONS - 1 - best.shape[1]
    best = jnp.pad(best, ((0, 0), (0, short)), constant_values=-1.0)
    which = jnp.pad(which, ((0, 0), (0, short)))
    options = jnp.concatenate([tokens[:, None], tokens[which]], 1)
    real = jnp.concatenate([jnp.ones((len(tokens), 1), bool), best >= 0], 1)
    return options, real, jnp.zeros(len(tokens), jnp.int32)


def flat(tokens: Array) -> Array:
    """[B, O, L] -> [B O, L]."""
    return tokens.reshape(-1, tokens.shape[-1])


def match_scores(model: Stoa, video: VideoFeatures, text: TextFeatures) -> Array:
    """How much more likely than not each option [B O] belongs to its clip [B, O], in logits."""
    options = text.sep.shape[0] // video.cls.shape[0]
    video = jax.tree.map(lambda x: jnp.repeat(x, options, 0), video)
    logits = model.match_logits(model.fuse(video, text.tokens, text.mask), text.sep_index)
    return (logits[:, 1] - logits[:, 0]).reshape(-1, options)


def both_scores(model: Stoa, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """By fusion and by the dual encoder, how well each option fits [B, O]."""
    video = encode_video(model, batch)
    text = model.encode_text(flat(batch["tokens"]))
    by_fusion = match_scores(model, video, text)
    each = embed_text(text).reshape(*by_fusion.shape, -1)
    return by_fusion, jnp.einsum("bod,bd->bo", each, embed_video(video))


class ChoiceEvaluator(SplitEvaluator):
    """Every choice of the split."""

    prefix = "multiple_choice"

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Accuracy in percent, by fusion and by the dual encoder."""
        self.predictions = {}
        for variant in self.variants:
            name = named(self.prefix, variant)
            (fusion, dual), answer = self.run(both_scores, model, mesh, variant)
            self.predictions[name] = {
                str(i): {"chosen": int(chosen), "right": int(right)}
                for i, (chosen, right) in enumerate(zip(fusion.argmax(1), answer, strict=True))
            }
            by = f"percent right of {OPTIONS} options, ties counted against us; by"
            n = len(answer)
            if "fusion/match" not in self.untrained:
                accuracy = percent(chosen_right(fusion, answer))
                yield Row(named(name, "accuracy"), accuracy, n, f"{by} match score")
            accuracy = percent(chosen_right(dual, answer))
            yield Row(named(name, "dual_encoder", "accuracy"), accuracy, n, f"{by} cosine")
        yield Row(named(self.prefix, "chance", "accuracy"), 100 / OPTIONS, n, "a random option")
        share = 100 * np.bincount(answer, minlength=OPTIONS).max() / n
        yield Row(
            named(self.prefix, "majority", "accuracy"),
            float(share),
            n,
            "always the place where the right option stands most often",
        )


def chosen_right(scores: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Is the right option above all others? [B]."""
    rows = np.arange(len(scores))
    others = scores.copy()
    others[rows, answer] = -np.inf
    return scores[rows, answer] > others.max(1)
