"""The synthetic world: reproducible, split by content, and rendered as its programs say."""

import re
from collections import Counter

import cv2
import numpy as np
import pytest
import synthetic_world
from synthetic_world import holds, measured

from stoa_jax.data import synthetic
from stoa_jax.data.synthetic import CLASS_NAMES, World, language, motion, render
from stoa_jax.data.synthetic import scene as scenes
from stoa_jax.errors import UserError

clips, many = synthetic_world.clips, synthetic_world.many


def same(one, two):
    for name, value in vars(one).items():
        other = getattr(two, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
        else:
            assert value == other, name


def test_a_clip_depends_on_seed_split_and_index_only():
    world = World("test", seed=3, size=32, frames=6)
    forward = [world.clip(i) for i in range(6)]
    for i in (5, 0, 3):
        same(forward[i], World("test", seed=3, size=32, frames=6).clip(i))
    assert World("test", seed=4).scene(0) != world.scene(0)
    assert World("validation", seed=3).scene(0) != world.scene(0)


def test_splits_share_no_scene_even_across_seeds():
    keys = {
        split: {scenes.key(World(split, seed).scene(i)) for seed in (0, 1) for i in range(200)}
        for split in scenes.SPLITS
    }
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    assert all(len(found) > 350 for found in keys.values())


def test_the_key_sees_content_and_not_order_or_paint():
    star = scenes.Thing("star", "red", "plain", "big")
    ball = scenes.Thing("ball", "blue", "dotted", "small")
    one = scenes.Scene((star, ball), ("plain", "tan"), (scenes.Event("meet", 0, 1),))
    two = scenes.Scene((ball, star), ("checked", "navy"), (scenes.Event("meet", 0, 1),))
    other = scenes.Scene((ball, star), ("plain", "tan"), (scenes.Event("part", 0, 1),))
    assert scenes.key(one) == scenes.key(two) != scenes.key(other)
    assert scenes.split_of(one) == scenes.split_of(two)


def test_every_attribute_and_motion_is_in_training(many):
    assert {e.motion for s in many for e in s.events} == set(scenes.MOTIONS)
    assert {t.shape for s in many for t in s.things} == set(scenes.SHAPES)
    assert {t.colour for s in many for t in s.things} == set(scenes.COLOURS)
    assert {t.texture for s in many for t in s.things} == set(scenes.TEXTURES)
    assert {s.background for s in many} == {
        (kind, tone) for kind in scenes.BACKGROUNDS for tone in scenes.TONES
    }
    assert {len(s.things) for s in many} == {1, 2, 3, 4}


def test_siblings_look_the_same_and_do_something_else():
    world = World("test", siblings=3)
    for group in range(20):
        found = [world.scene(3 * group + i) for i in range(3)]
        assert len({(s.things, s.background) for s in found}) == 1
        assert len({scenes.key(s) for s in found}) == 3


def coverage(scene, tracks, k, size):
    """Return how much of each pixel object k covers, [T, S, S], from the background it hides."""
    alone = np.zeros_like(tracks.shown)
    alone[k] = tracks.shown[k]
    alone = motion.Tracks(tracks.centres, tracks.radii, alone, tracks.order)
    pictures, grounds = [], []
    for tone in ("tan", "navy"):
        over = scenes.Scene(scene.things, ("plain", tone), scene.events)
        for shown, into in ((alone, pictures), (None, grounds)):
            shown = shown or motion.Tracks(
                tracks.centres, tracks.radii, np.zeros_like(tracks.shown), tracks.order
            )
            into.append(render.draw(over, shown, size, np.random.default_rng(0))[0].astype(float))
    return 1 - (pictures[0] - pictures[1])[..., 0] / (grounds[0] - grounds[1])[..., 0]


def extents(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_boxes_are_the_pixels_that_show():
    world = World("validation", size=64, frames=6)
    seen = 0
    for index in range(24):
        scene = world.scene(index)
        tracks = motion.lay_out(scene, 6, np.random.default_rng(index))
        _, boxes, share = render.draw(scene, tracks, 64, np.random.default_rng(0))
        covers = [coverage(scene, tracks, k, 64) for k in range(len(scene.things))]
        for k in range(len(scene.things)):
            above = tracks.order[tracks.order.index(k) + 1 :]
            hidden = np.max([covers[j] for j in above] + [np.zeros_like(covers[k])], 0)
            for t in range(6):
                # half covered counts; eight-bit pixels resolve halves to one or two hundredths
                most = (covers[k][t] > 0.48) & (hidden[t] < 0.52)
                least = (covers[k][t] > 0.52) & (hidden[t] < 0.48)
                if not least.any() or share[t, k] == 0:
                    assert least.any() == (share[t, k] > 0) or most.any()
                    assert share[t, k] > 0 or not boxes[t, k].any()
                    continue
                seen += 1
                inner, outer = extents(least), extents(most)
                box = np.round(boxes[t, k] * 64).astype(int)
                assert (box[:2] <= inner[:2]).all() and (box[2:] >= inner[2:]).all()
                assert (box[:2] >= outer[:2]).all() and (box[2:] <= outer[2:]).all()
        assert (share.T[~tracks.shown] == 0).all()
    assert seen > 200


def test_shapes_stay_inside_and_large_enough_to_read(clips):
    sides = []
    for clip in clips:
        shown = clip.true_classes >= 0
        assert (clip.true_boxes >= 0).all() and (clip.true_boxes <= 1).all()
        extent = (clip.true_boxes[..., 2:] - clip.true_boxes[..., :2]).max(-1) * 48
        sides += [
            extent[:, k][shown[:, k]].max() for k in range(shown.shape[1]) if shown[:, k].any()
        ]
    assert np.percentile(sides, 5) >= 9 and np.median(sides) >= 10


def test_detections_are_padded_sorted_and_imperfect(clips):
    missed, wrong, error, seen = 0, 0, [], 0
    for clip in clips:
        assert clip.boxes.shape == (12, 10, 4) and clip.boxes.dtype == np.float32
        assert clip.classes.shape == clip.scores.shape == (12, 10)
        padding = clip.classes < 0
        assert (clip.classes[padding] == -1).all() and (clip.classes < len(CLASS_NAMES)).all()
        assert not clip.boxes[padding].any() and not clip.scores[padding].any()
        assert (clip.scores[~padding] > 0).all() and (clip.scores < 1).all()
        assert (np.diff(clip.scores, axis=1) <= 0).all()
        assert (clip.boxes[..., 2:] > clip.boxes[..., :2])[~padding].all()
        for t in range(12):
            for box, kind in zip(clip.true_boxes[t], clip.true_classes[t], strict=True):
                if kind < 0:
                    continue
                seen += 1
                near = np.abs(clip.boxes[t] - box).max(-1)
                best = int(near.argmin())
                if near[best] > 0.08:
                    missed += 1
                else:
                    error.append(near[best])
                    wrong += clip.classes[t, best] != kind
    assert 0.01 < missed / seen < 0.2
    assert 0.005 < wrong / seen < 0.1
    assert 0.003 < np.mean(error) < 0.03


def test_hidden_things_are_less_sure():
    boxes = np.tile(np.array([0.2, 0.2, 0.45, 0.45], np.float32), (400, 1, 1))
    classes = np.zeros((400, 1), np.int32)
    rng = np.random.default_rng(0)
    _, _, clear = synthetic.detect(boxes, classes, np.ones((400, 1), np.float32), 10, rng)
    _, _, hidden = synthetic.detect(boxes, classes, np.full((400, 1), 0.3, np.float32), 10, rng)
    assert clear[:, 0].mean() > hidden[:, 0].mean() + 0.2


def test_what_passes_behind_is_the_one_that_is_covered(many):
    seen = Counter()
    for i, scene in enumerate(many[:600]):
        event = scene.events[0]
        if event.motion not in ("behind", "front"):
            continue
        tracks = motion.lay_out(scene, 12, np.random.default_rng(i))
        _, _, share = render.draw(scene, tracks, 64, np.random.default_rng(i))
        below, above = event.subject, event.other
        if event.motion == "front":
            below, above = above, below
        # at least a fifth: a thin moon hides little of a big square
        assert share[:, below].min() < 0.8 and share[:, above].min() == 1
        seen[event.motion] += 1
    assert min(seen["behind"], seen["front"]) >= 10


def test_every_event_can_be_read_off_the_boxes(clips):
    seen, told = Counter(), Counter()
    for clip in clips:
        for event in clip.program["motions"]:
            seen[event["motion"]] += 1
            told[event["motion"]] += holds(event, clip)
    assert set(seen) == set(scenes.MOTIONS)
    assert {name: told[name] for name in seen} == dict(seen)


def test_what_does_not_act_rests(clips):
    for clip in clips:
        acting = {i for e in clip.program["motions"] for i in (e["subject"], e["other"])}
        if len(acting) == len(clip.program["objects"]):
            continue
        centres, _, shown = measured(clip)
        for k in set(range(shown.shape[1])) - acting:
            assert np.nanmax(np.ptp(centres[:, k], 0)) < 0.25 or not shown[:, k].all()


def test_another_size_shows_the_same_clip():
    small, large = (World("train", size=size).clip(4) for size in (32, 96))
    assert small.captions is not large.captions and small.program == large.program
    shrunk = cv2.resize(large.frames[0], (32, 32), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(shrunk - small.frames[0]).mean() < 20
    np.testing.assert_allclose(small.true_boxes, large.true_boxes, atol=2.5 / 32)


def test_a_picture_is_named_whole_and_says_nothing_of_motion():
    world = World("train", size=48, frames=1)
    seen = Counter()
    for i in range(300):
        picture = world.picture(i)
        same(picture, World("train", size=48, frames=1).picture(i))
        things = picture.program["objects"]
        assert picture.frames.shape == (1, 48, 48, 3) and not picture.program["motions"]
        assert (picture.true_classes[0] >= 0).all() and len(picture.true_boxes[0]) == len(things)
        assert len(set(picture.captions)) == 3 and not picture.questions
        for caption in picture.captions:
            named = re.findall(r"(\w+) (\w+)(?=,| and| on|$)", caption.split(" on a ")[0])
            assert sorted(named) == sorted((t["colour"], t["shape"]) for t in things)
        seen.update((t["shape"], t["colour"]) for t in things)
    assert len(seen) > 80  # of 90: one split teaches nearly all names
    assert len(CLASS_NAMES) == len({shape for shape, _ in seen})


def test_splits_share_no_picture():
    pictures = {
        split: {str(World(split, frames=1, size=16).picture(i).program) for i in range(150)}
        for split in scenes.SPLITS
    }
    assert not pictures["train"] & pictures["validation"] | pictures["train"] & pictures["test"]


def test_a_shape_is_told_by_its_middle():
    middles = {
        shape: tuple(render._fine(shape, colour, "plain")[render._FINE // 2, render._FINE // 2])
        for shape in CLASS_NAMES
        for colour in scenes.COLOURS
    }
    assert len(set(middles.values())) == len(CLASS_NAMES)


def test_a_crowd_fits_and_every_thing_can_be_counted():
    world = World("train", size=64, frames=4, max_objects=8)
    clips = [world.clip(i) for i in range(0, 60, 2)]
    counts = [len(clip.program["objects"]) for clip in clips]
    assert max(counts) == 8 and len(set(counts)) > 4
    asked = dict(pair for clip in clips for pair in clip.questions)
    assert {answer for _, answer in asked.items()} <= set(language.answer_words(8))
    for clip in clips:
        low, high = clip.true_boxes[..., :2], clip.true_boxes[..., 2:]
        shown = clip.true_classes >= 0
        assert (low >= 0).all() and (high <= 1).all()
        assert shown.any(0).all()  # nothing is hidden for the whole clip
        found = (clip.classes >= 0).sum(1)
        assert found.max() <= 10 and found.mean() > 0.6 * shown.sum(1).mean()


def test_twins_are_two_things_of_one_class_in_every_clip():
    world = World("train", max_objects=3, twins=1)
    for index in range(40):
        things = world.scene(index).things
        assert things[0].shape == things[1].shape and things[0].colour != things[1].colour
    assert World("train", max_objects=3).scene(0) == World("train", max_objects=3, twins=0).scene(0)
    with pytest.raises(UserError, match="max_objects=1: choose from 2 to 8"):
        World("train", max_objects=1, twins=1)


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_a_clip_becomes_what_a_source_yields(clips, kind):
    clip = synthetic.as_clip(clips[0], kind)
    assert len(clip.frames) == 12 and clip.video_id == clips[0].video_id
    texts, answers = len(clip.texts), len(clip.answers)
    expected = {"captions": answers == 0, "qa": answers == texts, "multiple_choice": texts == 5}
    expected["pictures"] = expected["captions"]
    assert expected[kind] and texts >= 3
    if kind == "multiple_choice":
        assert clip.texts[int(clip.answers[0])] == clips[0].choices[0][clips[0].choices[1]]


def test_bad_requests_say_what_is_wrong(clips):
    with pytest.raises(UserError, match="synthetic split 'dev': choose one of train"):
        World("dev")
    with pytest.raises(UserError, match="max_objects=9: choose from 1 to 8"):
        World("train", max_objects=9)
    with pytest.raises(UserError, match="synthetic/poems: the kinds are captions"):
        synthetic.as_clip(clips[0], "poems")
