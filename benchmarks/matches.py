"""Count what trajectories and actions are matched to in captions of the synthetic world.

    python -m benchmarks.matches --checkpoint=synthetic

A trajectory is the objects of one class, so if a caption names the class, the right match is that
noun, and if it does not, Ø. A verb should be matched to an action; which motion the action shows is
not visible in the match (`benchmarks.probe` measures that). The captions are the first ones of live
test clips, and matches are those of `Model.explain`.
"""

import argparse
import collections
import re
from collections.abc import Iterator, Sequence

import stoa_jax
from stoa_jax.data.synthetic import CLASS_NAMES, World, parts_of_speech
from stoa_jax.inference.model import Model

SAID = {
    "own": "its noun",
    "background": "“background”",
    "other": "another noun",
    "none": "Ø",
    "matched": "an action",
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
        verbs = sum(word.upos == "VERB" for word in parts_of_speech.words(text))
        matched = sum(action.word is not None for action in found.actions)
        counts["verb", "matched"] += matched
        counts["verb", "none"] += verbs - matched
        counts["action", "none"] += len(found.actions) - matched
        counts["action", "matched"] += matched
    return counts


def what(word: str | None, own: str) -> str:
    """Name the kind of a match; a background has no trajectory of its own."""
    if word is None:
        return "none"
    return {own: "own", "background": "background"}.get(word, "other")


def rows(counts: collections.Counter) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| of | number | kind of match | % |"
    yield "|---|---|---|---|"
    for group, label, kinds in (
        ("named", "trajectories whose class is named", ("own", "background", "other", "none")),
        ("not named", "trajectories whose class is not named", ("none", "background", "other")),
        ("verb", "verbs", ("matched",)),
        ("action", "actions", ("none",)),
    ):
        total = sum(n for (of, _), n in counts.items() if of == group)
        for kind in kinds:
            share = f"{100 * counts[group, kind] / total:.1f}" if total else "none"
            yield f"| {label} | {total} | {SAID[kind]} | {share} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="synthetic", help="model, as for stoa_jax.load")
    parser.add_argument("--clips", type=int, default=500, help="test clips")
    parser.add_argument("--max-objects", type=int, default=3, help="most objects in a clip")
    args = parser.parse_args(argv)
    model = stoa_jax.load(args.checkpoint, truncate=True)  # as training reads captions
    if not {"trajectories", "actions"} & set(model.has):
        parser.error(f"--checkpoint: {args.checkpoint} has neither trajectories nor actions")
    for line in rows(counted(model, args.clips, args.max_objects)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
