"""Compare the spread of untrained object tokens with that of the patches they join.

    python -m benchmarks.object_start

An object is MLP(max(RoIAlign(z))) + MLP(box) + frame embedding, where z are the patch outputs of
block `object_block`. The object encoder is untrained. The table shows the standard deviation over
tokens of each part (root mean square over features), and the ratio of the whole object to the
patches of block `action_block`; the action queries choose among both. The frames come from the
synthetic world. With `--checkpoint`, one row has a trained vision tower.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stoa_jax
from stoa_jax.data.synthetic import World
from stoa_jax.models.clip import VisionTower
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.trajectory import RegionEncoder

CLIPS, FRAMES = 8, 2  # two frames a clip: enough for the spread over frames, and fast at `base`


def spread(x: jax.Array, keep: np.ndarray | None = None) -> float:
    """Return the root mean square over features of the standard deviation over tokens [..., h]."""
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if keep is not None:
        rows = rows[keep.reshape(-1)]
    return float(np.sqrt(np.square(rows - rows.mean(0)).mean()))


def measure(c: ModelConfig, tower: VisionTower, clips: int) -> list[float]:
    """Return the spreads of patches and of an object's parts, and the ratio."""
    world = World("test", size=max(48, c.image_size), frames=FRAMES, objects=c.objects_per_frame)
    drawn = [world.clip(i) for i in range(clips)]
    pixels = np.stack([one.frames for one in drawn])
    if pixels.shape[2] != c.image_size:
        raise SystemExit(f"frames of {pixels.shape[2]} pixels for a model of {c.image_size}")
    boxes, valid = np.stack([o.boxes for o in drawn]), np.stack([o.classes >= 0 for o in drawn])
    blocks = sorted({c.object_block, c.action_block})
    _, tapped = tower(pixels.reshape(-1, *pixels.shape[2:]), blocks, frames=FRAMES)
    patches = {i: x[:, 1:].reshape(clips, FRAMES, -1, x.shape[-1]) for i, x in tapped.items()}
    regions = RegionEncoder(c, rngs=nnx.Rngs(1))
    whole = regions(patches[c.object_block], jnp.asarray(boxes))
    box = regions.box_mlp(jnp.asarray(boxes))
    frame = jnp.broadcast_to(regions.frame_embedding[...][:, None], whole.shape)
    looks = whole - box - frame
    of_patches = spread(patches[c.action_block])
    parts = [spread(x, valid) for x in (looks, box)]
    # Two frames are too few for a spread: of 64, from the same distribution.
    many = RegionEncoder(dataclasses.replace(c, frames=64), rngs=nnx.Rngs(2))
    embedding = spread(many.frame_embedding[...])
    total = float(np.sqrt(sum(x**2 for x in (*parts, embedding))))
    return [of_patches, *parts, embedding, total, total / of_patches]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="synthetic", help="trained model; empty: none")
    parser.add_argument("--clips", type=int, default=CLIPS)
    args = parser.parse_args(argv)
    print("| vision tower | patches | looks | box | frame | object | object / patches |")
    print("|---" * 7 + "|")
    rows = []
    for name in ("tiny", "small", "base"):
        c = dataclasses.replace(getattr(ModelConfig, name)(), frames=FRAMES, scan_layers=False)
        rows.append((f"`{name}`, random weights", c, VisionTower(c, rngs=nnx.Rngs(0))))
    if args.checkpoint:
        model = stoa_jax.load(args.checkpoint)
        if model.whole is None or not model.config.objects:
            parser.error(f"--checkpoint: {args.checkpoint} has no objects")
        c = dataclasses.replace(model.config, frames=FRAMES)
        rows.append((f"{args.checkpoint}, trained", c, model.whole.visual))
    for label, c, tower in rows:
        numbers = measure(c, tower, args.clips)
        print(f"| {label} | " + " | ".join(f"{x:.2f}" for x in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
