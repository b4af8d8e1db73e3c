"""Compare RoIAlign with ONNX Runtime, torchvision (if installed) and a version with gathers.

    python -m benchmarks.roi_align [--smoke]

96 frames of ViT-B/16 patches with 10 boxes each, 7x7 bins of 2x2 samples, float32.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from stoa_jax import ops

SAMPLES = 2


def gathered(features: jax.Array, boxes: jax.Array, bins: int) -> jax.Array:
    """Align boxes [K, 4] on features [H, W, C] by four gathers for each sample: [K, o, o, C]."""
    height, width, _ = features.shape
    x1, y1, x2, y2 = jnp.moveaxis(boxes - 0.5, -1, 0)
    steps = (jnp.arange(bins * SAMPLES) + 0.5) / (bins * SAMPLES)

    def axis(start, end, size):
        at = jnp.clip(start[:, None] + (end - start)[:, None] * steps, 0, size - 1)
        low = jnp.floor(at).astype(jnp.int32)
        return low, jnp.minimum(low + 1, size - 1), at - low

    (top, bottom, down), (left, right, across) = axis(y1, y2, height), axis(x1, x2, width)

    def corner(y, x, wy, wx):
        weight = (wy[:, :, None] * wx[:, None, :])[..., None]
        return features[y[:, :, None], x[:, None, :]] * weight

    samples = (
        corner(top, left, 1 - down, 1 - across)
        + corner(top, right, 1 - down, across)
        + corner(bottom, left, down, 1 - across)
        + corner(bottom, right, down, across)
    )
    k, side = len(boxes), bins
    return samples.reshape(k, side, SAMPLES, side, SAMPLES, -1).mean((2, 4))


def onnx_session(bins: int):
    """Return an ONNX Runtime session of one RoiAlign node (opset 16, half_pixel, avg)."""
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node(
        "RoiAlign",
        ["x", "boxes", "frame"],
        ["y"],
        output_height=bins,
        output_width=bins,
        sampling_ratio=SAMPLES,
        mode="avg",
        coordinate_transformation_mode="half_pixel",
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [None, 4]),
        helper.make_tensor_value_info("frame", TensorProto.INT64, [None]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([node], "roi_align", inputs, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check that all agree, time them, print the table, and return the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    t, k, grid, width, bins = (2, 3, 5, 8, 3) if args.smoke else (96, 10, 14, 768, 7)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(t, grid, grid, width)).astype(np.float32)
    low = rng.uniform(0, grid / 2, (t, k, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, grid / 2, (t, k, 2))], -1).astype(np.float32)

    ours = jax.jit(jax.vmap(lambda x, b: ops.roi_align(x, b, (bins, bins), SAMPLES)))
    gather = jax.jit(jax.vmap(lambda x, b: gathered(x, b, bins)))
    x, b = jnp.asarray(features), jnp.asarray(boxes)
    sides = {
        "ours": lambda: np.asarray(ours(x, b)),
        "gathers": lambda: np.asarray(gather(x, b)),
    }
    planar = np.ascontiguousarray(features.transpose(0, 3, 1, 2))  # the layout that they read
    session = onnx_session(bins)
    feed = {"x": planar, "boxes": boxes.reshape(-1, 4), "frame": np.repeat(np.arange(t), k)}
    sides["ONNX Runtime"] = lambda: session.run(None, feed)[0]
    try:
        import torch
        from torchvision.ops import roi_align as by_torch

        planar_torch, listed = torch.from_numpy(planar), list(torch.from_numpy(boxes))
        sides["torchvision"] = lambda: by_torch(
            planar_torch, listed, bins, 1.0, SAMPLES, aligned=True
        ).numpy()
    except (ImportError, RuntimeError) as error:
        print(f"torchvision is left out: {str(error).splitlines()[0]}")

    results = {name: run() for name, run in sides.items()}
    for name in ("ONNX Runtime", "torchvision"):
        if name in results:
            shape = (t, k, width, bins, bins)
            results[name] = results[name].reshape(shape).transpose(0, 1, 3, 4, 2)
    for name, result in results.items():
        difference = np.abs(result - results["ours"]).max()
        assert difference < 1e-4, f"{name} differs by {difference}"
    seconds = timing.in_turn(sides, 3 if args.smoke else 15)
    rows = [[name, f"{1e3 * s:.1f}", f"{s / seconds['ours']:.2f}×"] for name, s in seconds.items()]
    print(timing.environment("jax", "onnxruntime", "torch", "torchvision"))
    timing.table([f"[{t} frames, {k} boxes]", "ms", "ours is faster by"], rows)
    return seconds


if __name__ == "__main__":
    main()
