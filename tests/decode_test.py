"""Search against brute force; cached decoding against recomputing everything."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stoa_jax import decode, objectives
from stoa_jax.models import decoding
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa

VOCAB, START, END = 6, 4, 5


def random_model(seed, vocab=VOCAB, memory=3):
    """Return a table language model: the next token depends on last words and position."""
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(2, 8, vocab**memory, vocab)) * 2)

    def step(cache, tokens, place):
        # The cache holds the last words; it is right only if beams are exchanged correctly.
        recent = (cache["recent"][0] * vocab + tokens) % vocab**memory
        clip = jnp.arange(tokens.shape[0])[:, None] % 2
        logits = table[clip, jnp.minimum(place, 7), recent]
        return logits, {"recent": recent[None]}

    def cache(clips, beams):
        return {"recent": jnp.zeros((1, clips, beams), jnp.int32)}

    return step, cache, np.asarray(table, np.float64)


def log_probability(table, clip, words, vocab=VOCAB, memory=3):
    recent, total, last = 0, 0.0, START
    for place, word in enumerate(words):
        recent = (recent * vocab + last) % vocab**memory
        row = table[clip, place, recent]
        total += row[word] - np.log(np.exp(row).sum())
        last = word
    return total


def every_text(max_pieces):
    for length in range(max_pieces + 1):
        for pieces in itertools.product(range(4), repeat=length):
            yield (*pieces, END)


def text_of(tokens):
    tokens = [int(t) for t in tokens]
    assert tokens[0] == START
    end = tokens.index(END)
    assert not any(tokens[end + 1 :])
    return tuple(tokens[1 : end + 1])


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_what_brute_force_finds(seed, penalty):
    step, cache, table = random_model(seed)
    beams = 4**4
    found = jax.jit(
        lambda: decode.beam_search(
            step,
            cache(2, beams),
            2,
            beams=beams,
            start=START,
            end=END,
            max_pieces=4,
            length_penalty=penalty,
        )
    )()
    for clip in range(2):
        scored = [
            (log_probability(table, clip, words) / len(words) ** penalty, words)
            for words in every_text(4)
        ]
        score, words = max(scored)
        assert text_of(found.tokens[clip]) == words
        assert float(found.score[clip]) == pytest.approx(score, abs=1e-4)


def brute_beam(table, clip, beams, max_pieces):
    """Beam search over Python lists."""
    live, done = [(0.0, ())], []
    for place in range(max_pieces + 1):
        grown = [
            (log_probability(table, clip, (*words, word)), (*words, word))
            for _, words in live
            for word in ([END] if place == max_pieces else [0, 1, 2, 3, END])
        ]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        ended = [g for g in grown[:beams] if g[1][-1] == END]
        done = sorted([*done, *ended], reverse=True)[:beams]
        live = [g for g in grown if g[1][-1] != END][:beams]
    return done[0]


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_finds_what_a_plain_one_finds(seed, beams):
    step, cache, table = random_model(seed)
    found = decode.beam_search(
        step, cache(2, beams), 2, beams=beams, start=START, end=END, max_pieces=5
    )
    for clip in range(2):
        score, words = brute_beam(table, clip, beams, 5)
        assert text_of(found.tokens[clip]) == words
        assert float(found.score[clip]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed):
    step, cache, _ = random_model(seed)
    options = dict(start=START, end=END, max_pieces=6)
    one = decode.beam_search(step, cache(2, 1), 2, beams=1, **options)
    plain = decode.greedy(step, cache(2, 1), 2, **options)
    np.testing.assert_array_equal(one.tokens, plain.tokens)
    np.testing.assert_allclose(one.score, plain.score, rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_greedy_takes_the_likeliest_and_scores_are_true(penalty):
    step, cache, table = random_model(0)
    options = dict(start=START, end=END, max_pieces=6, length_penalty=penalty)
    found = decode.greedy(step, cache(2, 1), 2, **options)
    for clip in range(2):
        words = text_of(found.tokens[clip])
        for i, word in enumerate(words[:-1]):
            options_there = [
                log_probability(table, clip, (*words[:i], w)) for w in [0, 1, 2, 3, END]
            ]
            assert options_there.index(max(options_there)) == [0, 1, 2, 3, END].index(word)
        expected = log_probability(table, clip, words) / len(words) ** penalty
        assert float(found.score[clip]) == pytest.approx(expected, abs=1e-4)


def test_beams_score_at_least_as_well_as_greedy_on_average():
    gains = []
    for seed in range(4):
        step, cache, _ = random_model(seed)
        options = dict(start=START, end=END, max_pieces=6)
        one = decode.greedy(step, cache(2, 1), 2, **options).score
        many = decode.beam_search(step, cache(2, 4), 2, beams=4, **options).score
        gains += (many - one).tolist()
    assert min(gains) > -1e-5 and max(gains) > 0.1


def test_no_ngram_comes_twice():
    def step(cache, tokens, place):  # would repeat 0 1 0 1 … for ever
        likes = jnp.array([0.0, 0.0, -1.0, -2.0, -9.0, -9.0])
        wanted = jnp.where(tokens == 0, 1, 0)
        return likes + 9 * jax.nn.one_hot(wanted, VOCAB), cache

    for n in (1, 2, 3):
        for search, beams in ((decode.greedy, 1), (decode.beam_search, 3)):
            more = {"beams": beams} if beams > 1 else {}
            found = search(
                step,
                {"x": jnp.zeros((1, 1, beams))},
                1,
                start=START,
                end=END,
                max_pieces=8,
                no_repeat_ngram=n,
                **more,
            )
            words = text_of(found.tokens[0])
            grams = [words[i : i + n] for i in range(len(words) - n + 1)]
            assert len(grams) == len(set(grams))
            if n > 1:
                assert len(words) > n


def test_it_stops_when_every_clip_ended():
    places = []

    def step(cache, tokens, place):
        jax.debug.callback(lambda p: places.append(int(p)), place)
        return jnp.zeros((*tokens.shape, VOCAB)).at[..., END].set(9.0), cache

    decode.greedy(step, {"x": jnp.zeros((1, 2, 1))}, 2, start=START, end=END)
    jax.effects_barrier()
    assert len(places) == 1
    places.clear()
    decode.beam_search(step, {"x": jnp.zeros((1, 2, 2))}, 2, beams=2, start=START, end=END)
    jax.effects_barrier()
    assert len(places) <= 3


# With the model


@pytest.fixture(scope="module", params=["paper", "released"])
def captioner(request):
    config = ModelConfig(
        image_size=16,
        patch_size=8,
        frames=2,
        vision_width=16,
        vision_depth=3,
        vision_heads=2,
        vocab_size=1024,
        text_length=12,
        text_width=16,
        text_depth=2,
        text_heads=2,
        objects_per_frame=3,
        trajectories=3,
        action_tokens=2,
        object_block=1,
        action_block=2,
        scan_layers=False,
        roi_size=2,
        fusion_depth=3,
        fusion_heads=2,
    )
    if request.param == "released":
        config = dataclasses.replace(config.released(), roi_size=2)
    # Random values everywhere, including biases, without compiling.
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda: Stoa(config, rngs=nnx.Rngs(3)))
    model = jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), model)
    b, t, k = 3, config.frames, config.objects_per_frame
    video = jax.jit(Stoa.encode_video)(
        model,
        rng.integers(0, 255, (b, t, 16, 16, 3), np.uint8),
        np.sort(rng.random((b, t, k, 2, 2), np.float32), 3).reshape(b, t, k, 4),
        rng.integers(-1, 2, (b, t, k), np.int32),
        rng.random((b, t, k), np.float32),
    )
    return model, video


def recomputed(model, video, tokens):
    """Return logits [B, L, V] without a cache: both encoders over the whole text."""
    text = model.encode_text(tokens)
    if model.config.prefix_lm == "position_query":
        return model.lm_logits(model.next_token_features(video, text.tokens))
    mask = jnp.ones(tokens.shape, bool)
    attention = objectives.prefix_attention(jnp.ones(len(tokens), jnp.int32), tokens.shape[1])
    return model.lm_logits(model.fuse(video, text.tokens, mask, attention).text)


def test_cached_equals_recomputed(captioner):
    model, video = captioner
    tokens = np.random.default_rng(1).integers(0, 1022, (3, 2, 9), np.int32)
    tokens[..., 0] = 1022
    visual = decoding.visual_keys(model, video)
    cache = decoding.empty_cache(model, 3, 2, 9)
    step = jax.jit(decoding.next_word)
    whole = [jax.jit(recomputed)(model, video, tokens[:, beam]) for beam in range(2)]
    for place in range(9):
        logits, cache = step(model, visual, cache, tokens[:, :, place], jnp.int32(place))
        if place == 8 and model.config.prefix_lm == "position_query":
            break  # no query follows the last word
        for beam in range(2):
            wanted = whole[beam][:, place]
            np.testing.assert_allclose(logits[:, beam], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoded_texts_score_what_the_model_says(captioner, beams):
    model, video = captioner
    options = dict(start=1022, end=1023, max_pieces=6)

    @jax.jit
    def run(model, video):
        visual = decoding.visual_keys(model, video)
        cache = decoding.empty_cache(model, 3, beams, 7)

        def step(cache, tokens, place):
            return decoding.next_word(model, visual, cache, tokens, place)

        if beams == 1:
            return decode.greedy(step, cache, 3, **options)
        return decode.beam_search(step, cache, 3, beams=beams, **options)

    found = run(model, video)
    logp = jax.nn.log_softmax(jax.jit(recomputed)(model, video, found.tokens), -1)
    for clip in range(3):
        words = found.tokens[clip].tolist()
        end = words.index(1023)
        total = sum(float(logp[clip, i, words[i + 1]]) for i in range(end))
        assert float(found.score[clip]) == pytest.approx(total, abs=1e-4)
        if beams == 1 and end < 7:
            allowed = np.delete(np.asarray(logp[clip, :end]), 1022, 1)
            assert words[1 : end + 1] == [w + (w >= 1022) for w in allowed.argmax(1)]
