"""The losses of a batch, from one run of the towers and one of the fusion encoder.

Every loss is a pair of functions in the table `LOSSES`: `prepare` returns the sequences that the
loss puts into the fusion batch, `finish` turns their outputs into the loss and its metrics. To add
a loss, write such a pair, add it to the table, and give it a weight in `config.default`. The file
is long because all pairs are in it, so that they can be compared.

Shapes: B clips, L text positions, M masked positions, S fusion positions, d shared width.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stoa_jax import objectives
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import FusionPass, TextFeatures, VideoFeatures, VisionFeatures
from stoa_jax.models.stoa import Stoa, embed_text, embed_video

Passes = dict[str, FusionPass]
Result = tuple[Array, dict[str, Array]]  # a loss and its metrics


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs that the losses of one batch share."""

    model: Stoa
    batch: Mapping[str, Array]
    settings: Mapping[str, Any]  # section `loss` of the configuration
    active: set[str]
    video: VideoFeatures
    text: TextFeatures
    fusion_video: (
        VideoFeatures  # what fusion reads, detached from the gradient if the configuration says so
    )
    fusion_text: TextFeatures
    words: "Words | None"
    class_words: Array | None  # [classes], the last token id of each class's name
    keys: Mapping[str, Array]  # for random sampling, by loss
    dropout_keys: Mapping[str, Array | None]

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model."""
        return self.model.config

    @functools.cached_property
    def contrast(self) -> tuple[Array, Array]:
        """VTC loss and its logits [B texts, B videos], from which VTM samples."""
        return objectives.vtc(
            embed_video(self.video), embed_text(self.text), self.model.scale(), self.batch["valid"]
        )

    @functools.cached_property
    def alignments(self) -> dict[str, objectives.Alignment]:
        """The active alignments, OTA and ASP; the authors' code averages over both together."""
        return align(
            self.model,
            self.video,
            self.text,
            self.batch,
            self.settings,
            self.active,
            self.class_words,
        )

    def word_logits(self, features: Array, loss: str) -> Array:
        """Return language-model logits [..., W] over `words`, or over the whole vocabulary."""
        ids = None if self.words is None else self.words.ids
        return self.model.lm_logits(features, self.dropout_keys.get(loss), ids)

    def word_labels(self, tokens: Array) -> Array:
        """Return the columns of `word_logits` for token ids."""
        return tokens if self.words is None else self.words.column_of[tokens]


class Words(NamedTuple):
    """The part of the vocabulary among which language models choose."""

    ids: Array  # [W]
    column_of: Array  # [V], the index in `ids` of each id; undefined for other ids

    @classmethod
    def of(cls, ids: np.ndarray, vocab_size: int) -> "Words":
        """Build the index of a set of ids."""
        column_of = np.zeros(vocab_size, np.int32)
        column_of[ids] = np.arange(len(ids))
        return cls(jnp.asarray(ids), jnp.asarray(column_of))


class Loss(NamedTuple):
    """One loss: its fusion sequences, and its computation from their outputs.

    The second value of `prepare` is passed on to `finish`.
    """

    prepare: Callable[[Inputs], tuple[Passes, Any]]
    finish: Callable[[Inputs, Mapping[str, Array], Any], Result]


def joint_loss(
    model: Stoa,
    batch: Mapping[str, Array],
    key: Array,
    settings: Mapping[str, Any],
    *,
    words: np.ndarray | None = None,
    class_words: np.ndarray | None = None,
    video: VideoFeatures | None = None,
) -> Result:
    """Return the weighted sum of the active losses, and all losses and metrics by name.

    `settings` is the section `loss` of the configuration. Fine-tuning uses the same sum with other
    weights, so that an ablation switch means the same everywhere. With `words` [W], the language
    models choose only among these ids. With `class_words` [classes], the token ids of the class
    names, OTA prefers to match a trajectory to the noun that names it. `video` holds the clips'
    features if they were computed before.
    """
    video = encode_video(model, batch) if video is None else video
    inputs = _encode(model, video, batch, key, settings, words, class_words)
    losses = {name: loss for name, loss in LOSSES.items() if name in inputs.active}
    passes, carried = {}, {}
    for name, loss in losses.items():
        found, carried[name] = loss.prepare(inputs)
        passes |= found
    # All sequences have one shape and run as one batch, [B, passes, S, d].
    fused = model.fuse_passes(passes)
    total, metrics = jnp.float32(0), {}
    for name, loss in losses.items():
        value, found = loss.finish(inputs, fused, carried[name])
        total += settings[name] * value
        metrics |= {f"loss_{name}": value, **found}
    return total, metrics


