"""Measure how well trajectories follow objects when a clip shows several objects of a class.

    python -m benchmarks.trajectories

The worlds have more and more objects. From the detections alone, without a model, the benchmark
counts the trajectories that are valid at each N, by class (the paper) and tracked
(`trajectory_choice="tracked"`). It also measures how well the five largest follow the objects. The
path of a trajectory is its most confident detection in each frame, and its target is the object
that most of its detections show.

own: share of a trajectory's detections that show its target. off: distance between the path and the
target's centre, as a share of the target's side. covered: share of the objects that the path of
some trajectory follows.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from stoa_jax import ops
from stoa_jax.data.synthetic import SyntheticClip, World

WORLDS = (
    {"max_objects": 3},
    {"max_objects": 3, "twins": 1},
    {"max_objects": 8},
    {"max_objects": 8, "twins": 1},
)
COUNTS = (1, 2, 4, 5, 8, 10)  # N
FOLLOWED = 5
CHOICES = {"class": "largest", "tracked": "tracked"}
SAME = 0.3  # least overlap of a detection with the object it shows


@dataclasses.dataclass
class Followed:
    """Values of all trajectories (`own`, `off`) and of all clips (`covered`)."""

    own: list[float] = dataclasses.field(default_factory=list)
    off: list[float] = dataclasses.field(default_factory=list)
    covered: list[float] = dataclasses.field(default_factory=list)


def owners(boxes: np.ndarray, classes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the object that each detection [T, K] shows, by overlap with true boxes; -1: none.

    `boxes` is [T, K, 4] and `true` [T, n, 4].
    """
    one, two = boxes[:, :, None], true[:, None]
    low, high = np.maximum(one[..., :2], two[..., :2]), np.minimum(one[..., 2:], two[..., 2:])
    common = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(x[..., 2:] - x[..., :2], -1) for x in (one, two)]
    overlap = common / np.maximum(areas[0] + areas[1] - common, 1e-9)  # [T, K, n]
    best = overlap.argmax(-1)
    return np.where((classes >= 0) & (overlap.max(-1) >= SAME), best, -1)


def follow(found: Followed, clip: SyntheticClip, members: np.ndarray) -> None:
    """Add the values of a clip's trajectories [N, T, K] to `found`."""
    boxes, true = clip.boxes, clip.true_boxes
    owner = owners(boxes, clip.classes, true)
    rows, followed = np.arange(len(boxes)), set()
    for mine in members[members.any((1, 2))]:
        of = owner[mine]
        if not (of >= 0).any():
            continue  # only false detections
        target = np.bincount(of[of >= 0]).argmax()
        found.own.append((of == target).mean())
        best = np.where(mine, clip.scores, -np.inf).argmax(1)
        shown = mine.any(1) & (clip.true_classes[:, target] >= 0)
        if not shown.any():
            continue
        path, course = boxes[rows, best][shown], true[shown, target]
        centres = [(x[:, 2:] + x[:, :2]) / 2 for x in (path, course)]
        side = np.sqrt(np.prod(course[:, 2:] - course[:, :2], -1))
        off = np.linalg.norm(centres[0] - centres[1], axis=-1) / side
        found.off.append(off.mean())
        if (owner[rows, best][shown] == target).mean() > 0.8:
            followed.add(int(target))
    found.covered.append(len(followed) / true.shape[1])


def measure(world: World, clips: int) -> tuple[dict[str, list[float]], dict[str, Followed], float]:
    """Return mean valid trajectories at each of COUNTS, what they follow, and objects per clip.

    The first two are by the choice of trajectories.
    """
    most = max(COUNTS)
    choose = {
        name: jax.jit(lambda k, s, b, c=choice: ops.select_trajectories(k, s, most, c, b))
        for name, choice in CHOICES.items()
    }
    valid = {name: np.zeros(len(COUNTS)) for name in CHOICES}
    followed = {name: Followed() for name in CHOICES}
    things = 0
    for i in range(clips):
        clip = world.clip(i)
        things += clip.true_boxes.shape[1]
        for name, run in choose.items():
            chosen, member = run(clip.classes, clip.scores, clip.boxes)
            valid[name] += np.minimum((np.asarray(chosen) >= 0).sum(), COUNTS) / clips
            members = np.asarray(member)[:FOLLOWED].reshape(-1, *clip.classes.shape)
            follow(followed[name], clip, members)
    return {name: x.tolist() for name, x in valid.items()}, followed, things / clips


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--frames", type=int, default=8)
    args = parser.parse_args(argv)
    head = [f"N = {n}" for n in COUNTS]
    print(f"| world | things | trajectories | {' | '.join(head)} | own, % | off, % | covered, % |")
    print("|---" * (len(head) + 6) + "|")
    for options in WORLDS:
        world = World("test", size=48, frames=args.frames, siblings=1, **options)
        valid, followed, things = measure(world, args.clips)
        label = ", ".join(f"{name}={value}" for name, value in options.items())
        for name, counts in valid.items():
            of = followed[name]
            means = [100 * float(np.mean(x)) for x in (of.own, of.off, of.covered)]
            cells = [f"{x:.2f}" for x in counts] + [f"{x:.1f}" for x in means]
            print(f"| {label} | {things:.1f} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
