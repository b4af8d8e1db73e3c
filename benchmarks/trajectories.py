"""What a trajectory of a class costs where a clip shows several things of that class.

    python -m benchmarks.trajectories

For worlds with more and more things, from the detections alone and no model: how many trajectories
are valid at each N, by class (the paper) and tracked (`trajectory_choice="tracked"`), and how well
the five largest follow things. A trajectory's path is its surest object in each frame, and its
thing is the one that most of its objects belong to.

own: objects of a trajectory that belong to its thing. off: distance of the path from the centre of
that thing, as a share of the thing's side. covered: things of which some trajectory is the path.
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
SAME = 0.3  # overlap from which a detection is of a thing


@dataclasses.dataclass
class Followed:
    """Sums over clips."""

    own: list[float] = dataclasses.field(default_factory=list)
    off: list[float] = dataclasses.field(default_factory=list)
    covered: list[float] = dataclasses.field(default_factory=list)


def owners(boxes: np.ndarray, classes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the thing of each detection [T, K] by overlap with true boxes [T, n, 4]; -1: none."""
    one, two = boxes[:, :, None], true[:, None]
    low, high = np.maximum(one[..., :2], two[..., :2]), np.minimum(one[..., 2:], two[..., 2:])
    common = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(x[..., 2:] - x[..., :2], -1) for x in (one, two)]
    overlap = common / np.maximum(areas[0] + areas[1] - common, 1e-9)  # [T, K, n]
    best = overlap.argmax(-1)
    return np.where((classes >= 0) & (overlap.max(-1) >= SAME), best, -1)


def follow(found: Followed, clip: SyntheticClip, members: np.ndarray) -> None:
    """Add a clip's trajectories [N, T, K] to the sums."""
    boxes, true = clip.boxes, clip.true_boxes
    owner = owners(boxes, clip.classes, true)
    rows, followed = np.arange(len(boxes)), set()
    for mine in members[members.any((1, 2))]:
        of = owner[mine]
        if not (of >= 0).any():
            continue  # of nothing but false detections
        thing = np.bincount(of[of >= 0]).argmax()
        found.own.append((of == thing).mean())
        best = np.where(mine, clip.scores, -np.inf).argmax(1)
        shown = mine.any(1) & (clip.true_classes[:, thing] >= 0)
        if not shown.any():
            continue
        path, course = boxes[rows, best][shown], true[shown, thing]
        centres = [(x[:, 2:] + x[:, :2]) / 2 for x in (path, course)]
        side = np.sqrt(np.prod(course[:, 2:] - course[:, :2], -1))
        off = np.linalg.norm(centres[0] - centres[1], axis=-1) / side
        found.off.append(off.mean())
        if (owner[rows, best][shown] == thing).mean() > 0.8:
            followed.add(int(thing))
    found.covered.append(len(followed) / true.shape[1])


def measure(world: World, clips: int) -> tuple[dict[str, list[float]], dict[str, Followed], float]:
    """Return valid trajectories by choice at each of COUNTS, what is followed, things a clip."""
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
