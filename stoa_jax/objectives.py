"""The six losses, and what they draw: pure functions of arrays and masks.

Each loss is an average over what is valid in the *global* batch: the arrays are global, however
many devices hold them. Shapes: B clips, L text places, N trajectories, A actions, d shared
width, V vocabulary, M masked places of a text.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax import ops
from stoa_jax.models.layers import unit

NOUN, PROPER_NOUN, VERB = 1, 2, 3  # what a batch's `tags` say of a word's last piece


def mean(x: Array, mask: Array) -> Array:
    """The average of `x` where `mask`; 0 where nothing is."""
    mask = mask.astype(jnp.float32)
    return jnp.where(mask > 0, x, 0).sum() / jnp.maximum(mask.sum(), 1.0)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], over the last axis."""
    picked = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jax.nn.logsumexp(logits, -1) - (jnp.where(picked > 0, logits, 0)).sum(-1)


# Video-text contrastive


def vtc(video: Array, text: Array, scale: Array, valid: Array) -> tuple[Array, Array]:
    """Symmetric InfoNCE over unit vectors [B, d]; also the similarities [B texts, B videos]."""
    similarity = scale * text @ video.T
    both = valid[:, None] & valid[None]
    logits = jnp.where(both, similarity, -1e9)
    labels = jnp.arange(logits.shape[0])
    loss = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
    return mean(loss / 2, valid), similarity


# Video-text matching


def hard_negatives(key: Array, similarity: Array, tokens: Array, valid: Array):
    """For each row of `similarity` [B texts, B videos] a wrong partner, likelier if similar.

    Returns the negative video of each text, the negative text of each video [B], and which have
    one [B]. Pairs of equal captions [B, L] are right pairs too and never drawn.
    """
    same = (tokens[:, None] == tokens[None]).all(-1)
    wrong = ~same & valid[:, None] & valid[None]
    logits = jnp.where(wrong, jax.lax.stop_gradient(similarity), -jnp.inf)
    exists = wrong.any(-1)  # `wrong` is symmetric
    for_text, for_video = jax.random.split(key)

    def draw(key: Array, logits: Array) -> Array:
        # A row without a candidate draws something finite, and is masked by the caller.
        return jax.random.categorical(key, jnp.where(exists[:, None], logits, 0.0))

    video, text = draw(for_text, logits), draw(for_video, logits.T)
    return video, text, exists


def vtm(logits: Array, matches: Array, valid: Array) -> Array:
    """Cross-entropy of match logits [..., 2] against `matches` [...], which pairs belong."""
    return mean(cross_entropy(logits, matches.astype(jnp.int32)), valid)


# Masked language modelling


class MaskedText(NamedTuple):
    """A text with words hidden."""

    tokens: Array  # [B, L], some replaced by random words
    masked: Array  # [B, L], which read [MASK]
    places: Array  # [B, M], of the words to tell
    labels: Array  # [B, M], the words
    valid: Array  # [B, M], which of the M count


def mask_text(
    key: Array, tokens: Array, is_word: Array, rate: float, vocab_size: int
) -> MaskedText:
    """Hides `rate` of the words [B, L], at least one: 80 % [MASK], 10 % random, 10 % as they are.

    `is_word` [B, L] leaves out [CLS], [SEP] and padding. The number of places M is static, so
    that words are predicted there only.
    """
    b, length = tokens.shape
    most = max(1, int(rate * (length - 2) + 0.5))
    count = jnp.maximum(1, jnp.round(rate * is_word.sum(-1))).astype(jnp.int32)
    pick, how, word = jax.random.split(key, 3)
    order = jnp.where(is_word, jax.random.uniform(pick, tokens.shape), -1.0)
    best, places = jax.lax.top_k(order, most)
    valid = (best >= 0) & (jnp.arange(most) < count[:, None])
    at = jax.nn.one_hot(places, length, dtype=bool) & valid[..., None]  # [B, M, L]
    labels = (at * tokens[:, None]).sum(-1)
    fate = jax.random.uniform(how, (b, most))
    masked = (at & (fate < 0.8)[..., None]).any(1)
    swapped = (at & (fate >= 0.9)[..., None]).any(1)
    # The last two ids are the start and the end token.
    random_words = jax.random.randint(word, tokens.shape, 0, vocab_size - 2)
    return MaskedText(jnp.where(swapped, random_words, tokens), masked, places, labels, valid)


def mlm(logits: Array, labels: Array, valid: Array) -> tuple[Array, Array]:
    """Cross-entropy and accuracy of word logits [B, M, V] where `valid` [B, M]."""
    loss = mean(cross_entropy(logits, labels), valid)
    return loss, mean(logits.argmax(-1) == labels, valid)


# Prefix language modelling


def prefix_attention(prefix: Array, length: int) -> Array:
    """[B, L, L]: places before `prefix` [B] see each other, those after it see what is before."""
    at = jnp.arange(length)
    causal = at[None, :] <= at[:, None]
    inside = at[None] < prefix[:, None]
    return causal | (inside[:, :, None] & inside[:, None, :])