def encode_video(model: Stoa, batch: Mapping[str, Array]) -> VideoFeatures:
    """Encode the clips of a batch, from pixels or from stored outputs of the vision tower."""
    objects = batch["boxes"], batch["classes"], batch["scores"]
    if "pixels" in batch:
        return model.encode_video(batch["pixels"], *objects)
    kept = {name.removeprefix("seen/"): x for name, x in batch.items() if name.startswith("seen/")}
    return model.encode_objects(VisionFeatures(kept.pop("frames"), kept), *objects)


def alignment_loss(
    model: Stoa,
    video: VideoFeatures,
    text: TextFeatures,
    batch: Mapping[str, Array],
    settings: Mapping[str, Any],
) -> Result:
    """Return the weighted sum of the active alignment losses, for tasks with their own loss."""
    active = active_losses(model.config, settings) - {"verb", "adjective"}
    total, metrics = jnp.float32(0), {}
    for name, found in align(model, video, text, batch, settings, active).items():
        total += settings[name] * found.loss
        metrics |= {f"loss_{name}": found.loss, **_alignment_metrics(name, found)}
    return total, metrics


def active_losses(c: ModelConfig, settings: Mapping[str, Any]) -> set[str]:
    """Return the losses with a nonzero weight, except those whose tokens the model lacks.

    A loss without a weight is off.
    """
    active = {name for name in LOSSES if settings.get(name)}
    if not c.objects:
        active -= {"ota", "verb", "adjective"}
    if not c.trajectory_verbs:
        active -= {"verb"}
    if not c.trajectory_adjectives:
        active -= {"adjective"}
    return active if c.actions else active - {"asp"}


def align(
    model: Stoa,
    video: VideoFeatures,
    text: TextFeatures,
    batch: Mapping[str, Array],
    settings: Mapping[str, Any],
    active: set[str],
    class_words: Array | None = None,
) -> dict[str, objectives.Alignment]:
    """Align trajectories with nouns (`ota`) and actions with verbs (`asp`), if active."""
    c, valid = model.config, batch["valid"]
    nouns, verbs = nouns_and_verbs(batch["tags"], settings)
    target = model.alignment_text(text, batch["tokens"])
    options = {"solver": settings["matching"], "none_weight": settings["none_weight"]}
    found, named = {}, None
    if class_words is not None:
        name = class_words[jnp.maximum(video.object_classes, 0)]  # [B, N]
        named = (name[:, :, None] == batch["tokens"][:, None]) & nouns[:, None]
    if active & {"ota", "verb", "adjective"}:
        found["ota"] = objectives.ota(
            video.objects,
            video.object_mask,
            target,
            nouns,
            text.sep_index,
            valid,
            similarity=c.alignment,
            named=named,
            **options,
        )
    if "asp" in active and c.alignment == "cosine":
        found["asp"] = objectives.asp(
            video.actions, target, verbs, text.sep_index, valid, **options
        )
    elif "asp" in active:
        # The authors' code uses Ø once, as for objects, and leaves out clips without objects.
        found["asp"] = objectives.ota(
            video.actions,
            jnp.ones(video.actions.shape[:2], bool),
            target,
            verbs,
            text.sep_index,
            valid & video.object_mask.any(-1) if c.objects else valid,
            similarity=c.alignment,
            **options,
        )
    if c.alignment == "dot":
        found = dict(zip(found, objectives.share_of_one_mean(*found.values()), strict=True))
    return found


def nouns_and_verbs(tags: Array, settings: Mapping[str, Any]) -> tuple[Array, Array]:
    """Return which positions [B, L] of a text end a noun, and which a verb."""
    nouns = tags == objectives.NOUN
    if settings["proper_nouns"]:
        nouns |= tags == objectives.PROPER_NOUN
    return nouns, tags == objectives.VERB


