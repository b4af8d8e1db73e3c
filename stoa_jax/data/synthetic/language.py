"""Captions, questions and choices about a scene, in short and common English."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from stoa_jax.data.synthetic.scene import (
    ALONE,
    ALWAYS,
    COLOURS,
    DIRECTIONS,
    FIRST,
    SHAPES,
    SYMMETRIC,
    THEN,
    TOGETHER,
    Event,
    Scene,
)

# motion -> (third person, gerund), pairs of equal meaning; {} is the other object. The verb alone
# identifies the motion, left or right included, and the last of its pieces in a vocabulary cut at
# 8,192 is unique to the motion: actions are matched to the feature of that piece, and since the
# text tower reads from left to right, the feature contains nothing after the verb
# (benchmarks/notes/motion.md).
PHRASES = {
    "left": (("moves to the left", "moving to the left"),),
    "right": (("goes to the right", "going to the right"),),
    "up": (("rises", "rising"), ("flies up", "flying up")),
    "down": (("falls", "falling"), ("drops", "dropping")),
    "circle": (("turns in a circle", "turning in a circle"), ("runs around", "running around")),
    "grow": (("grows", "growing"), ("swells", "swelling")),
    "shrink": (("shrinks", "shrinking"),),
    "blink": (("flashes", "flashing"), ("flickers", "flickering")),
    "approach": (("approaches {}", "approaching {}"), ("nears {}", "nearing {}")),
    "leave": (("leaves {}", "leaving {}"), ("flees from {}", "fleeing from {}")),
    "push": (("kicks {}", "kicking {}"), ("shoves {}", "shoving {}")),
    "behind": (("hides behind {}", "hiding behind {}"),),
    "front": (("covers {}", "covering {}"), ("crosses in front of {}", "crossing in front of {}")),
}
# of "A and B": plural verb, gerund
PLURAL = {
    "meet": (("come together", "coming together"), ("meet", "meeting")),
    "part": (("break apart", "breaking apart"), ("separate", "separating")),
}
REST = ("is waiting", "is standing still", "is resting")

MOST_WORDS = 20

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_DOES = {
    **{m: m + "s" for m in ("circle", "grow", "shrink", "blink")},
    "up": "rises",
    "down": "falls",
    "approach": "approaches",
    "leave": "leaves",
    "meet": "meets",
    "part": "separates",
    "push": "pushes",
    "behind": "hides",
    "front": "passes",
}
_REST = "rests"
ASKED = {  # motions that a question presupposes
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "circle": "circles around",
    "grow": "grows",
    "shrink": "shrinks",
    "blink": "blinks",
    "approach": "approaches {}",
    "leave": "leaves {}",
    "push": "pushes {}",
    "behind": "passes behind {}",
    "front": "passes in front of {}",
}
# Motions that also hold, or nearly, if the key does; they are no distractors of it.
NEARLY = {
    "approach": ("meet",),
    "meet": ("approach",),
    "leave": ("part",),
    "part": ("leave",),
    "push": ("approach", "meet", "leave"),
    "behind": ("approach", "leave", "meet", "part"),
    "front": ("approach", "leave", "meet", "part"),
}


def captions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[str]:
    """Return `count` different true sentences about the scene, each with every event."""
    return different(lambda: sentence(scene, rng), count)


def different(draw: Callable[[], str], count: int) -> list[str]:
    """Return the first `count` different texts that `draw` generates."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(draw(), None)
    return list(found)


def noun_phrase(article: str, words: Sequence[str]) -> str:
    """Return the words after "the", or after the right form of "a"."""
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return f"{article} {' '.join(words)}"


def sentence(scene: Scene, rng: np.random.Generator) -> str:
    """Return one sentence with all events of the scene and, if there is room, its other objects.

    Two scenes of the same plot get the same form from generators in the same state.
    """
    style = _Style(rng)
    one, *rest = scene.events
    clause = style.clause(scene, one)
    if rest:
        two = rest[0]
        if one.phase == ALWAYS:
            text = style.pick(f"{clause} while {style.clause(scene, two)}", f"{clause} and {{}}")
            text = text.format(style.clause(scene, two))
        elif one.subject == two.subject:
            name, first, then = (
                style.thing(scene, one.subject),
                style.verb(scene, one),
                style.verb(scene, two),
            )
            text = style.pick(
                f"{name} is {first[1]} and then {then[1]}",
                f"{name} first {first[0]}, then {then[0]}",
                f"after {first[1]}, {name} is {then[1]}",
                f"{name} is {first[1]} before {then[1]}",
                f"first {name} is {first[1]}, then it is {then[1]}",
            )
        else:
            after = style.clause(scene, two)
            text = style.pick(
                f"{clause} before {after}",
                f"{after} after {clause}",
                f"first {clause}, then {after}",
                f"{clause}, and then {after}",
            )
        # a background would often make it too long
        extras = ["", "", style.backdrop(scene)]
    else:
        still = scene.still()
        other = style.thing(scene, still[int(style.chance * len(still))]) if still else ""
        resting = style.pick(*REST)
        extras = [style.backdrop(scene), style.backdrop(scene)]
        extras += [f" while {other} {resting}"] * 2 if still else [""]
        text = clause
    extra = extras[int(style.last * len(extras))]
    return text + extra if len((text + extra).split()) <= MOST_WORDS else text


