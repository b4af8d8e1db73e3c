"""Pictures: objects at rest and sentences that name them all, as in CLIP's training.

Half of the pictures show a single object. Their captions differ only in that object, so that
colours, shapes and their names are learned from few pictures.
"""

import numpy as np

from stoa_jax.data.synthetic import language, scene
from stoa_jax.data.synthetic.scene import Scene, Thing

_COUNTS = (0.55, 0.3, 0.15)  # shares of pictures with one, two, three objects


def draw_picture(rng: np.random.Generator, split: str, most: int) -> Scene:
    """Sample a scene of `split` without events."""
    while True:
        count = scene.pick_count(rng, _COUNTS, most)
        looks: dict[tuple[str, str], Thing] = {}
        while len(looks) < count:
            shape, colour, texture, size = (
                scene.pick(rng, options)
                for options in (scene.SHAPES, scene.COLOURS, scene.TEXTURES, scene.SIZES)
            )
            looks.setdefault((shape, colour), Thing(shape, colour, texture, size))
        background = scene.pick(rng, scene.BACKGROUNDS), scene.pick(rng, scene.TONES)
        picture = Scene(tuple(looks.values()), background, ())
        # The split depends on everything visible. By colours and shapes alone, the splits would not
        # share a single object, and no split would teach all of their names.
        if scene.split_of_key(repr(picture)) == split:
            return picture


def captions(picture: Scene, rng: np.random.Generator, count: int = 3) -> list[str]:
    """Return `count` different sentences that name everything in the picture."""
    return language.different(lambda: _caption(picture, rng), count)


def _caption(picture: Scene, rng: np.random.Generator) -> str:
    order = rng.permutation(len(picture.things))
    *rest, last = (_noun_phrase(picture.things[i], rng) for i in order)
    text = f"{', '.join(rest)} and {last}" if rest else last
    kind, tone = picture.background
    draw = rng.random()
    if draw < 0.3:
        return f"{text} on a {tone} background"
    return f"{text} on a {kind} {tone} background" if draw < 0.5 else text


def _noun_phrase(thing: Thing, rng: np.random.Generator) -> str:
    words = [thing.colour, thing.shape]
    draw = rng.random()
    if draw < 0.3 and thing.texture != "plain":
        words.insert(0, thing.texture)
    elif draw > 0.6:
        words.insert(0, thing.size)
    return language.noun_phrase("a", words)
