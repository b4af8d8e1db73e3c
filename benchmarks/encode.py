"""Compare `encode_video`'s vision tower on a CPU with ONNX Runtime and PyTorch, in float32.

    python -m benchmarks.encode [--frames=8] [--rounds=7] [--smoke]

All sides run one CLIP ViT-B/16 with the same random weights, and must return the same vectors. The
ONNX model is written here, node by node, and optimised by ONNX Runtime itself (fused attention,
LayerNorm and GELU).
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from stoa_jax.inference.programs import Towers, run_frame_tokens
from stoa_jax.models.clip import MEAN, STD
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.weights import hugging_face


def by_torch(folder: Path):
    """Return the vision tower of a Hugging Face directory as a function of planar pixels."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixels)).image_embeds.numpy()

    return run


def onnx_bytes(params: dict[str, np.ndarray], c: ModelConfig) -> bytes:
    """Return an ONNX model of the vision tower: planar pixels [N, 3, S, S] to vectors [N, d]."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    h, heads, size = c.vision_width, c.vision_heads, c.patch_size
    width = h // heads

    def constant(name: str, x) -> str:
        constants.append(numpy_helper.from_array(np.asarray(x, order="C"), name))
        return name

    def node(kind: str, *inputs: str, **attributes) -> str:
        out = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def norm(x: str, name: str, at=...) -> str:
        scale = constant(f"{name}/{at}/s", params[f"visual/{name}/scale"][at])
        bias = constant(f"{name}/{at}/b", params[f"visual/{name}/bias"][at])
        return node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def affine(x: str, key: str, kernel: np.ndarray, bias: np.ndarray) -> str:
        product = node("MatMul", x, constant(f"{key}/k", kernel))
        return node("Add", constant(f"{key}/b", bias), product)

    kernel = params["visual/patch/kernel"]  # [a, b, 3, h]
    x = node("Conv", "x", constant("patch", kernel.transpose(3, 2, 0, 1)), strides=[size, size])
    x = node("Reshape", x, constant("flat", np.array([0, h, -1], np.int64)))
    x = node("Transpose", x, perm=[0, 2, 1])
    count = node("Gather", node("Shape", "x"), constant("first", np.array([0], np.int64)), axis=0)
    tail = constant("tail", np.array([1, h], np.int64))
    cls = node(
        "Expand",
        constant("cls", params["visual/cls"][None, None]),
        node("Concat", count, tail, axis=0),
    )
    x = node("Concat", cls, x, axis=1)
    x = node("Add", x, constant("positions", params["visual/positions"]))
    x = norm(x, "ln_pre")
    split = constant("split", np.array([0, 0, heads, width], np.int64))
    merged = constant("merged", np.array([0, 0, h], np.int64))
    scale = constant("scale", np.float32(width**-0.5))
    factor = constant("factor", np.float32(1.702))
    block = {n.removeprefix("visual/blocks/"): v for n, v in params.items() if "visual/blocks" in n}
    for i in range(c.vision_depth):
        y = norm(x, "blocks/ln_1", i)
        parts = []
        for j, name in enumerate("qkv"):
            z = affine(
                y,
                f"{i}/{name}",
                block["attention/qkv/kernel"][i][:, j].reshape(h, h),
                block["attention/qkv/bias"][i][j].reshape(h),
            )
            turn = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
            parts.append(node("Transpose", node("Reshape", z, split), perm=turn))
        weights = node("Softmax", node("Mul", node("MatMul", *parts[:2]), scale), axis=-1)
        z = node("Transpose", node("MatMul", weights, parts[2]), perm=[0, 2, 1, 3])
        z = affine(
            node("Reshape", z, merged),
            f"{i}/out",
            block["attention/out/kernel"][i].reshape(h, h),
            block["attention/out/bias"][i],
        )
        x = node("Add", x, z)
        y = norm(x, "blocks/ln_2", i)
        y = affine(y, f"{i}/up", block["mlp/up/kernel"][i], block["mlp/up/bias"][i])
        y = node("Mul", y, node("Sigmoid", node("Mul", y, factor)))
        y = affine(y, f"{i}/down", block["mlp/down/kernel"][i], block["mlp/down/bias"][i])
        x = node("Add", x, y)
    x = node("Gather", x, constant("zero", np.int64(0)), axis=1)
    x = norm(x, "ln_post")
    out = node("MatMul", x, constant("proj", params["visual/proj"]))
    side = c.image_size
    graph = helper.make_graph(
        nodes,
        "vision",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", c.text_width])],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check that all sides agree, print the table, and return the seconds of each side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    c = ModelConfig.base()
    if args.smoke:
        c = dataclasses.replace(ModelConfig.tiny(), vision_width=64, vision_heads=1)
    c = dataclasses.replace(c, objects=False, actions=False, text_depth=1, masked_text="zero")
    rng = np.random.default_rng(0)
    towers = jax.jit(lambda: Towers(c, rngs=nnx.Rngs(0)))()
    params = {name: np.asarray(x) for name, x in named_parameters(towers).items()}
    pixels = rng.integers(0, 256, (args.frames, c.image_size, c.image_size, 3), np.uint8)
    planar = (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    planar = np.ascontiguousarray(planar.transpose(0, 3, 1, 2))
    clip = jnp.asarray(pixels[None])
    sides = {"ours": lambda: np.asarray(run_frame_tokens(towers, clip))[0]}

    import onnxruntime

    session = onnxruntime.InferenceSession(
        onnx_bytes(params, c), providers=["CPUExecutionProvider"]
    )
    sides["ONNX Runtime"] = lambda: session.run(None, {"x": planar})[0]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            hugging_face.save_hugging_face(Path(scratch) / "clip", params, c)
            run = by_torch(Path(scratch) / "clip")
        sides["PyTorch (transformers)"] = lambda: run(planar)
    except ImportError as error:
        print(f"PyTorch is left out: {error}")

    results = {name: run() for name, run in sides.items()}
    for name, result in results.items():
        difference = np.abs(result - results["ours"]).max()
        assert difference < 1e-4, f"{name} differs by {difference}"
    seconds = timing.in_turn(sides, 2 if args.smoke else args.rounds)
    print(timing.environment("jax", "onnxruntime", "torch", "transformers"))
    timing.table(
        [f"{args.frames} frames, float32", "ms a frame", "frames/s", "ours is faster by"],
        [
            [
                name,
                f"{1e3 * s / args.frames:.1f}",
                f"{args.frames / s:.1f}",
                f"{s / seconds['ours']:.2f}×",
            ]
            for name, s in seconds.items()
        ],
    )
    return seconds


if __name__ == "__main__":
    main()