class _Style:
    """Random choices of one sentence; every scene takes equally many, to share forms."""

    def __init__(self, rng: np.random.Generator):
        self._draws = iter(rng.random(64))
        self.chance, self.last = next(self._draws), next(self._draws)
        self._article = "a" if next(self._draws) < 0.5 else "the"

    def pick(self, *options):
        return options[int(next(self._draws) * len(options))]

    def thing(self, scene: Scene, index: int) -> str:
        """Return a noun phrase that identifies one object of the scene, sometimes redundantly.

        Textures are not named: "striped" reads as a verb and would become an action's target.
        """
        thing = scene.things[index]
        sized = any(e.motion in ("grow", "shrink") and e.subject == index for e in scene.events)
        words = [thing.colour, thing.shape]
        draw = next(self._draws)
        if draw > 0.7 and not sized:
            words.insert(0, thing.size)
        return noun_phrase(self._article, words)

    def verb(self, scene: Scene, event: Event) -> tuple[str, str]:
        draw = self.pick(*range(12))
        phrases = PHRASES[event.motion]
        verb = phrases[draw % len(phrases)]
        if event.other is None:
            next(self._draws)
            return verb
        other = self.thing(scene, event.other)
        return verb[0].format(other), verb[1].format(other)

    def clause(self, scene: Scene, event: Event) -> str:
        """Return a main clause; taggers recognize "is moving" better, so "moves" is rarer."""
        name = self.thing(scene, event.subject)
        running = self.pick(True, True, True, False)
        if event.motion in SYMMETRIC:
            assert event.other is not None  # two objects act in a symmetric motion
            other = self.thing(scene, event.other)
            plural, gerund = self.pick(*PLURAL[event.motion])
            return f"{name} and {other} {f'are {gerund}' if running else plural}"
        third, gerund = self.verb(scene, event)
        return f"{name} {f'is {gerund}' if running else third}"

    def backdrop(self, scene: Scene) -> str:
        return f" on a {scene.background[1]} background"


# ------------------------------------------------------------------------------ questions


def questions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[tuple[str, str]]:
    """Return `count` questions with one-word answers; most of them need the order in time."""
    kinds: dict[str, list[tuple[str, str]]] = {
        kind: list(dict.fromkeys(asked)) for kind, asked in _askable(scene, rng).items() if asked
    }
    weights = {"does": 3.0, "way": 2.0, "what": 3.0, "colour": 3.0, "order": 3.0, "many": 0.8}
    weights |= {"rests": 0.3, "looks": 0.5}
    found: list[tuple[str, str]] = []
    while len(found) < count and kinds:
        names = sorted(kinds)
        odds = np.array([weights[name] for name in names])
        name = names[rng.choice(len(names), p=odds / odds.sum())]
        asked, answer = kinds[name].pop(int(rng.integers(len(kinds[name]))))
        found.append((asked + "?", answer))
        if not kinds[name]:
            del kinds[name]
    return found


