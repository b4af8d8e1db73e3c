"""Read CLIP files: in Hugging Face's names, and in those that OpenAI and open_clip share."""

import dataclasses
import re
from typing import Literal, cast

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.weights.tables import (
    CONV,
    LINEAR,
    OUT_KERNEL,
    QKV_BIAS,
    QKV_KERNEL,
    Entry,
    Report,
    Shape,
    entry,
    read_table,
    shape_of,
)
from stoa_jax.weights.tensors import TensorFile

CLIP_VOCABULARY = 49408
Activation = Literal["quick_gelu", "gelu"]


def openai_blocks(ours: str, theirs: str) -> list[Entry]:
    """Table rows for a stack of blocks, in the names of OpenAI, open_clip and the authors' code."""
    return [
        entry(f"{ours}/ln_1/scale", f"{theirs}.ln_1.weight"),
        entry(f"{ours}/ln_1/bias", f"{theirs}.ln_1.bias"),
        entry(f"{ours}/attention/qkv/kernel", f"{theirs}.attn.in_proj_weight", layout=QKV_KERNEL),
        entry(f"{ours}/attention/qkv/bias", f"{theirs}.attn.in_proj_bias", layout=QKV_BIAS),
        entry(f"{ours}/attention/out/kernel", f"{theirs}.attn.out_proj.weight", layout=OUT_KERNEL),
        entry(f"{ours}/attention/out/bias", f"{theirs}.attn.out_proj.bias"),
        entry(f"{ours}/ln_2/scale", f"{theirs}.ln_2.weight"),
        entry(f"{ours}/ln_2/bias", f"{theirs}.ln_2.bias"),
        entry(f"{ours}/mlp/up/kernel", f"{theirs}.mlp.c_fc.weight", layout=LINEAR),
        entry(f"{ours}/mlp/up/bias", f"{theirs}.mlp.c_fc.bias"),
        entry(f"{ours}/mlp/down/kernel", f"{theirs}.mlp.c_proj.weight", layout=LINEAR),
        entry(f"{ours}/mlp/down/bias", f"{theirs}.mlp.c_proj.bias"),
    ]


def norm(ours: str, theirs: str) -> list[Entry]:
    """Table rows for one layer normalisation."""
    return [entry(f"{ours}/scale", f"{theirs}.weight"), entry(f"{ours}/bias", f"{theirs}.bias")]


def openai_towers(prefix: str = "") -> list[Entry]:
    """Table rows for both towers in OpenAI's names, each with `prefix` in front."""
    return [
        entry("visual/patch/kernel", f"{prefix}visual.conv1.weight", layout=CONV),
        entry("visual/cls", f"{prefix}visual.class_embedding"),
        entry("visual/positions", f"{prefix}visual.positional_embedding"),
        *norm("visual/ln_pre", f"{prefix}visual.ln_pre"),
        *openai_blocks("visual/blocks", f"{prefix}visual.transformer.resblocks.{{}}"),
        *norm("visual/ln_post", f"{prefix}visual.ln_post"),
        entry("visual/proj", f"{prefix}visual.proj"),
        entry("text/token_embedding", f"{prefix}token_embedding.weight"),
        entry("text/positions", f"{prefix}positional_embedding"),
        *openai_blocks("text/blocks", f"{prefix}transformer.resblocks.{{}}"),
        *norm("text/ln_final", f"{prefix}ln_final"),
        entry("text/proj", f"{prefix}text_projection"),
        entry("logit_scale", f"{prefix}logit_scale"),
    ]


