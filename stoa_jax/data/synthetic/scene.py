"""What happens in a synthetic clip, as a small program: objects, a background, events in time.

Which split a program belongs to is a hash of the program, so no scene is in two splits.
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
# With a second object. In `meet` and `part` both move; else the second rests or is pushed.
TOGETHER = ("approach", "leave", "meet", "part", "push", "behind", "front")
MOTIONS = ALONE + TOGETHER
SYMMETRIC = ("meet", "part")

MOST_THINGS = 8
_COUNTS = (0.10, 0.35, 0.35, 0.20, 0.20, 0.20, 0.20, 0.20)  # odds of one thing, two, …

SPLITS = ("train", "validation", "test")
_BUCKETS = ("train",) * 8 + ("validation", "test")
ALWAYS, FIRST, THEN = 0, 1, 2  # phases: the whole clip, its first half, its second half


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object's looks. In a clip no two share both colour and shape."""

    shape: str
    colour: str
    texture: str
    size: str


@dataclasses.dataclass(frozen=True)
class Event:
    """`subject` (an index of things) does `motion` in `phase`, to `other` where there is one."""

    motion: str
    subject: int
    other: int | None = None
    phase: int = ALWAYS


@dataclasses.dataclass(frozen=True)
class Scene:
    """A program: what is there and what it does; where it does it is the layout's."""

    things: tuple[Thing, ...]
    background: tuple[str, str]  # kind, tone
    events: tuple[Event, ...]

    def as_dict(self) -> dict:
        """The scene as plain data, for pages and tests."""
        return {
            "objects": [dataclasses.asdict(thing) for thing in self.things],
            "background": {"kind": self.background[0], "tone": self.background[1]},
            "motions": [dataclasses.asdict(event) for event in self.events],
        }

    def still(self) -> list[int]:
        """The things that take no part in any event."""
        acting = {i for e in self.events for i in (e.subject, e.other)}
        return [i for i in range(len(self.things)) if i not in acting]


def key(scene: Scene) -> str:
    """A name for colours, shapes and events, whatever their order.

    Texture, size and background are left out on purpose: a test scene is then no train scene in
    another coat of paint.
    """
    names = [f"{thing.colour} {thing.shape}" for thing in scene.things]

    def named(event: Event) -> str:
        pair = [names[event.subject]] + ([] if event.other is None else [names[event.other]])
        pair = sorted(pair) if event.motion in SYMMETRIC else pair
        return f"{event.phase} {event.motion} {' '.join(pair)}"

    return "; ".join(sorted(names)) + " | " + "; ".join(sorted(map(named, scene.events)))


def split_of(scene: Scene) -> str:
    """The one split in which a scene may appear."""
    return split_of_key(key(scene))


def split_of_key(name: str) -> str:
    """The split that a name falls to by its hash."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _BUCKETS[int.from_bytes(digest, "little") % len(_BUCKETS)]


def draw_things(rng: np.random.Generator, most: int, twins: bool = False) -> tuple[Thing, ...]:
    """One to `most` things, half of the time some alike in colour or in shape.

    With `twins` there are two or more, and the first two have one shape.
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
    """One or two events among `count` things, in one of five plots."""
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
    """`siblings` scenes of `split` that look the same and differ in what happens."""
    while True:  # a few things may lack enough programs in a small split: then others are drawn
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
    """One to `most` things; `odds` are those of one, two, three, …"""
    p = np.array(odds[:most])
    return 1 + int(rng.choice(len(p), p=p / p.sum()))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]
