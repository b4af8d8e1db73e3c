"""The six losses of a batch, over one run of the towers and one of the fusion encoder.

Shapes: B clips, L text places, M masked places, S fusion places, d shared width.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax import objectives
from stoa_jax.models import released
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import (
    Fused,
    Stoa,
    TextFeatures,
    VideoFeatures,
    embed_text,
    embed_video,
)

LOSSES = ("vtc", "vtm", "mlm", "plm", "ota", "asp")


def joint_loss(
    model: Stoa, batch: Mapping[str, Array], key: Array, settings: Mapping
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the losses that `settings` switches on, and what to watch.

    `settings` is the configuration's section `loss`. Fine-tuning uses the same sum with other
    weights, so a switch means the same everywhere.
    """
    c = model.config
    on = active_losses(c, settings)
    tokens, valid = batch["tokens"], batch["valid"]
    negatives_key, mask_key, prefix_key = jax.random.split(key, 3)
    drop = (None,) * 3
    if c.head_dropout:
        drop = jax.random.split(jax.random.fold_in(key, 3), 3)
    losses, watch = {}, {}

    video = model.encode_video(batch["pixels"], batch["boxes"], batch["classes"], batch["scores"])
    text = model.encode_text(tokens)

    if on & {"vtc", "vtm"}:
        losses["vtc"], similarity = objectives.vtc(
            embed_video(video), embed_text(text), model.scale(), valid
        )
        hit = similarity.argmax(-1) == jnp.arange(tokens.shape[0])
        watch["batch_r1"] = objectives.mean(hit, valid)

    if "ota" in on or "asp" in on:
        losses |= align(c, video, text, batch, settings, on, watch)

    # All passes through the fusion encoder have one shape: they run as one, [passes, B, S, d].
    passes = {}
    if c.fusion_stop_gradient:
        stop = jax.lax.stop_gradient
        video = video._replace(frames=stop(video.frames), cls=stop(video.cls))
        text = text._replace(tokens=stop(text.tokens), sep=stop(text.sep))
    if "vtm" in on:
        of_text, of_video, exists = objectives.hard_negatives(
            negatives_key, similarity, tokens, valid
        )
        wrong_video = jax.tree.map(lambda x: x[of_text], video)
        wrong_text = jax.tree.map(lambda x: x[of_video], text)
        passes["pair"] = model.fusion_input(video, text.tokens, text.mask)
        passes["wrong_video"] = model.fusion_input(wrong_video, text.tokens, text.mask)
        passes["wrong_text"] = model.fusion_input(video, wrong_text.tokens, wrong_text.mask)
    if "mlm" in on:
        places = jnp.arange(tokens.shape[1])
        is_word = text.mask & (places > 0) & (places < text.sep_index[:, None])
        hidden = objectives.mask_text(
            mask_key, tokens, is_word, settings["mask_rate"], c.vocab_size
        )
        around = model.encode_text(hidden.tokens, hidden.masked).tokens
        if c.fusion_stop_gradient:
            around = jax.lax.stop_gradient(around)
        passes["mlm"] = model.fusion_input(video, around, text.mask, masked=hidden.masked)
    if "plm" in on:
        prefix = objectives.draw_prefix(prefix_key, text.sep_index + 1)
        if c.prefix_lm == "causal":
            attention = objectives.prefix_attention(prefix, tokens.shape[1])
            passes["plm"] = model.fusion_input(video, text.tokens, text.mask, attention)
    fused = model.fuse_passes(passes)

    if "vtm" in on:
        three = Fused(
            *map(
                jnp.stack,
                zip(*(fused[n] for n in ("pair", "wrong_video", "wrong_text")), strict=True),
            )
        )
        ends = jnp.stack([text.sep_index, text.sep_index, wrong_text.sep_index])
        logits = model.match_logits(three, ends, drop[0])  # [3, B, 2]
        matches = jnp.array([True, False, False])[:, None] & valid
        counts = jnp.stack([valid, exists, exists])
        losses["vtm"] = objectives.vtm(logits, matches, counts)
        watch["match_accuracy"] = objectives.mean(logits.argmax(-1) == matches, counts)
    if "mlm" in on:
        at = jax.nn.one_hot(hidden.places, tokens.shape[1], dtype=fused["mlm"].text.dtype)
        words = jnp.einsum("bml,bld->bmd", at, fused["mlm"].text)
        losses["mlm"], watch["mlm_accuracy"] = objectives.mlm(
            model.lm_logits(words, drop[1]), hidden.labels, hidden.valid & valid[:, None]
        )
    if "plm" in on:
        if c.prefix_lm == "causal":
            told = fused["plm"].text
        else:
            told = released.next_word_places(model, video, text.tokens)
        losses["plm"], watch["plm_accuracy"] = objectives.plm(
            model.lm_logits(told, drop[2]), tokens, text.mask, prefix, valid
        )

    losses = {name: losses[name] for name in LOSSES if name in on}
    total = sum((settings[name] * loss for name, loss in losses.items()), jnp.float32(0))
    return total, {**{f"loss_{name}": loss for name, loss in losses.items()}, **watch}


def active_losses(c, settings: Mapping) -> set[str]:
    """The losses with a weight; OTA needs objects and ASP actions to speak of."""
    on = {name for name in LOSSES if settings[name]}
    return on - ({"ota"} if not c.objects else set()) - ({"asp"} if not c.actions else set())


def align(
    c: ModelConfig,
    video: VideoFeatures,
    text: TextFeatures,
    batch: Mapping[str, Array],
    settings: Mapping,
    on: set[str],
    watch: dict[str, Array],
) -> dict[str, Array]:
    """OTA and ASP: trajectories to nouns, actions to verbs."""
    tags, valid = batch["tags"], batch["valid"]
    found = {}
    if "ota" in on:
        nouns = tags == objectives.NOUN
        if settings["proper_nouns"]:
            nouns |= tags == objectives.PROPER_NOUN
        found["ota"] = objectives.ota(
            video.objects,
            video.object_mask,
            text.tokens,
            nouns,
            text.sep_index,
            valid,
            solver=settings["matching"],
            similarity=c.alignment,
        )
    if "asp" in on and c.alignment == "cosine":
        found["asp"] = objectives.asp(
            video.actions,
            text.tokens,
            tags == objectives.VERB,
            text.sep_index,
            valid,
            solver=settings["matching"],
        )
    elif "asp" in on:
        # The authors': Ø stands once, as for objects, and a clip without objects is left out.
        found["asp"] = objectives.ota(
            video.actions,
            jnp.ones(video.actions.shape[:2], bool),
            text.tokens,
            tags == objectives.VERB,
            text.sep_index,
            valid & video.object_mask.any(-1) if c.objects else valid,
            solver=settings["matching"],
            similarity=c.alignment,
        )
    if c.alignment == "dot":
        found = dict(zip(found, released.share_of_one_mean(*found.values()), strict=True))
    for name, of in found.items():
        watch |= {f"{name}_none": of.none_share, f"{name}_agreement": of.agreement}
    return {name: of.loss for name, of in found.items()}
