"""The six losses and their random sampling, as pure functions of arrays and masks.

Each loss is the mean over the valid entries of the *global* batch: arrays are global, however many
devices hold them. Shapes: B clips, L text positions, N trajectories, A actions, d shared width,
V vocabulary, M masked positions of a text.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax import ops
from stoa_jax.averages import global_count, mean, positive
from stoa_jax.models.layers import unit

# Values of a batch's `tags`, at the last piece of a word.
NOUN, PROPER_NOUN, VERB, ADJECTIVE = 1, 2, 3, 4


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return `-log softmax(logits)[label]` over the last axis."""
    return cross_entropy_and_hits(logits, labels)[0]


@jax.custom_vjp
def cross_entropy_and_hits(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross-entropy over the last axis, and whether the label has the largest logit.

    The maximum that the cross-entropy needs anyway replaces an argmax over the vocabulary. The
    backward pass keeps the logits and one number per row.
    """
    return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits: Array, labels: Array) -> tuple[tuple[Array, Array], Any]:
    # A comparison with all columns stays on its device where the columns are sharded.
    picked = jax.lax.platform_dependent(logits, labels, cpu=_take, default=_take_by_comparison)
    largest = logits.max(-1)
    normaliser = largest + jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    return (normaliser - picked, picked >= largest), (logits, labels, normaliser)


def _take(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[..., None], -1, mode="clip")[..., 0]


def _take_by_comparison(logits: Array, labels: Array) -> Array:
    return jnp.where(labels[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)


def _cross_entropy_backward(saved: Any, gradients: tuple[Array, Any]) -> tuple[Array, None]:
    logits, labels, normaliser = saved
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    probabilities = jnp.exp(logits - normaliser[..., None])
    return gradients[0][..., None] * (probabilities - is_label), None


cross_entropy_and_hits.defvjp(_cross_entropy, _cross_entropy_backward)


# Video-text contrastive


def vtc(video: Array, text: Array, scale: Array, valid: Array) -> tuple[Array, Array]:
    """Return the symmetric InfoNCE loss of unit vectors [B, d] and the logits [B texts, B videos].

    Logits are cosine similarities times `scale`.
    """
    similarity = scale * text @ video.T
    both = valid[:, None] & valid[None]
    logits = jnp.where(both, similarity, -1e9)
    labels = jnp.arange(logits.shape[0])
    loss = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
    return mean(loss / 2, valid), similarity


# Video-text matching


def hard_negatives(
    key: Array, similarity: Array, tokens: Array, valid: Array
) -> tuple[Array, Array, Array]:
    """Sample a wrong partner for each row of `similarity` [B texts, B videos].

    The probability is the softmax of the similarity. Returns the negative video of each text, the
    negative text of each video, and whether a negative exists, each [B]. Pairs with equal captions
    (`tokens` [B, L]) count as matching and are never sampled.
    """
    same = (tokens[:, None] == tokens[None]).all(-1)
    wrong = ~same & valid[:, None] & valid[None]
    logits = jnp.where(wrong, jax.lax.stop_gradient(similarity), -jnp.inf)
    exists = wrong.any(-1)  # `wrong` is symmetric
    text_key, video_key = jax.random.split(key)

    def sample(key: Array, logits: Array) -> Array:
        # A row without a candidate samples from uniform logits; the caller masks it.
        return jax.random.categorical(key, jnp.where(exists[:, None], logits, 0.0))

    return sample(text_key, logits), sample(video_key, logits.T), exists


def vtm(logits: Array, matches: Array, valid: Array) -> Array:
    """Return the cross-entropy of match logits [..., 2] against `matches` [...]."""
    return mean(cross_entropy(logits, matches.astype(jnp.int32)), valid)


# Masked language modelling


class MaskedText(NamedTuple):
    """A text with some words masked."""

    tokens: Array  # [B, L], some replaced by random words
    masked: Array  # [B, L], True where [MASK] is read instead
    positions: Array  # [B, M], of the words to predict
    labels: Array  # [B, M], the words
    valid: Array  # [B, M], which of the M are used


def mask_text(
    key: Array,
    tokens: Array,
    is_word: Array,
    rate: float,
    vocab_size: int,
    words: Array | None = None,
) -> MaskedText:
    """Select `rate` of the words [B, L], at least one, for prediction.

    Of these, 80 % become [MASK], 10 % a random word, and 10 % stay. `is_word` [B, L] excludes
    [CLS], [SEP] and padding. The number of positions M is static, so that only they need logits.
    Random words come from `words` [W], or from the whole vocabulary.
    """
    b, length = tokens.shape
    most = max(1, int(rate * (length - 2) + 0.5))
    count = jnp.maximum(1, jnp.round(rate * is_word.sum(-1))).astype(jnp.int32)
    select_key, kind_key, word_key = jax.random.split(key, 3)
    order = jnp.where(is_word, jax.random.uniform(select_key, tokens.shape), -1.0)
    best, positions = jax.lax.top_k(order, most)
    valid = (best >= 0) & (jnp.arange(most) < count[:, None])
    at = jax.nn.one_hot(positions, length, dtype=bool) & valid[..., None]  # [B, M, L]
    labels = (at * tokens[:, None]).sum(-1)
    kind = jax.random.uniform(kind_key, (b, most))
    masked = (at & (kind < 0.8)[..., None]).any(1)
    swapped = (at & (kind >= 0.9)[..., None]).any(1)
    # The last two ids are the start and the end token.
    choices = vocab_size - 2 if words is None else len(words)
    random_words = jax.random.randint(word_key, tokens.shape, 0, choices)
    if words is not None:
        random_words = words[random_words]
    return MaskedText(jnp.where(swapped, random_words, tokens), masked, positions, labels, valid)


def mlm(logits: Array, labels: Array, valid: Array) -> tuple[Array, Array]:
    """Return cross-entropy and accuracy of word logits [B, M, V] where `valid` [B, M] is True."""
    loss, right = cross_entropy_and_hits(logits, labels)
    return mean(loss, valid), mean(right, valid)


# Prefix language modelling


def prefix_attention(prefix: Array, length: int) -> Array:
    """Return the text attention mask [B, L, L] of a prefix language model.

    Positions before `prefix` [B] attend to each other; later ones attend to all up to themselves.
    """
    at = jnp.arange(length)
    causal = at[None, :] <= at[:, None]
    inside = at[None] < prefix[:, None]
    return causal | (inside[:, :, None] & inside[:, None, :])


def sample_prefix(key: Array, length: Array) -> Array:
    """Sample a prefix length in [1, length - 1] for each text of `length` [B] tokens."""
    u = jax.random.uniform(key, length.shape)
    room = jnp.maximum(length - 1, 1)
    return 1 + jnp.minimum((u * room).astype(jnp.int32), room - 1)


def plm(
    logits: Array, tokens: Array, text_mask: Array, prefix: Array, valid: Array
) -> tuple[Array, Array]:
    """Return next-token cross-entropy and accuracy over the suffix.

    Logits [B, L - 1, V] at each position but the last predict the token at the next one.
    """
    target = tokens[:, 1:]
    counts = text_mask[:, 1:] & (jnp.arange(1, tokens.shape[1]) >= prefix[:, None])
    counts &= valid[:, None]
    loss, right = cross_entropy_and_hits(logits, target)
    return mean(loss, counts), mean(right, counts)


# Object-text alignment and action set prediction


class Alignment(NamedTuple):
    """Tokens matched to words."""

    loss: Array
    columns: Array  # [B, n], the text position matched to each row, -1 for none
    scores: Array  # [B, n, L], softmax of the similarity over the candidate words
    none_share: Array  # share of matched rows that got the no-match token Ø
    agreement: Array  # share of matched rows that got their highest-scoring word


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
    none_weight: float = 1.0,
    named: Array | None = None,
) -> Alignment:
    """Match trajectories [B, N, d] to the nouns of their text and regress toward them.

    `text` [B, L, d] are the text features, `nouns` [B, L] the candidates; [SEP] is the no-match
    token Ø. The loss is the squared error over min(valid rows, valid columns) pairs and d; a pair
    with Ø counts `none_weight`. Pairs that are `named` [B, N, L] are matched before all others.
    """
    is_sep = jnp.arange(text.shape[1]) == sep_index[:, None]
    words = nouns | is_sep
    text = jax.lax.stop_gradient(text)
    scores = _affinity(objects, text, words, similarity)
    rows = object_mask & valid[:, None]
    weights = scores if named is None else scores + named
    columns = ops.assign(weights, rows, words, solver=solver)
    return _regress(objects, text, scores, columns, is_sep, none_weight)


def asp(
    actions: Array,
    text: Array,
    verbs: Array,
    sep_index: Array,
    valid: Array,
    *,
    solver: str = "device",
    similarity: str = "cosine",
    none_weight: float = 1.0,
) -> Alignment:
    """Match actions [B, A, d] to the verbs of their text and regress toward them.

    As in DETR, Ø fills up the verbs to the number of actions: every action gets a target, and every
    verb gets an action while there is one. With more Ø than that, all actions would take Ø, because
    the whole text is more similar to any clip than a verb is.
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
    # All copies of Ø stand for [SEP].
    matched = jnp.where(matched >= length, sep_index[:, None], matched)
    return _regress(actions, text, scores[..., :length], matched, is_sep, none_weight)


def verb_after_noun(nouns: Array, verbs: Array) -> Array:
    """Return for each noun [B, L] the position of the verb that follows it, -1 for none.

    With another noun in between, that one is the verb's subject and gets it.
    """
    at = jnp.arange(nouns.shape[1])
    later = at[None, :] > at[:, None]  # [L, L]
    end = nouns.shape[1]
    next_verb = jnp.where(later & verbs[:, None], at, end).min(-1)
    next_noun = jnp.where(later & nouns[:, None], at, end).min(-1)
    return jnp.where(nouns & (next_verb < next_noun), next_verb, -1)


def adjective_before_noun(nouns: Array, verbs: Array, adjectives: Array) -> Array:
    """Return for each noun [B, L] the position of the adjective closest before it, -1 for none.

    With another noun or a verb in between, the adjective belongs to something else.
    """
    at = jnp.arange(nouns.shape[1])
    earlier = at[None, :] < at[:, None]  # [L, L]
    adjective = jnp.where(earlier & adjectives[:, None], at, -1).max(-1)
    other = jnp.where(earlier & (nouns | verbs)[:, None], at, -1).max(-1)
    return jnp.where(nouns & (adjective > other), adjective, -1)


def word_of_match(columns: Array, word_of_noun: Array) -> Array:
    """Return the position [B, N] of the word that goes with each trajectory's matched noun.

    `columns` [B, N] are the matched positions, `word_of_noun` [B, L] the word of each noun; -1 is
    none in both.
    """
    found = jnp.take_along_axis(word_of_noun, jnp.maximum(columns, 0), 1)
    return jnp.where(columns >= 0, found, -1)


def share_of_one_mean(*alignments: Alignment) -> list[Alignment]:
    """Rescale losses so that their sum is one mean over the pairs of all alignments."""
    counts = [global_count((a.columns >= 0).sum()) for a in alignments]
    total = positive(sum(counts, jnp.float32(0)))
    return [a._replace(loss=a.loss * n / total) for a, n in zip(alignments, counts, strict=True)]


def _affinity(x: Array, text: Array, words: Array, similarity: str) -> Array:
    """Return the softmax over the words [B, n, L] of the similarity to each row, in float32."""
    x, text = jax.lax.stop_gradient(x).astype(jnp.float32), text.astype(jnp.float32)
    if similarity == "cosine":
        x, text = unit(x), unit(text)
    logits = jnp.einsum("bnd,bld->bnl", x, text)
    return jax.nn.softmax(jnp.where(words[:, None], logits, -jnp.inf), -1)


def _regress(
    x: Array, text: Array, scores: Array, columns: Array, none: Array, none_weight: float
) -> Alignment:
    """Return the mean squared error of the matched pairs and statistics of the matching."""
    matched = columns >= 0
    onehot = jax.nn.one_hot(columns, text.shape[1], dtype=text.dtype)  # -1: all zero
    target = jnp.einsum("bnl,bld->bnd", onehot, text).astype(jnp.float32)
    error = jnp.square(x.astype(jnp.float32) - target).mean(-1)
    got_none = (onehot * none[:, None]).sum(-1)
    got_best = scores.argmax(-1) == columns
    weights = jnp.where(matched, 1 + (none_weight - 1) * got_none.astype(jnp.float32), 0)
    loss = mean(error, weights)
    return Alignment(loss, columns, scores, mean(got_none, matched), mean(got_best, matched))