def _encode(
    model: Stoa,
    video: VideoFeatures,
    batch: Mapping[str, Array],
    key: Array,
    settings: Mapping[str, Any],
    words: np.ndarray | None,
    class_words: np.ndarray | None,
) -> Inputs:
    c = model.config
    text = model.encode_text(batch["tokens"])
    fusion_video, fusion_text = video, text
    if c.fusion_stop_gradient:
        stop = jax.lax.stop_gradient
        fusion_video = video._replace(frames=stop(video.frames), cls=stop(video.cls))
        fusion_text = text._replace(tokens=stop(text.tokens), sep=stop(text.sep))
    sampled = ("vtm", "mlm", "plm")
    dropout_keys: list[Array | None] = [None] * len(sampled)
    if c.head_dropout:
        dropout_keys = list(jax.random.split(jax.random.fold_in(key, 3), len(sampled)))
    return Inputs(
        model=model,
        batch=batch,
        settings=settings,
        active=active_losses(c, settings),
        video=video,
        text=text,
        fusion_video=fusion_video,
        fusion_text=fusion_text,
        words=None if words is None else Words.of(words, c.vocab_size),
        class_words=None if class_words is None else jnp.asarray(class_words),
        keys=dict(zip(sampled, jax.random.split(key, len(sampled)), strict=True)),
        dropout_keys=dict(zip(sampled, dropout_keys, strict=True)),
    )


# Video-text contrastive


def _no_passes(_: Inputs) -> tuple[Passes, None]:
    return {}, None


def _finish_vtc(inputs: Inputs, _: Mapping[str, Array], __: None) -> Result:
    return inputs.contrast[0], _retrieval_metrics(inputs)


def _retrieval_metrics(inputs: Inputs) -> dict[str, Array]:
    similarity = inputs.contrast[1]
    hit = similarity.argmax(-1) == jnp.arange(similarity.shape[0])
    return {"batch_r1": objectives.mean(hit, inputs.batch["valid"])}


# Video-text matching


def _prepare_vtm(inputs: Inputs) -> tuple[Passes, Array]:
    model, video, text = inputs.model, inputs.fusion_video, inputs.fusion_text
    negative_video, negative_text, exists = objectives.hard_negatives(
        inputs.keys["vtm"], inputs.contrast[1], inputs.batch["tokens"], inputs.batch["valid"]
    )
    wrong_video = jax.tree.map(lambda x: x[negative_video], video)
    wrong_text = jax.tree.map(lambda x: x[negative_text], text)
    passes = {
        "vtm_pair": model.pair_pass(video, text),
        "vtm_wrong_video": model.pair_pass(wrong_video, text),
        "vtm_wrong_text": model.pair_pass(video, wrong_text),
    }
    return passes, exists


def _finish_vtm(inputs: Inputs, fused: Mapping[str, Array], exists: Array) -> Result:
    valid = inputs.batch["valid"]
    outputs = [fused[f"vtm_{name}"] for name in ("pair", "wrong_video", "wrong_text")]
    logits = inputs.model.match_logits(jnp.stack(outputs), inputs.dropout_keys["vtm"])  # [3, B, 2]
    matches = jnp.array([True, False, False])[:, None] & valid
    counts = jnp.stack([valid, exists, exists])
    accuracy = objectives.mean(logits.argmax(-1) == matches, counts)
    metrics = {**_retrieval_metrics(inputs), "match_accuracy": accuracy}
    return objectives.vtm(logits, matches, counts), metrics


# Masked language modelling


def _prepare_mlm(inputs: Inputs) -> tuple[Passes, objectives.MaskedText]:
    model, text, tokens = inputs.model, inputs.text, inputs.batch["tokens"]
    positions = jnp.arange(tokens.shape[1])
    is_word = text.mask & (positions > 0) & (positions < text.sep_index[:, None])
    masked = objectives.mask_text(
        inputs.keys["mlm"],
        tokens,
        is_word,
        inputs.settings["mask_rate"],
        inputs.config.vocab_size,
        None if inputs.words is None else inputs.words.ids,
    )
    masked_features = model.encode_text(masked.tokens, masked.masked).tokens
    if inputs.config.fusion_stop_gradient:
        masked_features = jax.lax.stop_gradient(masked_features)
    x, mask = model.fusion_input(
        inputs.fusion_video, masked_features, text.mask, masked=masked.masked
    )
    read = inputs.config.visual_length + masked.positions
    return {"mlm": FusionPass(x, mask, read)}, masked


