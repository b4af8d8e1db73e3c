"""Greedy and beam search over a step function, to be jitted as a whole.

`step(cache, tokens [B, W], position) -> (logits [B, W, V], cache)` scores what may follow `tokens`,
the tokens at `position` of their texts. Every leaf of `cache` has the clips on its second axis and
the beams on its third, so that beams can be exchanged.

Shapes: B clips, W beams, V vocabulary, M the most pieces, without the start and the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Step = Callable[[Any, Array, Array], tuple[Array, Any]]


class Decoded(NamedTuple):
    """The best text of each clip."""

    tokens: Array  # [B, M + 2]: start, pieces, end, zeros
    score: Array  # [B], log-probability over length to the power of the penalty


def greedy(
    step: Step,
    cache: Any,
    clips: int,
    *,
    start: int,
    end: int,
    max_pieces: int = 30,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Choose the likeliest piece at each position, until the end token or `max_pieces`."""

    def body(state):
        position, cache, tokens, score, done = state
        logits, cache = step(cache, tokens[:, :, position], position)
        logp = _allowed(logits, tokens, position, start, end, max_pieces, no_repeat_ngram)[:, 0]
        word = jnp.where(done, 0, logp.argmax(-1))
        score = score + jnp.where(done, 0, logp.max(-1))
        tokens = tokens.at[:, 0, position + 1].set(word)
        return position + 1, cache, tokens, score, done | (word == end)

    tokens = jnp.zeros((clips, 1, max_pieces + 2), jnp.int32).at[:, :, 0].set(start)
    state = (jnp.int32(0), cache, tokens, jnp.zeros(clips), jnp.zeros(clips, bool))
    _, _, tokens, score, _ = jax.lax.while_loop(
        lambda s: (s[0] <= max_pieces) & ~s[-1].all(), body, state
    )
    tokens = tokens[:, 0]
    length = jnp.argmax(tokens == end, 1)  # pieces and the end
    return Decoded(tokens, score / length.astype(jnp.float32) ** length_penalty)


def beam_search(
    step: Step,
    cache: Any,
    clips: int,
    *,
    beams: int,
    start: int,
    end: int,
    max_pieces: int = 30,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Return the best text that a search with `beams` beams finds.

    A text is scored by its log-probability, end token included, over (pieces + 1) to the power of
    `length_penalty`. After `max_pieces` only the end may follow. The search stops as soon as no
    beam can overtake the finished texts.
    """
    if length_penalty < 0:
        raise ValueError(f"length_penalty is {length_penalty}; it must be 0 or more")
    b, w = clips, beams

    class State(NamedTuple):
        position: Array
        cache: Any
        live: Array  # [B, W, M + 2]
        live_score: Array  # [B, W], log-probabilities
        done: Array  # [B, W, M + 2]
        done_score: Array  # [B, W], with the penalty

    def penalised(logp: Array, length: Array | int) -> Array:
        return logp / jnp.asarray(length, jnp.float32) ** length_penalty

    def take(x: Array, which: Array) -> Array:  # [B, X, …], [B, Y] -> [B, Y, …]
        return jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), 1)

    def body(s: State) -> State:
        logits, cache = step(s.cache, s.live[:, :, s.position], s.position)
        logp = _allowed(logits, s.live, s.position, start, end, max_pieces, no_repeat_ngram)
        total = (s.live_score[..., None] + logp).reshape(b, -1)  # [B, W V]
        # At most W of the best 2 W end a text, so at least W remain to continue.
        score, which = jax.lax.top_k(total, min(2 * w, total.shape[1]))
        parent, word = which // logp.shape[-1], which % logp.shape[-1]
        texts = take(s.live, parent).at[:, :, s.position + 1].set(word)
        ends = word == end

        # A text may end only if that is among the W best continuations. So one beam is greedy.
        ended = ends & (jnp.arange(score.shape[1]) < w)
        done_score = jnp.where(ended, penalised(score, s.position + 1), -jnp.inf)
        done_score = jnp.concatenate([s.done_score, done_score], 1)
        done_score, best = jax.lax.top_k(done_score, w)
        done = take(jnp.concatenate([s.done, texts], 1), best)

        live_score, best = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), w)
        parent = take(parent, best)
        cache = jax.tree.map(lambda x: jax.vmap(take, (0, None))(x, parent), cache)
        return State(s.position + 1, cache, take(texts, best), live_score, done, done_score)

    def can_improve(s: State) -> Array:
        # Log-probabilities only fall, and the longest text is penalised least.
        reachable = penalised(s.live_score.max(1), max_pieces + 1)
        return (s.position <= max_pieces) & (reachable > s.done_score.min(1)).any()

    nothing = jnp.full((b, w), -jnp.inf)
    texts = jnp.zeros((b, w, max_pieces + 2), jnp.int32).at[:, :, 0].set(start)
    state = State(jnp.int32(0), cache, texts, nothing.at[:, 0].set(0), texts, nothing)
    state = jax.lax.while_loop(can_improve, body, state)
    return Decoded(state.done[:, 0], state.done_score[:, 0])


def _allowed(
    logits: Array,
    tokens: Array,
    position: Array,
    start: int,
    end: int,
    max_pieces: int,
    no_repeat_ngram: int,
) -> Array:
    """Return log-probabilities [B, W, V], -inf for pieces that must not follow the tokens."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    word = jnp.arange(logp.shape[-1])
    logp = jnp.where((word == start) | ((position >= max_pieces) & (word != end)), -jnp.inf, logp)
    n = no_repeat_ngram
    if not n:
        return logp
    # A piece that followed an earlier occurrence of the last n - 1 tokens must not follow again.
    length = tokens.shape[-1]
    starts = jnp.arange(length)
    same = starts + n - 1 <= position  # [M + 2], broadcasts over [B, W]
    same = jnp.broadcast_to(same & (starts > 0), tokens.shape)
    for i in range(n - 1):
        recent = jnp.take(tokens, jnp.maximum(position - n + 2 + i, 0), -1)[..., None]
        same &= jnp.roll(tokens, -i, -1) == recent
    follower = jnp.where(same, jnp.roll(tokens, -(n - 1), -1), logp.shape[-1])

    def ban(row: Array, words: Array) -> Array:
        return row.at[words].set(-jnp.inf, mode="drop")

    return jax.vmap(jax.vmap(ban))(logp, follower)
