import jax
import numpy as np
import pytest

from stoa_jax.ops import packed_attention_mask, select_trajectories, track_objects

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
    """Three layers of plain attention, so that a leak in one layer shows in the next."""
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


def _things(seed, t=8, things=4, classes=2, missing=0.2):
    """Objects of things that drift slowly, far apart: classes, boxes, and whose each object is."""
    rng = np.random.default_rng(seed)
    homes = np.stack(np.meshgrid([0.2, 0.8], [0.2, 0.8]), -1).reshape(4, 2)[:things]
    centres = homes + np.cumsum(rng.uniform(-0.04, 0.04, (t, things, 2)), 0)
    side = rng.uniform(0.1, 0.2, (1, things, 1))
    boxes = np.concatenate([centres - side / 2, centres + side / 2], -1).astype(np.float32)
    kinds = np.where(rng.random((t, things)) < missing, -1, np.arange(things) % classes)
    owners = np.where(kinds < 0, -1, np.arange(things))
    order = np.argsort(rng.random((t, things)), 1)  # in any order within a frame
    rows = np.arange(t)[:, None]
    return kinds[rows, order].astype(np.int32), boxes[rows, order], owners[rows, order]


def _partition(labels):
    flat = np.asarray(labels).reshape(-1)
    groups = {name: frozenset(np.flatnonzero(flat == name).tolist()) for name in set(flat)}
    return {members for name, members in groups.items() if name >= 0}


def _random_boxes(seed, shape=(T, K)):
    low = np.random.default_rng(seed).random((*shape, 2))
    return np.concatenate([low, low + 0.3], -1).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_tracks_are_things_where_things_stay_apart(seed):
    classes, boxes, owners = _things(seed)
    assert _partition(track_objects(classes, boxes)) == _partition(owners)


@pytest.mark.parametrize("seed", range(6))
def test_a_track_has_one_class_and_at_most_one_object_in_a_frame(seed):
    classes, _ = _objects(seed)
    track = np.asarray(track_objects(classes, _random_boxes(seed)))
    flat = classes.reshape(-1)
    assert ((track >= 0) == (classes >= 0)).all()
    for members in _partition(track):
        assert len({flat[i] for i in members}) == 1
        assert len({i // K for i in members}) == len(members)
        assert track.reshape(-1)[min(members)] == min(members)  # named by its first object


def test_tracks_do_not_depend_on_the_order_within_a_frame():
    classes, _ = _objects(2)
    boxes = _random_boxes(2)
    want = _partition(track_objects(classes, boxes))
    order = np.random.default_rng(0).permuted(np.tile(np.arange(K), (T, 1)), axis=1)
    rows = np.arange(T)[:, None]
    moved = np.asarray(track_objects(classes[rows, order], boxes[rows, order]))
    back = np.empty_like(moved)
    back[rows, order] = moved
    assert _partition(back) == want


def test_a_track_survives_a_gap_and_ends_at_a_jump():
    here, near, far = [0.1, 0.1, 0.2, 0.2], [0.25, 0.1, 0.35, 0.2], [0.8, 0.8, 0.9, 0.9]
    boxes = np.float32([[here], [here], [near], [far]])
    assert np.asarray(track_objects(np.int32([[3], [-1], [3], [3]]), boxes)).T.tolist() == [
        [0, -1, 0, 3]
    ]
    # Without a frame in between, the same step is out of reach.
    boxes = np.float32([[here], [near], [near], [far]])
    assert np.asarray(track_objects(np.int32([[3], [3], [3], [3]]), boxes)).T.tolist() == [
        [0, 1, 1, 3]
    ]


@pytest.mark.parametrize("seed", range(4))
def test_one_thing_of_a_class_makes_tracked_equal_to_largest(seed):
    classes, boxes, _ = _things(seed, classes=4)
    scores = np.random.default_rng(seed).random(classes.shape, np.float32)
    want = select_trajectories(classes, scores, 5)
    got = jax.jit(lambda *x: select_trajectories(*x[:2], 5, "tracked", x[2]))(
        classes, scores, boxes
    )
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_things_of_a_class_are_two_trajectories():
    classes, boxes, owners = _things(1, classes=1, missing=0.0)
    scores = np.where(owners == 2, 0.9, 0.2 + 0.1 * owners).astype(np.float32)
    chosen, member = select_trajectories(classes, scores, 3, "tracked", boxes)
    np.testing.assert_array_equal(chosen, [0, 0, 0])
    for row, thing in zip(np.asarray(member), (2, 3, 1), strict=True):  # the surest first
        np.testing.assert_array_equal(row, owners.reshape(-1) == thing)
    chosen, member = select_trajectories(classes, scores, 3)
    np.testing.assert_array_equal(chosen, [0, -1, -1])
    assert np.asarray(member)[0].all()


def test_a_clear_error():
    classes, scores = _objects(0)
    with pytest.raises(ValueError, match=r"'tracked' needs boxes \(4, 5, 4\); they are None"):
        select_trajectories(classes, scores, 3, choice="tracked")
    with pytest.raises(ValueError, match="'smallest'"):
        select_trajectories(classes, scores, 3, choice="smallest")
    with pytest.raises(ValueError, match=r"\[T, K\]"):
        select_trajectories(classes, scores[:, 1:], 3)