def _hf_blocks(ours: str, theirs: str) -> list[Entry]:
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.layer_norm1"),
        entry(
            f"{ours}/attention/qkv/kernel",
            *(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"),
            layout=QKV_KERNEL,
        ),
        entry(
            f"{ours}/attention/qkv/bias",
            *(f"{theirs}.self_attn.{x}_proj.bias" for x in "qkv"),
            layout=QKV_BIAS,
        ),
        entry(
            f"{ours}/attention/out/kernel", f"{theirs}.self_attn.out_proj.weight", layout=OUT_KERNEL
        ),
        entry(f"{ours}/attention/out/bias", f"{theirs}.self_attn.out_proj.bias"),
        *norm(f"{ours}/ln_2", f"{theirs}.layer_norm2"),
        entry(f"{ours}/mlp/up/kernel", f"{theirs}.mlp.fc1.weight", layout=LINEAR),
        entry(f"{ours}/mlp/up/bias", f"{theirs}.mlp.fc1.bias"),
        entry(f"{ours}/mlp/down/kernel", f"{theirs}.mlp.fc2.weight", layout=LINEAR),
        entry(f"{ours}/mlp/down/bias", f"{theirs}.mlp.fc2.bias"),
    ]


OPENAI: list[Entry] = openai_towers()
HUGGING_FACE: list[Entry] = [
    entry("visual/patch/kernel", "vision_model.embeddings.patch_embedding.weight", layout=CONV),
    entry("visual/cls", "vision_model.embeddings.class_embedding"),
    entry("visual/positions", "vision_model.embeddings.position_embedding.weight"),
    *norm("visual/ln_pre", "vision_model.pre_layrnorm"),
    *_hf_blocks("visual/blocks", "vision_model.encoder.layers.{}"),
    *norm("visual/ln_post", "vision_model.post_layernorm"),
    entry("visual/proj", "visual_projection.weight", layout=LINEAR),
    entry("text/token_embedding", "text_model.embeddings.token_embedding.weight"),
    entry("text/positions", "text_model.embeddings.position_embedding.weight"),
    *_hf_blocks("text/blocks", "text_model.encoder.layers.{}"),
    *norm("text/ln_final", "text_model.final_layer_norm"),
    entry("text/proj", "text_projection.weight", layout=LINEAR),
    entry("logit_scale", "logit_scale"),
]
UNUSED = (
    (r"(vision|text)_model\.embeddings\.position_ids", "0, 1, 2 …, a constant"),
    (r"input_resolution|context_length|vocab_size", "a size, known from the shapes"),
    (r"(.*\.)?attn_mask", "the causal mask, a constant"),
)


def kind_of(tensors: TensorFile) -> str | None:
    """Return the kind of CLIP file: `hugging_face`, `openai` or `open_clip`; None if not a CLIP."""
    if "vision_model.embeddings.class_embedding" in tensors:
        return "hugging_face"
    if "visual.class_embedding" not in tensors:
        return None
    openai = tensors.torchscript or "input_resolution" in tensors
    return "openai" if openai and "open_clip" not in tensors.path.name else "open_clip"


def table_of(kind: str) -> list[Entry]:
    """Return the conversion table for a kind of file."""
    return HUGGING_FACE if kind == "hugging_face" else OPENAI


def activation_of(tensors: TensorFile, kind: str) -> Activation | None:
    """Return the activation that the file or its name states; None if neither does."""
    config = tensors.config
    if kind == "openai":
        return "quick_gelu"
    if kind == "hugging_face":
        acts = {
            (config.get(side) or {}).get("hidden_act", "quick_gelu")
            for side in ("vision_config", "text_config")
        }
        if not config:
            return None
        if len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}:
            raise UserError(
                f"{tensors.path}: config.json has hidden_act {', '.join(sorted(acts))}; only "
                "quick_gelu or gelu, the same in both towers, is supported"
            )
        return acts.pop()
    if "model_cfg" in config:
        return "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu"
    name = tensors.path.name.lower()
    if "quickgelu" in name or "openai" in name:
        return "quick_gelu"
    return "gelu" if "open_clip" in name or "laion" in name else None


