"""The losses against plain NumPy, one example and one word at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from stoa_jax import objectives

B, L, N, A, D, V = 6, 12, 5, 4, 8, 64
CLS, SEP = V - 2, V - 1


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Return texts of all lengths with padding, equal captions, no nouns, no verbs, no objects."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((B, L), np.int32)
    tags = np.zeros((B, L), np.int8)
    for b in range(B):
        words = rng.integers(1, L - 2) if b else L - 2
        tokens[b, 0], tokens[b, words + 1] = CLS, SEP
        tokens[b, 1 : words + 1] = rng.integers(1, V - 2, words)
        tags[b, 1 : words + 1] = rng.choice([0, 1, 2, 3], words)
    tokens[3], tags[3] = tokens[2], tags[2]  # two equal captions
    tags[4] = np.where(tags[4] == 1, 0, tags[4])  # no noun
    tags[5] = np.where(tags[5] == 3, 0, tags[5])  # no verb
    object_mask = rng.random((B, N)) < 0.7
    object_mask[1] = False  # no objects
    return dict(
        tokens=tokens,
        tags=tags,
        length=(tokens == SEP).argmax(-1) + 1,
        valid=np.array([True] * (B - 1) + [False]) if seed % 2 else np.ones(B, bool),
        object_mask=object_mask,
        text=rng.normal(size=(B, L, D)).astype(np.float32),
        objects=rng.normal(size=(B, N, D)).astype(np.float32),
        actions=rng.normal(size=(B, A, D)).astype(np.float32),
        video=rng.normal(size=(B, D)).astype(np.float32),
        rng=rng,
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


seeds = pytest.mark.parametrize("seed", range(6))


@seeds
def test_vtc(seed):
    x = make_batch(seed)
    video, text, rows = unit(x["video"]), unit(x["text"][:, 0]), np.flatnonzero(x["valid"])
    terms = []
    for i in rows:
        to_video = log_softmax([20 * text[i] @ video[j] for j in rows])
        to_text = log_softmax([20 * text[j] @ video[i] for j in rows])
        k = list(rows).index(i)
        terms.append(-(to_video[k] + to_text[k]) / 2)
    loss, _ = objectives.vtc(video, text, jnp.float32(20), x["valid"])
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


@seeds
def test_hard_negatives_are_wrong_pairs_drawn_by_similarity(seed):
    x = make_batch(seed)
    similarity = x["rng"].normal(size=(B, B)).astype(np.float32) * 2
    draw = jax.jit(
        jax.vmap(
            lambda key: objectives.hard_negatives(
                key, similarity, jnp.asarray(x["tokens"]), x["valid"]
            )
        )
    )
    video, text, exists = map(np.asarray, draw(jax.random.split(jax.random.key(seed), 4000)))
    for b in range(B):
        wrong = [
            j
            for j in range(B)
            if x["valid"][j] and not (x["tokens"][j] == x["tokens"][b]).all() and x["valid"][b]
        ]
        assert exists[0, b] == bool(wrong)
        if not wrong:
            continue
        for drawn, scores in ((video[:, b], similarity[b]), (text[:, b], similarity[:, b])):
            assert set(drawn) <= set(wrong)
            expected = np.exp(log_softmax(scores[wrong]))
            found = [(drawn == j).mean() for j in wrong]
            np.testing.assert_allclose(found, expected, atol=0.04)


def test_no_negative_where_all_captions_are_equal():
    x = make_batch(0)
    tokens = jnp.asarray(np.repeat(x["tokens"][:1], B, 0))
    *_, exists = objectives.hard_negatives(jax.random.key(0), jnp.zeros((B, B)), tokens, x["valid"])
    assert not exists.any()
    # Without negatives, the loss is that of the true pairs.
    logits = jnp.asarray(x["rng"].normal(size=(3, B, 2)), jnp.float32)
    matches = jnp.array([True, False, False])[:, None] & jnp.ones(B, bool)
    counts = jnp.stack([jnp.ones(B, bool), exists, exists])
    expected = objectives.vtm(logits[0], matches[0], jnp.ones(B, bool))
    np.testing.assert_allclose(objectives.vtm(logits, matches, counts), expected, rtol=1e-6)


@seeds
def test_vtm(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, B, 2)).astype(np.float32)
    matches, counts = rng.random((3, B)) < 0.5, rng.random((3, B)) < 0.7
    terms = [
        -log_softmax(logits[p, b])[int(matches[p, b])]
        for p in range(3)
        for b in range(B)
        if counts[p, b]
    ]
    np.testing.assert_allclose(objectives.vtm(logits, matches, counts), np.mean(terms), rtol=1e-5)


@seeds
def test_masking_hides_the_right_number_of_words(seed):
    x = make_batch(seed)
    tokens = jnp.asarray(x["tokens"])
    places = np.arange(L)
    is_word = (places > 0) & (places < x["length"][:, None] - 1)
    hidden = objectives.mask_text(jax.random.key(seed), tokens, jnp.asarray(is_word), 0.3, V)
    hidden = jax.tree.map(np.asarray, hidden)
    for b in range(B):
        chosen = hidden.positions[b][hidden.valid[b]]
        assert len(set(chosen)) == len(chosen) == max(1, round(0.3 * is_word[b].sum()))
        assert is_word[b][chosen].all()
        np.testing.assert_array_equal(hidden.labels[b][hidden.valid[b]], x["tokens"][b, chosen])
        elsewhere = np.setdiff1d(places, chosen)
        np.testing.assert_array_equal(hidden.tokens[b, elsewhere], x["tokens"][b, elsewhere])
        assert not hidden.masked[b, elsewhere].any()
    assert hidden.tokens.max() <= SEP


def test_masking_is_eighty_ten_ten():
    tokens = jnp.full((2000, L), 7).at[:, 0].set(CLS).at[:, -1].set(SEP)
    places = jnp.arange(L)
    is_word = jnp.broadcast_to((places > 0) & (places < L - 1), tokens.shape)
    hidden = objectives.mask_text(jax.random.key(0), tokens, is_word, 0.3, V)
    chosen = hidden.valid.sum()
    assert hidden.masked.sum() / chosen == pytest.approx(0.8, abs=0.02)
    swapped = (hidden.tokens != tokens) & ~hidden.masked
    assert swapped.sum() / chosen == pytest.approx(0.1 * (1 - 1 / (V - 2)), abs=0.02)


@seeds
def test_mlm(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, 3, V)).astype(np.float32)
    labels, valid = rng.integers(0, V, (B, 3)), rng.random((B, 3)) < 0.6
    terms = [
        -log_softmax(logits[b, m])[labels[b, m]] for b in range(B) for m in range(3) if valid[b, m]
    ]
    loss, accuracy = objectives.mlm(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid))
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(accuracy, (logits.argmax(-1) == labels)[valid].mean(), rtol=1e-6)


@seeds
def test_plm(seed):
    x = make_batch(seed)
    logits = x["rng"].normal(size=(B, L, V)).astype(np.float32)
    prefix = np.asarray(objectives.sample_prefix(jax.random.key(seed), jnp.asarray(x["length"])))
    assert (prefix >= 1).all() and (prefix <= x["length"] - 1).all()
    terms = []
    for b in np.flatnonzero(x["valid"]):
        for i in range(prefix[b], x["length"][b]):
            terms.append(-log_softmax(logits[b, i - 1])[x["tokens"][b, i]])
    text_mask = np.arange(L) < x["length"][:, None]
    loss, _ = objectives.plm(
        jnp.asarray(logits[:, :-1]), jnp.asarray(x["tokens"]), text_mask, prefix, x["valid"]
    )
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_prefixes_are_uniform():
    length = jnp.full(6000, 7)
    prefix = np.asarray(objectives.sample_prefix(jax.random.key(0), length))
    share = np.bincount(prefix, minlength=7)[1:] / len(prefix)
    np.testing.assert_allclose(share, 1 / 6, atol=0.02)


@seeds
def test_prefix_attention(seed):
    prefix = np.random.default_rng(seed).integers(1, L, B)
    found = np.asarray(objectives.prefix_attention(jnp.asarray(prefix), L))
    for b in range(B):
        for i in range(L):
            for j in range(L):
                both_inside = i < prefix[b] and j < prefix[b]
                assert found[b, i, j] == (both_inside or j <= i)


def check_matching(x, found, rows, words, targets):
    """Check that pairs are as good as scipy's and the loss belongs to them; ties may differ.

    For clip b, `targets(b)` gives the positions of the words in the text, repeated as often as each
    may be used.
    """
    errors, columns = [], np.asarray(found.columns)
    for b in range(B):
        valid = np.flatnonzero(rows[b]) if x["valid"][b] else np.array([], int)
        pairs = [(i, columns[b, i]) for i in range(len(columns[b])) if columns[b, i] >= 0]
        places = targets(b)
        assert len(pairs) == min(len(valid), len(places))
        assert {i for i, _ in pairs} <= set(valid)
        for place in {j for _, j in pairs}:
            assert sum(j == place for _, j in pairs) <= places.count(place)
        distinct = sorted(set(places))
        near = {i: np.exp(log_softmax(words[b, i] @ x["unit_text"][b, distinct].T)) for i in valid}
        if len(valid):
            scores = np.array([[near[i][distinct.index(j)] for j in places] for i in valid])
            best = scores[linear_sum_assignment(-scores)].sum()
            np.testing.assert_allclose(
                sum(near[i][distinct.index(j)] for i, j in pairs), best, rtol=1e-5
            )
        errors += [((x["rows"][b, i] - x["text"][b, j]) ** 2).mean() for i, j in pairs]
    np.testing.assert_allclose(found.loss, np.mean(errors), rtol=1e-5)


@seeds
@pytest.mark.parametrize("solver", ["device", "scipy", "auction"])
def test_ota(seed, solver):
    x = make_batch(seed)
    nouns = x["tags"] == 1
    found = objectives.ota(
        *map(jnp.asarray, (x["objects"], x["object_mask"], x["text"], nouns, x["length"] - 1)),
        x["valid"],
        solver=solver,
    )
    x |= {"rows": x["objects"], "unit_text": unit(x["text"])}
    check_matching(
        x,
        found,
        x["object_mask"],
        unit(x["objects"]),
        lambda b: [*np.flatnonzero(nouns[b]), x["length"][b] - 1],
    )


@seeds
@pytest.mark.parametrize("solver", ["device", "scipy", "auction"])
def test_asp(seed, solver):
    x = make_batch(seed)
    verbs = x["tags"] == 3
    found = objectives.asp(
        *map(jnp.asarray, (x["actions"], x["text"], verbs, x["length"] - 1)),
        x["valid"],
        solver=solver,
    )
    x |= {"rows": x["actions"], "unit_text": unit(x["text"])}
    # Ø fills up the verbs: each action gets a target, and no verb is left out.
    check_matching(
        x,
        found,
        np.ones((B, A), bool),
        unit(x["actions"]),
        lambda b: [*np.flatnonzero(verbs[b]), *[x["length"][b] - 1] * max(0, A - verbs[b].sum())],
    )


def test_every_verb_finds_an_action_however_near_the_whole_text_is():
    text = jnp.eye(4)[None]  # start, verb, verb, [SEP]
    actions = jnp.broadcast_to(text[:, 3:] + 0.1 * text[:, 1:2], (1, 3, 4))
    verbs = jnp.array([[False, True, True, False]])
    found = objectives.asp(actions, text, verbs, jnp.array([3]), jnp.array([True]))
    assert sorted(found.columns[0].tolist()) == [1, 2, 3]


def test_matching_does_not_teach_the_text():
    x = make_batch(0)

    def loss(text, objects, actions):
        end = jnp.asarray(x["length"] - 1)
        a = objectives.ota(
            objects, jnp.asarray(x["object_mask"]), text, x["tags"] == 1, end, x["valid"]
        )
        b = objectives.asp(actions, text, x["tags"] == 3, end, x["valid"])
        return a.loss + b.loss

    text, objects, actions = jax.grad(loss, (0, 1, 2))(
        *map(jnp.asarray, (x["text"], x["objects"], x["actions"]))
    )
    assert not text.any()
    assert objects.any() and actions.any()


def test_nothing_valid_is_zero_not_nan():
    x = make_batch(0)
    none = jnp.zeros(B, bool)
    end = jnp.asarray(x["length"] - 1)
    losses = [
        objectives.vtc(unit(x["video"]), unit(x["text"][:, 0]), jnp.float32(20), none)[0],
        objectives.vtm(jnp.ones((B, 2)), none, none),
        objectives.ota(
            x["objects"], jnp.zeros((B, N), bool), x["text"], x["tags"] == 1, end, none
        ).loss,
        objectives.asp(x["actions"], x["text"], x["tags"] == 3, end, none).loss,
    ]
    np.testing.assert_array_equal(losses, 0)
