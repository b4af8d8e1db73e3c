"""Parsed texts of the synthetic world agree with the scene."""

import numpy as np
import pytest

from stoa_jax.data.synthetic import World, language, reading
from stoa_jax.data.synthetic.scene import SYMMETRIC


def events(scene):
    things = [(thing.colour, thing.shape) for thing in scene.things]
    found = set()
    for event in scene.events:
        subject = things[event.subject]
        other = None if event.other is None else things[event.other]
        if event.motion in SYMMETRIC:
            subject, other = sorted([subject, other])
        found.add(reading.Claim(event.motion, subject, other))
    return frozenset(found)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_caption_claims_its_scenes_events(split):
    world = World(split)
    for i in range(300):
        scene = world.scene(i)
        for caption in language.captions(scene, np.random.default_rng(i)):
            assert reading.claims(caption) == events(scene), caption


def test_captions_hold_of_their_clip_and_false_ones_do_not():
    world = World("validation")
    for i in range(200):
        scene, rng = world.scene(i), np.random.default_rng(i)
        first, *others = language.captions(scene, rng)
        assert reading.holds(first, others)
        for false in language.false_scenes(scene, rng):
            if events(false) != events(scene):  # not only another order in time
                text = language.sentence(false, rng)
                assert not reading.holds(text, others) or nearly(false, scene), text


def nearly(one, other):
    """Return whether the scenes differ only in motions that are hard to tell apart."""
    pairs = zip(one.events, other.events, strict=True)
    return all(a == b or b.motion in language.NEARLY.get(a.motion, ()) for a, b in pairs)


def test_what_is_true_of_part_of_a_clip_holds_and_no_text_of_nothing():
    clip = ["a red star is rising while a blue ring is falling"]
    assert reading.holds("the red star is flying up", clip)
    assert not reading.holds("the red star is flying up and the blue ring is growing", clip)
    assert not reading.holds("the blue star is flying up", clip)
    assert not reading.holds("something else", clip)
    near = ["a red star and a blue ring are meeting"]
    assert reading.holds("a blue ring approaches a red star", near)


def test_the_kind_of_a_question_is_told_by_its_form():
    world, renamed = World("train"), {"rests": "does"}
    for i in range(200):
        asked = language._askable(world.scene(i), np.random.default_rng(i))
        for kind, questions in asked.items():
            for question, _ in questions:
                assert reading.question_kind(f"{question}?") == renamed.get(kind, kind), question
    assert reading.question_kind("who is there?") == "other"


def test_the_kind_of_a_wrong_option():
    right = "a red star is rising while a blue ring is waiting"
    assert reading.option_kind(right, "a red star is falling while a blue ring is waiting") == (
        "motion"
    )
    assert reading.option_kind(right, "a red moon is rising while a blue ring is waiting") == (
        "things"
    )
    kicks = "the red star kicks the blue ring"
    assert reading.option_kind(kicks, "the blue ring kicks the red star") == "roles"
    assert reading.option_kind("a man walks", "a dog runs") == "other"
    world = World("test")
    for i in range(100):
        options, place = language.choices(world.scene(i), np.random.default_rng(i))
        kinds = {reading.option_kind(options[place], o) for o in options if o != options[place]}
        assert kinds <= set(reading.CHOICES) - {"other"} and len(kinds) > 1