def config_of(tensors: TensorFile, kind: str, activation: str | None = None) -> ModelConfig:
    """Return the configuration of the CLIP in a file, from its shapes and the JSON beside it."""
    theirs = {e.ours: e.theirs[0] for e in table_of(kind)}

    def shape(ours: str, rank: int) -> Shape:
        return shape_of(tensors, theirs[ours], rank, "CLIP")

    def depth(ours: str) -> int:
        pattern = re.escape(theirs[ours]).replace(r"\{\}", r"(\d+)")
        found = [int(m[1]) for name in tensors if (m := re.fullmatch(pattern, name))]
        return max(found, default=-1) + 1

    width, _, patch, _ = shape("visual/patch/kernel", 4)
    positions, _ = shape("visual/positions", 2)
    vocab_size, text_width = shape("text/token_embedding", 2)
    rows, _ = shape("text/positions", 2)
    grid = max(1, round((positions - 1) ** 0.5))
    vision, text = (tensors.config.get(f"{s}_config") or {} for s in ("vision", "text"))
    vision_depth, text_depth = depth("visual/blocks/ln_1/scale"), depth("text/blocks/ln_1/scale")
    known = kind == "hugging_face" and bool(tensors.config)
    vision_heads = vision.get("num_attention_heads", 12) if known else max(width // 64, 1)
    text_heads = text.get("num_attention_heads", 8) if known else max(text_width // 64, 1)
    out = shape("visual/proj", 2)[0 if kind == "hugging_face" else 1]
    if out != text_width:
        raise UserError(
            f"{tensors.path}: tensor {theirs['visual/proj']} projects to {out}, the text tower is "
            f"{text_width} wide; CLIPs where these differ have no STOA-VLP (ViT-B and L are equal)"
        )
    if activation is None:
        activation = activation_of(tensors, kind) or "quick_gelu"
    return ModelConfig(
        image_size=grid * patch,
        patch_size=patch,
        vision_width=width,
        vision_depth=vision_depth,
        vision_heads=vision_heads,
        vocab_size=vocab_size,
        text_length=min(rows, 77),
        text_positions=rows,
        text_width=text_width,
        text_depth=text_depth,
        text_heads=text_heads,
        fusion_heads=text_heads,
        fusion_depth=min(6, text_depth),
        object_block=max(vision_depth - 2, 1),
        action_block=max(vision_depth - 1, 1),
        activation=cast(Activation, activation),  # ModelConfig raises an error for any other
    )


def read_clip(
    tensors: TensorFile, kind: str, c: ModelConfig, shapes: dict[str, Shape], report: Report
) -> dict[str, np.ndarray]:
    """Read the towers of a CLIP file, with its position tables resized to the model's lengths."""
    stated = activation_of(tensors, kind)
    if stated is None:
        report.notes.append(
            f"the file does not state its activation; {c.activation} is used. open_clip models not "
            "named quickgelu were trained with gelu"
        )
    elif stated != c.activation:
        raise UserError(
            f"{tensors.path}: this CLIP was trained with {stated}, the model has {c.activation}; "
            f"set config.model.activation={stated}"
        )
    return read_table(
        table_of(kind),
        tensors,
        shapes,
        UNUSED,
        report,
        resize={
            "visual/positions": resize_grid,
            "text/positions": resize_rows,
            "text/token_embedding": cut_vocabulary,
        },
    )


def initial_from_clip(
    params: dict[str, np.ndarray], c: ModelConfig, shapes: dict[str, Shape], report: Report
) -> None:
    """Add to `params` what starts as a copy of CLIP's layers: the small encoders and fusion."""

    def copy(ours: str, source: str, layers: slice = slice(None)) -> None:
        if ours in shapes and source in params:
            x = params[source][layers]
            if x.size != int(np.prod(shapes[ours])):
                raise UserError(
                    f"config.model: {ours} {list(shapes[ours])} is initialised from {source}, "
                    f"which provides {list(x.shape)}; use the same width, and no more layers"
                )
            # Reshaping also covers another number of heads, which divides the same projection.
            params[ours] = x.reshape(shapes[ours]).copy()
            report.copied[ours] = source

    blocks = [n.removeprefix("visual/blocks") for n in shapes if n.startswith("visual/blocks/")]
    for encoder, depth in (("trajectory", c.trajectory_depth), ("action", c.action_depth)):
        for rest in blocks:
            copy(f"{encoder}/blocks{rest}", f"visual/blocks{rest}", slice(-depth, None))
        for rest in ("ln_post/scale", "ln_post/bias", "proj"):
            copy(f"{encoder}/{rest}", f"visual/{rest}")
    if c.fusion_depth <= c.text_depth:  # a deeper fusion encoder starts from a fresh initialisation
        for rest in blocks:
            copy(f"fusion/blocks{rest}", f"text/blocks{rest}", slice(0, c.fusion_depth))


def fusion_positions(x: np.ndarray, shape: Shape, seed: int, report: Report) -> np.ndarray:
    """Return CLIP's text positions; where the table is longer, N(0, 0.01²) as in a fresh model."""
    rows = min(77, len(x), shape[0])
    of = f"text/positions, the first {rows} rows"
    report.copied["fusion/positions"] = of if rows == shape[0] else f"{of}; the rest are new"
    new = 0.01 * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.concatenate([x[:rows], new[rows:]])


# Resizing the tables of positions and tokens


def cubic_matrix(size: int, to: int) -> np.ndarray:
    """Return the matrix [to, size] of cubic interpolation along one axis.

    The same as torch's `bicubic` with `align_corners=False` and no anti-aliasing, which is how
    CLIP's positions are usually resized: a = -0.75, half-pixel centres, clamped at the edges.
    """
    at = (np.arange(to) + 0.5) * size / to - 0.5
    base = np.floor(at).astype(int)
    weights = np.zeros((to, size))
    for tap in (-1, 0, 1, 2):
        x = np.abs(at - (base + tap))
        near = (1.25 * x - 2.25) * x * x + 1
        far = ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(
            weights,
            (np.arange(to), np.clip(base + tap, 0, size - 1)),
            np.where(x <= 1, near, np.where(x < 2, far, 0)),
        )
    return weights


def resize_grid(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Resize image positions [1 + g·g, h] to another grid; the position of [CLS] is kept."""
    cls, grid = x[:1], x[1:]
    size, to = round(len(grid) ** 0.5), round((shape[0] - 1) ** 0.5)
    if not size or size * size != len(grid) or x.shape[1:] != shape[1:]:
        raise UserError(f"image positions {list(x.shape)} cannot be resized to {list(shape)}")
    weights = cubic_matrix(size, to)
    grid = grid.reshape(size, size, -1).astype(np.float64)
    grid = np.einsum("yi,xj,ijh->yxh", weights, weights, grid, optimize=True)
    return np.concatenate([cls, grid.reshape(to * to, -1).astype(np.float32)])


def resize_rows(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Resize text positions [L, d]: keep the first rows, or interpolate to more rows."""
    if x.shape[1:] != shape[1:]:
        raise UserError(f"text positions {list(x.shape)} cannot be resized to {list(shape)}")
    if shape[0] <= len(x):
        return x[: shape[0]]
    return (cubic_matrix(len(x), shape[0]) @ x.astype(np.float64)).astype(np.float32)


def cut_vocabulary(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Reduce token embeddings [V, d] to fewer merges; start and end stay the last two rows."""
    if x.shape[1:] != shape[1:] or len(x) < shape[0]:
        raise UserError(
            f"token embeddings {list(x.shape)} are too few for a vocabulary of {list(shape)}; "
            "lower config.model.vocab_size"
        )
    return np.concatenate([x[: shape[0] - 2], x[-2:]])


def vision_and_text(c: ModelConfig) -> ModelConfig:
    """Return the configuration of the CLIP alone, without STOA-VLP's additions."""
    return dataclasses.replace(c, objects=False, actions=False, masked_text="zero")
