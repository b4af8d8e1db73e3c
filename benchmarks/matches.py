"""Count what trajectories are matched to in captions of the synthetic world.

    python -m benchmarks.matches --checkpoint=synthetic

A trajectory is the objects of one class, so if a caption names the class, the right match is that
noun, and if it does not, Ø. Of actions, a match only says that the caption has a verb; what motion
they show is measured by `benchmarks.probe`. The captions are the first ones of live test clips, and
matches are those of `Model.explain`, which sees only features. The untrained model has the same
towers, and new encoders of trajectories and actions.
"""

import argparse
import collections
import re
from collections.abc import Iterator, Mapping, Sequence

import stoa_jax
from benchmarks import probing
from stoa_jax.data.synthetic import CLASS_NAMES, World
from stoa_jax.inference.model import Model

SAID = {
    "own": "its noun",
    "background": "“background”",
    "other": "another noun",
    "none": "Ø",
}


def counted(model: Model, clips: int, max_objects: int) -> collections.Counter:
    """Count matches by kind, over the first test clips."""
    network = model.whole
    assert network is not None
    c = network.config
    world = World("test", 0, c.image_size, c.frames, max_objects, c.objects_per_frame, siblings=1)
    counts: collections.Counter = collections.Counter()
    for i in range(clips):
        clip = world.clip(i)
        seen = stoa_jax.Detections(clip.boxes, clip.classes, clip.scores, tuple(CLASS_NAMES))
        text = clip.captions[0]
        found = model.explain(stoa_jax.Clip(list(clip.frames), detections=seen), text)
        words = set(re.findall(r"[a-z]+", text))
        for trajectory in found.trajectories:
            named = "named" if trajectory.name in words else "not named"
            counts[named, what(trajectory.word, trajectory.name)] += 1
    return counts


def what(word: str | None, own: str) -> str:
    """Name the kind of a match; a background has no trajectory of its own."""
    if word is None:
        return "none"
    return {own: "own", "background": "background"}.get(word, "other")


def rows(columns: Mapping[str, collections.Counter]) -> Iterator[str]:
    """Yield the lines of a Markdown table, with a column for each model."""
    yield "| of | number | matched to | " + " | ".join(f"{name}, %" for name in columns) + " |"
    yield "|---" * (3 + len(columns)) + "|"
    for group, label, kinds in (
        ("named", "trajectories whose class is named", ("own", "background", "other", "none")),
        ("not named", "trajectories whose class is not named", ("none", "background", "other")),
    ):
        totals = [sum(n for (of, _), n in c.items() if of == group) for c in columns.values()]
        for kind in kinds:
            shares = [
                f"{100 * counts[group, kind] / total:.1f}"
                for counts, total in zip(columns.values(), totals, strict=True)
            ]
            yield f"| {label} | {totals[0]} | {SAID[kind]} | {' | '.join(shares)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="synthetic", help="model, as for stoa_jax.load")
    parser.add_argument("--clips", type=int, default=500, help="test clips")
    parser.add_argument("--max-objects", type=int, default=3, help="most objects in a clip")
    args = parser.parse_args(argv)
    # Training, too, reads a long caption to the model's length.
    model, fresh = (stoa_jax.load(args.checkpoint, truncate=True) for _ in range(2))
    if "trajectories" not in model.has:
        parser.error(f"--checkpoint: {args.checkpoint} has no trajectories")
    assert fresh.whole is not None
    fresh.network = probing.untrained(fresh.whole, seed=0)
    columns = {
        name: counted(one, args.clips, args.max_objects)
        for name, one in (("untrained", fresh), ("checkpoint", model))
    }
    for line in rows(columns):
        print(line)


if __name__ == "__main__":
    main()
