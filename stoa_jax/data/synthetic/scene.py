"""The events of a synthetic clip as a small program: objects, a background, events in time.

A hash of the program decides its split, so that no scene is in two splits.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

SHAPES = (
    "ball",
    "square",
    "triangle",
    "star",
    "heart",
    "moon",
    "cross",
    "ring",
    "diamond",
    "arrow",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "big")
TONES = ("gray", "tan", "teal", "navy")
BACKGROUNDS = ("plain", "shaded", "grainy", "striped", "checked")

DIRECTIONS = ("left", "right", "up", "down")
ALONE = (*DIRECTIONS, "circle", "grow", "shrink", "blink")
# With a second object. In `meet` and `part` both move; otherwise the second rests or is pushed.
TOGETHER = ("approach", "leave", "meet", "part", "push", "behind", "front")
MOTIONS = ALONE + TOGETHER
SYMMETRIC = ("meet", "part")

MOST_THINGS = 8
_COUNTS = (0.10, 0.35, 0.35, 0.20, 0.20, 0.20, 0.20, 0.20)  # odds of one object, two, …

SPLITS = ("train", "validation", "test")
_BUCKETS = ("train",) * 8 + ("validation", "test")
ALWAYS, FIRST, THEN = 0, 1, 2  # phases: the whole clip, its first half, its second half


@dataclasses.dataclass(frozen=True)
class Thing:
    """The look of one object. No two objects of a clip share both colour and shape."""

    shape: str
    colour: str
    texture: str
    size: str


@dataclasses.dataclass(frozen=True)
class Event:
    """`subject` (an index of the objects) does `motion` in `phase`, to `other` if there is one."""

    motion: str
    subject: int
    other: int | None = None
    phase: int = ALWAYS


@dataclasses.dataclass(frozen=True)
class Scene:
    """A program: objects, background and events. The layout decides where they are."""

    things: tuple[Thing, ...]
    background: tuple[str, str]  # kind, tone
    events: tuple[Event, ...]

    def as_dict(self) -> dict:
        """Return the scene as plain data, for pages and tests."""
        return {
            "objects": [dataclasses.asdict(thing) for thing in self.things],
            "background": {"kind": self.background[0], "tone": self.background[1]},
            "motions": [dataclasses.asdict(event) for event in self.events],
        }

    def still(self) -> list[int]:
        """Return the objects that take part in no event."""
        acting = {i for e in self.events for i in (e.subject, e.other)}
        return [i for i in range(len(self.things)) if i not in acting]


def key(scene: Scene) -> str:
    """Return a key of colours, shapes and events, independent of their order.

    Texture, size and background are left out on purpose: a test scene is then never a training
    scene in other colours of the background.
    """
    names = [f"{thing.colour} {thing.shape}" for thing in scene.things]

    def named(event: Event) -> str:
        pair = [names[event.subject]] + ([] if event.other is None else [names[event.other]])
        pair = sorted(pair) if event.motion in SYMMETRIC else pair
        return f"{event.phase} {event.motion} {' '.join(pair)}"

    return "; ".join(sorted(names)) + " | " + "; ".join(sorted(map(named, scene.events)))


def split_of(scene: Scene) -> str:
    """Return the only split in which a scene may appear."""
    return split_of_key(key(scene))


def split_of_key(name: str) -> str:
    """Return the split that the hash of a key selects."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _BUCKETS[int.from_bytes(digest, "little") % len(_BUCKETS)]


def draw_things(rng: np.random.Generator, most: int, twins: bool = False) -> tuple[Thing, ...]:
    """Sample one to `most` objects, half of the time some of equal colour or shape.

    With `twins` there are at least two, and the first two have the same shape.
    """
    count = pick_count(rng, _COUNTS, most)
    if twins:
        count = max(count, 2)
    things: list[Thing] = []
    while len(things) < count:
        shape, colour = pick(rng, SHAPES), pick(rng, COLOURS)
        if things and rng.random() < 0.5:
            like = things[rng.integers(len(things))]
            shape, colour = (like.shape, colour) if rng.random() < 0.5 else (shape, like.colour)
        if twins and len(things) == 1:
            shape = things[0].shape
        if all((t.shape, t.colour) != (shape, colour) for t in things):
            size = SIZES[int(rng.random() < (0.5 if count < 3 else 0.25))]
            things.append(Thing(shape, colour, pick(rng, TEXTURES), size))
    return tuple(things)


def draw_events(rng: np.random.Generator, count: int) -> tuple[Event, ...]:
    """Sample one or two events among `count` objects, in one of five plots."""
    order = rng.permutation(count).tolist()
    a, b = order[0], order[1] if count > 1 else None
    plots = ("one", "phases") if b is None else ("one", "phases", "both", "turns", "pair")
    odds = (0.5, 0.5) if b is None else (0.22, 0.14, 0.17, 0.12, 0.35)
    plot = plots[rng.choice(len(plots), p=odds)]
    if plot == "pair":
        return (Event(pick(rng, TOGETHER), a, b),)
    if plot == "one":
        return (Event(pick(rng, ALONE), a),)
    one, two = (ALONE[i] for i in rng.permutation(len(ALONE))[:2])
    other = a if plot == "phases" or b is None else b
    if plot == "both":
        return (Event(one, a), Event(two, other))
    return (Event(one, a, None, FIRST), Event(two, other, None, THEN))


def draw_group(
    rng: np.random.Generator, split: str, siblings: int, most: int, twins: bool = False
) -> tuple[Scene, ...]:
    """Sample `siblings` scenes of `split` that look alike and differ in their events."""
    while True:  # few objects may have too few programs in a small split: sample others
        things = draw_things(rng, most, twins)
        background = (pick(rng, BACKGROUNDS), pick(rng, TONES))
        found: dict[str, Scene] = {}
        for _ in range(100 * siblings):
            scene = Scene(things, background, draw_events(rng, len(things)))
            if split_of(scene) == split:
                found.setdefault(key(scene), scene)
            if len(found) == siblings:
                return tuple(found.values())


def pick_count(rng: np.random.Generator, odds: Sequence[float], most: int) -> int:
    """Sample a number of objects from 1 to `most`; `odds` are those of one, two, three, …"""
    p = np.array(odds[:most])
    return 1 + int(rng.choice(len(p), p=p / p.sum()))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options, with equal probabilities."""
    return options[int(rng.integers(len(options)))]
