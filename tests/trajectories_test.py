import jax
import numpy as np
import pytest

from stoa_jax.ops import packed_attention_mask, select_trajectories

T, K = 4, 5


def _objects(seed, t=T, k=K, classes=7):
    rng = np.random.default_rng(seed)
    scores = rng.random((t, k)).astype(np.float32)
    if seed % 3 == 0:  # many ties
        scores = np.round(scores * 2) / 2
    ids = rng.integers(0, classes, (t, k)) * 1000
    return np.where(rng.random((t, k)) < 0.3, -1, ids).astype(np.int32), scores


def _reference(classes, scores, num, choice):
    flat, scores = classes.reshape(-1), scores.reshape(-1).astype(np.float64)
    met = list(dict.fromkeys(int(c) for c in flat if c >= 0))
    if choice == "largest":
        met.sort(key=lambda c: (-scores[flat == c].sum(), c))
    chosen = np.full(num, -1)
    chosen[: len(met[:num])] = met[:num]
    return chosen, (flat == chosen[:, None]) & (chosen[:, None] >= 0)


@pytest.mark.parametrize("choice", ["largest", "first_met"])
@pytest.mark.parametrize("num", [1, 3, 7, 30])
def test_equals_numpy(num, choice):
    select = jax.jit(jax.vmap(lambda c, s: select_trajectories(c, s, num, choice)))
    batch = [_objects(seed) for seed in range(30)]
    got = select(*map(np.stack, zip(*batch, strict=True)))
    for i, objects in enumerate(batch):
        chosen, membership = _reference(*objects, num, choice)
        np.testing.assert_array_equal(got[0][i], chosen)
        np.testing.assert_array_equal(got[1][i], membership)


def test_ties_go_to_the_smaller_class_wherever_it_stands():
    # 0.1 + 0.2 + 0.3 differs in float32 from 0.3 + 0.2 + 0.1 by less than two classes may.
    classes = np.int32([[9, 4, 9, 4, 9, 4]])
    scores = np.float32([[0.25, 0.5, 0.5, 0.75, 0.75, 0.25]])
    for order in (np.arange(6), np.arange(6)[::-1]):
        chosen, _ = select_trajectories(classes[:, order], scores[:, order], 2)
        np.testing.assert_array_equal(chosen, [4, 9])


def test_without_objects_all_is_padding():
    for classes in (np.full((T, K), -1, np.int32), np.zeros((T, 0), np.int32)):
        for choice in ("largest", "first_met"):
            scores = np.full(classes.shape, 0.5, np.float32)
            chosen, membership = select_trajectories(classes, scores, 3, choice)
            assert (np.asarray(chosen) == -1).all()
            assert not np.asarray(membership).any()
            assert (
                np.asarray(packed_attention_mask(membership, classes.reshape(-1) >= 0)).any(1).all()
            )


def test_padding_changes_nothing():
    classes, scores = _objects(1)
    padded = np.pad(classes, ((0, 0), (0, 2)), constant_values=-1)
    noise = np.pad(scores, ((0, 0), (0, 2)), constant_values=np.nan)
    want, member = select_trajectories(classes, scores, 4)
    got, padded_member = select_trajectories(padded, noise, 4)
    np.testing.assert_array_equal(got, want)
    real = np.asarray(padded_member).reshape(4, T, K + 2)
    np.testing.assert_array_equal(real[..., :K], np.asarray(member).reshape(4, T, K))
    assert not real[..., K:].any()


@pytest.mark.parametrize("num", [2, 4, 10])
@pytest.mark.parametrize("seed", range(5))
def test_the_mask_equals_numpy(seed, num):
    classes, scores = _objects(seed)
    flat = classes.reshape(-1)
    chosen, membership = select_trajectories(classes, scores, num)
    mask = np.asarray(jax.jit(packed_attention_mask)(membership, flat >= 0))
    token_class = np.concatenate([np.asarray(chosen), flat])
    for i in range(num + T * K):
        for j in range(num + T * K):
            together = token_class[i] == token_class[j] and token_class[i] in chosen
            assert mask[i, j] == (i == j or (together and token_class[i] >= 0))


def _attend(x, mask):
    logits = np.where(mask, x @ x.T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return x + weights / weights.sum(1, keepdims=True) @ x


def test_the_packed_sequence_equals_separate_ones():
    """Three layers of plain attention, so that what leaks in one layer shows in the next."""
    num, width = 4, 6
    classes, scores = _objects(2)
    flat = classes.reshape(-1)
    chosen, membership = (np.asarray(x) for x in select_trajectories(classes, scores, num))
    rng = np.random.default_rng(0)
    cls, objects = rng.normal(size=(1, width)), rng.normal(size=(T * K, width))
    mask = np.asarray(packed_attention_mask(membership, flat >= 0))
    packed = np.concatenate([np.repeat(cls, num, 0), objects])
    separate = [np.concatenate([cls, objects]) for _ in range(num)]
    for _ in range(3):
        packed = _attend(packed, mask)
        for i in range(num):
            keys = np.concatenate([[True], membership[i]])
            separate[i] = _attend(separate[i], np.broadcast_to(keys, (1 + T * K,) * 2))
    assert (chosen >= 0).sum() > 2
    assert np.isfinite(packed).all()
    for i in range(num):
        np.testing.assert_allclose(packed[i], separate[i][0], rtol=1e-12)


def test_a_clear_error():
    classes, scores = _objects(0)
    with pytest.raises(ValueError, match="'smallest'"):
        select_trajectories(classes, scores, 3, choice="smallest")
    with pytest.raises(ValueError, match=r"\[T, K\]"):
        select_trajectories(classes, scores[:, 1:], 3)