def _finish_mlm(
    inputs: Inputs, fused: Mapping[str, Array], masked: objectives.MaskedText
) -> Result:
    logits = inputs.word_logits(fused["mlm"], "mlm")
    valid = masked.valid & inputs.batch["valid"][:, None]
    loss, accuracy = objectives.mlm(logits, inputs.word_labels(masked.labels), valid)
    return loss, {"mlm_accuracy": accuracy}


# Prefix language modelling


def _prepare_plm(inputs: Inputs) -> tuple[Passes, Array]:
    text = inputs.fusion_text
    prefix = objectives.sample_prefix(inputs.keys["plm"], text.sep_index + 1)
    if inputs.config.prefix_lm == "position_query":  # a sequence of another shape runs separately
        return {}, prefix
    b, length, _ = text.tokens.shape
    attention = objectives.prefix_attention(prefix, length)
    x, mask = inputs.model.fusion_input(inputs.fusion_video, text.tokens, text.mask, attention)
    # The last position predicts nothing.
    read = jnp.broadcast_to(inputs.config.visual_length + jnp.arange(length - 1), (b, length - 1))
    return {"plm": FusionPass(x, mask, read)}, prefix


def _finish_plm(inputs: Inputs, fused: Mapping[str, Array], prefix: Array) -> Result:
    model, text = inputs.model, inputs.fusion_text
    if inputs.config.prefix_lm == "position_query":
        features = model.next_token_features(inputs.fusion_video, text.tokens)[:, :-1]
    else:
        features = fused["plm"]
    logits = inputs.word_logits(features, "plm")
    labels = inputs.word_labels(inputs.batch["tokens"])
    loss, accuracy = objectives.plm(logits, labels, text.mask, prefix, inputs.batch["valid"])
    return loss, {"plm_accuracy": accuracy}


# Object-text alignment and action set prediction


def _finish_alignment(name: str, inputs: Inputs, _: Mapping[str, Array], __: None) -> Result:
    found = inputs.alignments[name]
    return found.loss, _alignment_metrics(name, found)


def _alignment_metrics(name: str, found: objectives.Alignment) -> dict[str, Array]:
    return {f"{name}_none": found.none_share, f"{name}_agreement": found.agreement}


# Verb and adjective of a trajectory (beyond the paper)


def _finish_verb(inputs: Inputs, _: Mapping[str, Array], __: None) -> Result:
    nouns, verbs = nouns_and_verbs(inputs.batch["tags"], inputs.settings)
    verb = objectives.verb_after_noun(nouns, verbs)
    return _word_of_noun(inputs, "verb", inputs.video.verbs, verb)


def _finish_adjective(inputs: Inputs, _: Mapping[str, Array], __: None) -> Result:
    tags = inputs.batch["tags"]
    nouns, verbs = nouns_and_verbs(tags, inputs.settings)
    adjective = objectives.adjective_before_noun(nouns, verbs, tags == objectives.ADJECTIVE)
    return _word_of_noun(inputs, "adjective", inputs.video.adjectives, adjective)


def _word_of_noun(inputs: Inputs, name: str, features: Array, word_of_noun: Array) -> Result:
    """Predict from each trajectory a word that goes with the noun that OTA matched to it.

    The language model's embedding table is the classifier, so that the projection learns directions
    in which fusion reads and writes words.
    """
    positions = objectives.word_of_match(inputs.alignments["ota"].columns, word_of_noun)
    tokens = jnp.take_along_axis(inputs.batch["tokens"], jnp.maximum(positions, 0), 1)
    logits, labels = inputs.word_logits(features, name), inputs.word_labels(tokens)
    matched = positions >= 0
    loss = objectives.mean(objectives.cross_entropy(logits, labels), matched)
    return loss, {f"{name}_accuracy": objectives.mean(logits.argmax(-1) == labels, matched)}


LOSSES: dict[str, Loss] = {
    "vtc": Loss(_no_passes, _finish_vtc),
    "vtm": Loss(_prepare_vtm, _finish_vtm),
    "mlm": Loss(_prepare_mlm, _finish_mlm),
    "plm": Loss(_prepare_plm, _finish_plm),
    "ota": Loss(_no_passes, functools.partial(_finish_alignment, "ota")),
    "asp": Loss(_no_passes, functools.partial(_finish_alignment, "asp")),
    "verb": Loss(_no_passes, _finish_verb),
    "adjective": Loss(_no_passes, _finish_adjective),
}