def draw_prefix(key: Array, length: Array) -> Array:
    """A prefix length in [1, length - 1] for each text of `length` [B] tokens."""
    u = jax.random.uniform(key, length.shape)
    room = jnp.maximum(length - 1, 1)
    return 1 + jnp.minimum((u * room).astype(jnp.int32), room - 1)


def plm(logits: Array, tokens: Array, text_mask: Array, prefix: Array, valid: Array):
    """Next-word cross-entropy and accuracy on the suffix, from logits [B, L, V] at each place."""
    target = tokens[:, 1:]
    counts = text_mask[:, 1:] & (jnp.arange(1, tokens.shape[1]) >= prefix[:, None])
    counts &= valid[:, None]
    logits = logits[:, :-1]
    return mean(cross_entropy(logits, target), counts), mean(logits.argmax(-1) == target, counts)


# Object-text alignment and action set prediction


class Alignment(NamedTuple):
    """A set matched to words."""

    loss: Array
    columns: Array  # [B, n], the word each row got, -1 for none
    scores: Array  # [B, n, L], how each row likes each word; sums to 1 over the words
    none_share: Array  # of the matched rows, those that got Ø
    agreement: Array  # of the matched rows, those that got the word they like best


def ota(
    objects: Array,
    object_mask: Array,
    text: Array,
    nouns: Array,
    sep_index: Array,
    valid: Array,
    *,
    solver: str = "device",
    similarity: str = "cosine",
) -> Alignment:
    """Trajectories [B, N, d] matched to the nouns [B, L] of their text [B, L, d], and drawn there.

    [SEP] stands for Ø. min(valid rows, valid columns) pairs; squared error over pairs and d.
    """
    is_sep = jnp.arange(text.shape[1]) == sep_index[:, None]
    words = nouns | is_sep
    text = jax.lax.stop_gradient(text)
    scores = _affinity(objects, text, words, similarity)
    rows = object_mask & valid[:, None]
    columns = ops.assign(scores, rows, words, solver=solver)
    return _draw(objects, text, scores, columns, none=is_sep)


def asp(
    actions: Array,
    text: Array,
    verbs: Array,
    sep_index: Array,
    valid: Array,
    *,
    solver: str = "device",
    similarity: str = "cosine",
) -> Alignment:
    """Actions [B, A, d] matched to the verbs [B, L] of their text, and drawn there.

    Ø fills up the verbs to the number of actions, as in DETR: every action finds a target, and no
    verb is left without an action while there is one. With Ø to spare all actions went there, since
    the whole text is more like any clip than a verb is.
    """
    b, a, _ = actions.shape
    length = text.shape[1]
    is_sep = jnp.arange(length) == sep_index[:, None]
    text = jax.lax.stop_gradient(text)
    scores = _affinity(actions, text, verbs | is_sep, similarity)
    none = jnp.einsum("bal,bl->ba", scores, is_sep.astype(scores.dtype))
    scores = jnp.concatenate([scores, jnp.repeat(none[:, :, None], a, 2)], 2)  # [B, A, L + A]
    spare = jnp.arange(a) < a - verbs.sum(-1, keepdims=True)  # [B, A]
    columns = jnp.concatenate([verbs, spare], 1)
    rows = jnp.broadcast_to(valid[:, None], (b, a))
    matched = ops.assign(scores, rows, columns, solver=solver)
    # The copies of Ø all stand for [SEP].
    matched = jnp.where(matched >= length, sep_index[:, None], matched)
    return _draw(actions, text, scores[..., :length], matched, none=is_sep)


def _affinity(x: Array, text: Array, words: Array, similarity: str) -> Array:
    """Softmax over the words [B, n, L] of how near each row of `x` is to them, in float32."""
    x, text = jax.lax.stop_gradient(x).astype(jnp.float32), text.astype(jnp.float32)
    if similarity == "cosine":
        x, text = unit(x), unit(text)
    logits = jnp.einsum("bnd,bld->bnl", x, text)
    return jax.nn.softmax(jnp.where(words[:, None], logits, -jnp.inf), -1)


def _draw(x: Array, text: Array, scores: Array, columns: Array, none: Array) -> Alignment:
    """Mean squared error of the matched pairs, and what the matching was like."""
    matched = columns >= 0
    onehot = jax.nn.one_hot(columns, text.shape[1], dtype=text.dtype)  # -1: all zero
    target = jnp.einsum("bnl,bld->bnd", onehot, text).astype(jnp.float32)
    error = jnp.square(x.astype(jnp.float32) - target).mean(-1)
    got_none = (onehot * none[:, None]).sum(-1)
    liked = scores.argmax(-1) == columns
    return Alignment(
        mean(error, matched), columns, scores, mean(got_none, matched), mean(liked, matched)
    )
