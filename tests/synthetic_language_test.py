"""Texts about synthetic clips: captions, answers and options are true and not guessable."""

import re
from collections import Counter

import numpy as np
import synthetic_world
from synthetic_world import holds

from stoa_jax.data.synthetic import CLASS_NAMES, World, language
from stoa_jax.data.synthetic import scene as scenes
from stoa_jax.text import VERB, Tagger, Tokenizer, parse

clips, many = synthetic_world.clips, synthetic_world.many


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
    """Return colour and shape of every object in a text, in order."""
    colours, shapes = "|".join(scenes.COLOURS), "|".join(CLASS_NAMES)
    return re.findall(rf"\b({colours}) ({shapes})\b", text)


def motions_in(text):
    """Return the motions that a text describes, from its words alone."""
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
    motions = {}  # last piece of a gerund -> its motion
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