def _askable(scene: Scene, rng: np.random.Generator) -> dict[str, list[tuple[str, str]]]:
    asked: dict[str, list[tuple[str, str]]] = {
        name: [] for name in ("does", "way", "what", "colour", "order", "many", "rests", "looks")
    }
    things, events = scene.things, scene.events

    def name(index):
        return f"the {things[index].colour} {things[index].shape}"

    when = {ALWAYS: "", FIRST: " first", THEN: " at the end"}
    for event in events:
        thing, motion, phase = things[event.subject], event.motion, when[event.phase]
        actors = [event.subject, event.other] if motion in SYMMETRIC else [event.subject]
        for actor in actors:
            if motion in DIRECTIONS:
                asked["way"].append((f"which way does {name(actor)} move{phase}", motion))
            if motion in _DOES:
                asked["does"].append((f"what does {name(actor)} do{phase}", _DOES[motion]))
        if motion in SYMMETRIC:
            verb = {"meet": "meets", "part": "moves away from"}[motion]
            for actor, other in (actors, actors[::-1]):
                asked["what"].append((f"what {verb} {name(other)}", things[actor].shape))
                asked["colour"].append(
                    (f"what color is the thing that {verb} {name(other)}", things[actor].colour)
                )
        elif len({e.subject for e in events if e.motion == motion}) == 1:
            verb = ASKED[motion].format(None if event.other is None else name(event.other))
            asked["what"].append((f"what {verb}{phase}", thing.shape))
            asked["colour"].append((f"what color is the thing that {verb}", thing.colour))
    if len(events) == 2 and events[0].phase == FIRST and events[0].subject != events[1].subject:
        pair = [events[0].subject, events[1].subject]
        one, two = (pair[i] for i in rng.permutation(2))
        if things[one].shape != things[two].shape:
            options = f"the {things[one].shape} or the {things[two].shape}"
            asked["order"] += [
                (f"which comes first, {options}", things[pair[0]].shape),
                (f"which moves last, {options}", things[pair[1]].shape),
            ]
        if things[one].colour != things[two].colour:
            options = f"the {things[one].colour} or the {things[two].colour} one"
            asked["order"].append((f"which acts first, {options}", things[pair[0]].colour))
    asked["many"].append(("how many objects are there", _NUMBERS[len(things)]))
    for attribute, plural in (("shape", "{}s"), ("colour", "{} things")):
        counts = Counter(getattr(t, attribute) for t in things)
        for value, number in counts.items():
            if number > 1:
                noun = "crosses" if value == "cross" else plural.format(value)
                asked["many"].append((f"how many {noun} are there", _NUMBERS[number]))
    for index in scene.still():
        asked["rests"].append((f"what does {name(index)} do", _REST))
    for thing in things:
        if [t.shape for t in things].count(thing.shape) == 1:
            asked["looks"].append((f"what color is the {thing.shape}", thing.colour))
    return asked


def answer_words(max_objects: int = 4) -> tuple[str, ...]:
    """Return every possible answer in a world of at most `max_objects` objects per clip."""
    numbers = _NUMBERS[1 : max_objects + 1]
    return (*SHAPES, *COLOURS, *numbers, *DIRECTIONS, *dict.fromkeys(_DOES.values()), _REST)


# ------------------------------------------------------------------------------ choices


def choices(scene: Scene, rng: np.random.Generator) -> tuple[list[str], int]:
    """Return five sentences of one form, one of them true, and the index of that one."""
    wrong = false_scenes(scene, rng)
    form = int(rng.integers(2**63))
    true = sentence(scene, np.random.default_rng(form))
    options = [true]
    for other in wrong:
        text = sentence(other, np.random.default_rng(form))
        if text not in options:
            options.append(text)
        if len(options) == 5:
            break
    order = rng.permutation(5)
    return [options[i] for i in order], int(np.flatnonzero(order == 0)[0])


def false_scenes(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Return scenes that make every sentence false here: first two other motions, then two looks.

    Objects and motions weigh the same: a model that sees only one of them is right one time in
    three.
    """
    events, things = scene.events, scene.things
    done = {(e.subject, e.motion) for e in events}

    def with_events(*changed: Event) -> Scene:
        return dataclasses.replace(scene, events=changed)

    motions: list[Scene] = []
    for place, event in enumerate(events):
        if event.other is None:
            others = [m for m in ALONE if all((i, m) not in done for i in range(len(things)))]
        else:
            barred = (event.motion, *NEARLY[event.motion])
            others = [m for m in TOGETHER if m not in barred]
        for motion in others:
            changed = dataclasses.replace(event, motion=motion)
            motions.append(with_events(*events[:place], changed, *events[place + 1 :]))
    swaps: list[Scene] = []
    if len(events) == 2:
        one, two = events
        swapped = (
            dataclasses.replace(one, motion=two.motion),
            dataclasses.replace(two, motion=one.motion),
        )
        swaps.append(with_events(*swapped))
    elif events[0].motion not in SYMMETRIC and events[0].other is not None:
        one, other = events[0], events[0].other
        assert other is not None
        swaps.append(with_events(Event(one.motion, other, one.subject)))
    else:
        swaps += [
            with_events(dataclasses.replace(events[0], subject=i))
            for i in scene.still()
            if events[0].other is None
        ]
    looks: list[Scene] = []
    subject = events[0].subject
    for _ in range(12):
        shape, colour = things[subject].shape, things[subject].colour
        if rng.random() < 0.5:
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
        else:
            colour = COLOURS[int(rng.integers(len(COLOURS)))]
        if all((t.shape, t.colour) != (shape, colour) for t in things):
            thing = dataclasses.replace(things[subject], shape=shape, colour=colour)
            changed = tuple(thing if i == subject else t for i, t in enumerate(things))
            looks.append(dataclasses.replace(scene, things=changed))
    happens = _shuffled(swaps, rng)[:1] + _shuffled(motions, rng)
    looks = _shuffled(looks, rng)
    return happens[:2] + looks[:2] + happens[2:] + looks[2:]


def _shuffled(items: Sequence, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]
