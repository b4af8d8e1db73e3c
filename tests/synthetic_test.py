"""The synthetic world: the same every time, split by content, and true in all that it says."""

import re
from collections import Counter

import cv2
import numpy as np
import pytest

from stoa_jax.data import synthetic
from stoa_jax.data.synthetic import CLASS_NAMES, World, language, motion, render
from stoa_jax.data.synthetic import scene as scenes
from stoa_jax.errors import UserError
from stoa_jax.text import VERB, Tagger, Tokenizer, parse

COUNT = 200


@pytest.fixture(scope="module")
def clips():
    world = World("train", size=48)
    return [world.clip(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def many():
    world = World("train")
    return [world.scene(i) for i in range(1500)]


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
    """How much of each pixel thing k covers, [T, S, S], from how much background it hides."""
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
                # half covered is what counts; eight-bit pixels tell halves to a hundredth or two
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


# What a motion is, from exact boxes alone: centres [T, n, 2] and areas [T, n], NaN when unseen.


def measured(clip):
    shown = clip.true_classes >= 0
    boxes = np.where(shown[..., None], clip.true_boxes.astype(float), np.nan)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    sides = boxes[..., 2:] - boxes[..., :2]
    return centres, sides[..., 0] * sides[..., 1], shown


def ends(values):
    known = values[~np.isnan(values).reshape(len(values), -1).any(1)]
    return known[0], known[-1]


def holds(event, clip) -> bool:
    """Whether the event can be seen in the boxes."""
    name, a, b = event["motion"], event["subject"], event["other"]
    span = {0: slice(None), 1: slice(0, 6), 2: slice(6, None)}[event["phase"]]
    centres, areas, shown = (x[span] for x in measured(clip))
    if name == "blink":
        return not shown[:, a].all() and shown[:, a].any()
    first, last = ends(centres[:, a])
    dx, dy = last - first
    if name in ("left", "right"):
        return abs(dy) < 0.04 and (-dx if name == "left" else dx) > 0.1
    if name in ("up", "down"):
        return abs(dx) < 0.04 and (-dy if name == "up" else dy) > 0.1
    if name == "circle":
        return bool((np.nanmax(centres[:, a], 0) - np.nanmin(centres[:, a], 0)).min() > 0.12)
    if name in ("grow", "shrink"):
        small, large = ends(areas[:, a])
        return (large / small if name == "grow" else small / large) > 1.5
    apart = np.hypot(*np.moveaxis(centres[:, a] - centres[:, b], -1, 0))
    begin, end = ends(apart)
    other = np.hypot(*np.subtract(*ends(centres[:, b])))
    if name == "push":
        return other > 0.1 and begin > end
    if name in ("approach", "meet"):
        return begin - end > 0.12 and (other > 0.06) == (name == "meet")
    if name in ("leave", "part"):
        return end - begin > 0.12 and (other > 0.06) == (name == "part")
    return np.nanmin(apart) < 0.13 and begin > 0.12  # which is behind, the pixels below say


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
        # a fifth at the least: a thin moon hides little of a big square
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


def test_captions_are_many_short_and_different(many):
    found = [language.captions(s, np.random.default_rng(i)) for i, s in enumerate(many[:600])]
    assert all(len(set(c)) == len(c) >= 3 for c in found)
    flat = [text for texts in found for text in texts]
    assert len(set(flat)) > 0.97 * len(flat)
    words = [len(text.split()) for text in flat]
    assert max(words) <= 20 and 6 <= np.median(words) <= 15
    assert len({word for text in flat for word in re.findall("[a-z]+", text)}) > 100
    assert len({text.split()[0] for text in flat}) >= 5
    plain = re.compile("[a-z]+(,? [a-z]+)*")
    assert all(plain.fullmatch(text) for text in flat), "doubled spaces or unfilled places"
    assert not any(re.search(r"\ba [aeiou]|there is the|there are the", text) for text in flat)


def described(text):
    """Colour and shape of every thing in a text, in order."""
    colours, shapes = "|".join(scenes.COLOURS), "|".join(CLASS_NAMES)
    return re.findall(rf"\b({colours}) ({shapes})\b", text)


def motions_in(text):
    """The motions that a text speaks of, from its words alone."""
    found = set()
    for name, phrases in (*language.PHRASES.items(), *language.PLURAL.items()):
        for phrase in (form for pair in phrases for form in pair):
            head = phrase.replace(" {}", "")
            if name in ("behind", "front") and " " in head:
                head = head.split(" ", 1)[1]
            if re.search(rf"\b{head}\b", text):
                found.add(name)
    return found


def test_a_verb_of_motion_is_told_by_its_last_piece_and_tagged_as_a_verb():
    tokenizer, tagger = Tokenizer(8192), Tagger()
    motions = {}  # last piece of a gerund -> what it says
    for name, phrases in (*language.PHRASES.items(), *language.PLURAL.items()):
        for _, gerund in phrases:
            verb = gerund.split()[0]
            subject = (
                "a red ball and a blue star are" if name in language.PLURAL else "a red ball is"
            )
            parsed = parse(f"{subject} {gerund.format('a pink moon')}", tokenizer, tagger)
            (place,) = np.flatnonzero(parsed.tags == VERB)
            assert verb.endswith(tokenizer.decode([parsed.tokens[place]]).strip())
            motions.setdefault(int(parsed.tokens[place]), set()).add(name)
    assert len(motions) >= 20 and all(len(said) == 1 for said in motions.values()), motions


def test_captions_speak_of_the_clip_and_mostly_of_no_other(many):
    world = World("test")
    test = [world.scene(i) for i in range(200)]
    content = [
        (
            {(t.colour, t.shape) for t in s.things},
            {e.motion for e in s.events},
            s.background[1],
        )
        for s in test
    ]
    alone = 0
    for i, scene in enumerate(test):
        text = language.captions(scene, np.random.default_rng(i))[0]
        things, motions = set(described(text)), motions_in(text)
        assert things <= content[i][0] and motions == content[i][1], text
        tone = re.search(r"(\w+) background", text)
        alone += 1 == sum(
            things <= c and motions == m and (tone is None or tone[1] == ground)
            for c, m, ground in content
        )
    assert alone >= 0.85 * len(test)


def motion_of_answer(answer):
    return {"rises": "up", "falls": "down", "hides": "behind", "passes": "front"}.get(
        answer, next((m for m in scenes.MOTIONS if answer.startswith(m[:4])), answer)
    )


def test_answers_are_true_of_the_boxes(clips):
    checked = Counter()
    for clip in clips:
        things, events = clip.program["objects"], clip.program["motions"]
        names = [f"{t['colour']} {t['shape']}" for t in things]
        for question, answer in clip.questions:
            assert question.endswith("?") and " " not in answer
            whole = re.fullmatch(r"(which way|what) does the (\w+ \w+) (do|move)(.*)\?", question)
            if question == "how many objects are there?":
                visible = (clip.true_classes >= 0).any(0).sum()
                assert answer == ("zero", "one", "two", "three", "four")[visible]
                checked["count"] += 1
            elif whole and answer == "rests":
                k = names.index(whole[2])
                assert all(k not in (e["subject"], e["other"]) for e in events)
                checked["rest"] += 1
            elif whole:
                k = names.index(whole[2])
                wanted = motion_of_answer(answer)
                wanted = "part" if answer == "separates" else wanted
                phase = {"": 0, " first": 1, " at the end": 2}[whole[4]]
                other = next(e for e in events if k in (e["subject"], e["other"]))
                claim = {"motion": wanted, "subject": k, "other": None, "phase": phase}
                if wanted in scenes.TOGETHER:
                    claim["other"] = ({other["subject"], other["other"]} - {k}).pop()
                assert holds(claim, clip), (question, answer, events)
                checked["does"] += 1
            elif match := re.fullmatch(r"(what color is the thing that|what) (.*)\?", question):
                told = motions_in(match[2])
                for event in events:
                    if told == {event["motion"]} and event["other"] is None:
                        attribute = "shape" if match[1] == "what" else "colour"
                        assert things[event["subject"]][attribute] == answer
                        assert holds(event, clip)
                        checked["who"] += 1
            elif question.startswith("which"):
                order = [things[e["subject"]] for e in sorted(events, key=lambda e: e["phase"])]
                right = order[-1] if "last" in question else order[0]
                assert answer in (right["shape"], right["colour"]) and f" {answer}" in question
                checked["order"] += 1
    assert all(checked[kind] >= 10 for kind in ("count", "rest", "does", "who", "order")), checked


def test_no_answer_is_the_safe_one(many):
    answers, by_start = Counter(), {}
    for i, scene in enumerate(many):
        asked = language.questions(scene, np.random.default_rng(i))
        assert len(asked) >= 4 and len(set(asked)) == len(asked)
        for question, answer in asked:
            answers[answer] += 1
            by_start.setdefault(" ".join(question.split()[:2]), Counter())[answer] += 1
    assert answers.most_common(1)[0][1] <= 0.15 * answers.total()
    assert set(answers) == set(language.answer_words()) and len(answers) <= 60
    assert sum(c.most_common(1)[0][1] for c in by_start.values()) <= 0.3 * answers.total()


def test_four_of_five_choices_are_false_and_hard(clips, many):
    places = Counter()
    for clip in clips:
        options, right = clip.choices
        assert len(set(options)) == 5
        places[right] += 1
        names = {(t["colour"], t["shape"]) for t in clip.program["objects"]}
        assert set(described(options[right])) <= names
        assert motions_in(options[right]) == {e["motion"] for e in clip.program["motions"]}
        alike = [o for i, o in enumerate(options) if i != right and set(described(o)) <= names]
        assert len(alike) >= 2, "two at least must differ in what happens alone"
        assert len(alike) < 4, "one at least must differ in what is there"
    assert set(places) == set(range(5)) and max(places.values()) < 0.35 * len(clips)

    for i, scene in enumerate(many[:400]):
        true = {(e.phase, e.motion, e.subject, e.other) for e in scene.events}
        for wrong in language.false_scenes(scene, np.random.default_rng(i)):
            if wrong.things != scene.things:
                changed = set(wrong.things) - set(scene.things)
                assert {(t.colour, t.shape) for t in changed}.isdisjoint(
                    (t.colour, t.shape) for t in scene.things
                )
                continue
            claims = {(e.phase, e.motion, e.subject, e.other) for e in wrong.events}
            assert claims - true
            for _, name, subject, other in claims - true:
                for event in scene.events:
                    if {subject, other} == {event.subject, event.other}:
                        assert name not in language.NEARLY.get(event.motion, ())


def test_false_motions_are_false_in_the_boxes(clips):
    world = World("train", size=48)
    checked = 0
    for index, clip in enumerate(clips[:120]):
        scene = world.scene(index)
        for wrong in language.false_scenes(scene, np.random.default_rng(0)):
            if wrong.things != scene.things or any(e.other is not None for e in scene.events):
                continue
            claims = wrong.as_dict()["motions"]
            assert not all(holds(claim, clip) for claim in claims), (scene.events, claims)
            checked += 1
    assert checked > 200


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
    with pytest.raises(UserError, match="max_objects=9: choose from 1 to 4"):
        World("train", max_objects=9)
    with pytest.raises(UserError, match="synthetic/poems: the kinds are captions"):
        synthetic.as_clip(clips[0], "poems")
