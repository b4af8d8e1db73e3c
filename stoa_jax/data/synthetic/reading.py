"""Parse the synthetic world's texts back into events and objects.

A built set stores texts and answers, not the scenes behind them. The form of a text shows what a
caption claims, and the kind of a question or a choice.
"""

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from stoa_jax.data.synthetic.language import NEARLY, PHRASES, PLURAL
from stoa_jax.data.synthetic.scene import COLOURS, SHAPES, SYMMETRIC

Thing = tuple[str, str]  # colour, shape

QUESTIONS = ("way", "does", "what", "colour", "looks", "order", "many", "other")
CHOICES = ("motion", "things", "roles", "other")


class Claim(NamedTuple):
    """One event that a caption describes."""

    motion: str
    subject: Thing | None  # None: not named
    other: Thing | None


@functools.cache
def claims(caption: str) -> frozenset[Claim]:
    """Return the events that a caption describes, without their order in time."""
    events, _ = _read(caption)
    return events


def holds(caption: str, of_clip: Sequence[str]) -> bool:
    """Return whether a caption is true, or nearly, of the clip that has these captions.

    It is if the clip's captions describe every event of the caption, in any order in time. Events
    that are hard to tell apart, such as approaching and meeting, count as equal.
    """
    told = claims(caption)
    known = frozenset().union(*map(claims, of_clip))
    return bool(told) and all(any(_alike(one, other) for other in known) for one in told)


def question_kind(question: str) -> str:
    """Return the kind of a question, one of `QUESTIONS`."""
    for kind, pattern in (
        ("way", r"which way\b"),
        ("does", r"what does\b"),
        ("colour", r"what color is the thing that\b"),
        ("looks", r"what color is the\b"),
        ("order", r"which (?:comes|moves|acts) (?:first|last)\b"),
        ("many", r"how many\b"),
        ("what", r"what\b"),
    ):
        if re.match(pattern, question.lower()):
            return kind
    return "other"


def option_kind(right: str, wrong: str) -> Literal["motion", "things", "roles", "other"]:
    """Return how a wrong option differs from the right one.

    `motion`: something else happens. `roles`: the same motions and objects, but who does what
    differs. `things`: the same motions with other objects.
    """
    (events, things), (wrong_events, wrong_things) = _read(right), _read(wrong)
    if not events or not wrong_events:
        return "other"

    def motions(found: frozenset[Claim]) -> list[str]:
        return sorted(claim.motion for claim in found)

    if motions(events) != motions(wrong_events):
        return "motion"
    if things == wrong_things and events != wrong_events:
        return "roles"
    return "things"


def _alike(one: Claim, other: Claim) -> bool:
    if one == other:
        return True
    near = one.motion == other.motion and one.motion in SYMMETRIC
    near |= other.motion in NEARLY.get(one.motion, ()) or one.motion in NEARLY.get(other.motion, ())
    return near and {one.subject, one.other} == {other.subject, other.other}


_THING = rf"(?:an?|the) (?:\w+ )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"


@functools.cache
def _patterns() -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern for objects and for verbs with their objects, and each verb's motion."""
    motion_of, verbs = {}, []
    for motion, forms in (*PHRASES.items(), *PLURAL.items()):
        for form in (form for pair in forms for form in pair):
            motion_of[form] = motion
            verbs.append(form)
    verbs.sort(key=len, reverse=True)
    parts = [
        rf"(?P<v{i}>\b{re.escape(form)}\b)"
        if "{}" not in form
        else rf"(?P<v{i}>\b{re.escape(form).replace(re.escape('{}'), _THING)})"
        for i, form in enumerate(verbs)
    ]
    pattern = re.compile("|".join([*parts, rf"(?P<thing>{_THING})"]))
    return pattern, {f"v{i}": motion_of[form] for i, form in enumerate(verbs)}


@functools.cache
def _read(caption: str) -> tuple[frozenset[Claim], frozenset[Thing]]:
    """Return the events that a caption describes, and the objects that it names."""
    pattern, motion_of = _patterns()
    events: list[Claim] = []
    subjects: list[Thing] = []
    things: set[Thing] = set()
    for found in pattern.finditer(caption.lower()):
        named = [(m[1], m[2]) for m in re.finditer(_THING, found[0])]
        things.update(named)
        if found.lastgroup == "thing" or found["thing"]:
            subjects += named
            continue
        motion = next(motion_of[name] for name in motion_of if found[name])
        if motion in SYMMETRIC:
            pair = sorted(subjects[-2:])
            events.append(Claim(motion, pair[0], pair[-1]) if pair else Claim(motion, None, None))
        else:
            subject = subjects[-1] if subjects else None
            events.append(Claim(motion, subject, named[0] if named else None))
    # "after rising, the star is falling": the subject follows the first verb.
    first = subjects[0] if subjects else None
    events = [event if event.subject else event._replace(subject=first) for event in events]
    return frozenset(events), frozenset(things)
