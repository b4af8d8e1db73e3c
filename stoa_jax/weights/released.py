"""Read the authors' checkpoint: CLIP in OpenAI's names under `clip.`, and STOA-VLP's additions."""

import dataclasses

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.weights.clip import norm, openai_blocks, openai_towers
from stoa_jax.weights.tables import (
    LINEAR,
    QUERIES,
    ROW,
    Report,
    Shape,
    entry,
    read_table,
    shape_of,
)
from stoa_jax.weights.tensors import TensorFile

_OBJECTS = "clip.visual.transformer.object_encoder"
TABLE = [
    *openai_towers("clip."),
    entry("regions/up/kernel", f"{_OBJECTS}.patch_to_d.0.weight", layout=LINEAR),
    entry("regions/down/kernel", f"{_OBJECTS}.patch_to_d.2.weight", layout=LINEAR),
    entry("regions/box_up/kernel", f"{_OBJECTS}.c_coord_to_feature.0.weight", layout=LINEAR),
    entry("regions/box_down/kernel", f"{_OBJECTS}.c_coord_to_feature.2.weight", layout=LINEAR),
    entry("regions/slot_embedding", f"{_OBJECTS}.box_categories"),
    entry("regions/frame_embedding", "clip.object_frame_pos_emb"),
    entry("trajectory/cls", "clip.object_cls_embedding", layout=ROW),
    *openai_blocks("trajectory/blocks", "clip.object_fusion.transformer.resblocks.{}"),
    *norm("trajectory/ln_post", "clip.object_fusion.ln_post"),
    entry("trajectory/proj", "clip.object_fusion.proj"),
    entry("action/queries", "clip.object_action", layout=QUERIES),
    *openai_blocks("action/blocks", "clip.object_act_fusion.transformer.resblocks.{}"),
    *norm("action/ln_post", "clip.object_act_fusion.ln_post"),
    entry("action/proj", "clip.object_act_fusion.proj"),
    entry("fusion/positions", "clip.fusion_positional_embedding"),
    *openai_blocks("fusion/blocks", "clip.fusion_transformer.resblocks.{}"),
    entry("fusion/lm_proj", "clip.fusion_proj"),
    entry("fusion/lm_bias", "clip.fusion_logit_bias"),
    entry("fusion/match/unmatched", "clip.fusion_unmatch_matrix"),
    entry("fusion/match/matched", "clip.fusion_match_matrix"),
]
_PART = "the authors store a whole vision transformer, and run only its blocks, ln_post and proj"
UNUSED = (
    (
        r"clip\.fusion_transformer\.resblocks\.\d+\..*",
        "stored; the authors run only the first six blocks",
    ),
    (
        r"clip\.object_(act_)?fusion\.(class_embedding|positional_embedding|conv1\.weight|ln_pre\..*)",
        _PART,
    ),
    (r"clip\.object_(act_)?fusion\.transformer\.object_encoder\..*", _PART),
    (
        r"clip\.object_(text_)?fusion_positional_embedding|clip\.object_alignment_proj"
        r"|clip\.object_logit_bias|clip\.lm_head\..*|obj_ln\..*|obj_proj",
        "never read by the authors' code",
    ),
    (r"cross\..*|similarity_dense\..*", "CLIP4Clip's cross encoder, which STOA-VLP does not run"),
    (r"clip\.(input_resolution|context_length|vocab_size)", "a size, known from the shapes"),
)
_FUSION_DEPTH = 6


def is_released(tensors: TensorFile) -> bool:
    """Return whether the tensors have the names of the authors' code."""
    return "clip.visual.class_embedding" in tensors or "clip.fusion_proj" in tensors


def config_of(tensors: TensorFile) -> ModelConfig:
    """Return the configuration of the `released` model in a checkpoint, from its shapes."""

    def shape(name: str, rank: int) -> Shape:
        return shape_of(tensors, name, rank, "checkpoint of the authors'")

    def depth(stack: str) -> int:
        ends = f"{stack}.resblocks.", ".ln_1.weight"
        return sum(n.startswith(ends[0]) and n.endswith(ends[1]) for n in tensors)

    width, _, patch, _ = shape("clip.visual.conv1.weight", 4)
    positions, _ = shape("clip.visual.positional_embedding", 2)
    vocab_size, text_width = shape("clip.token_embedding.weight", 2)
    frames, objects, _ = shape(f"{_OBJECTS}.box_categories", 3)
    text_positions, _ = shape("clip.positional_embedding", 2)
    fusion_rows, _ = shape("clip.fusion_positional_embedding", 2)
    actions = shape("clip.object_action", 4)[2]
    grid = max(1, round((positions - 1) ** 0.5))
    paper = ModelConfig(
        image_size=grid * patch,
        patch_size=patch,
        frames=frames,
        vision_width=width,
        vision_depth=depth("clip.visual.transformer"),
        vision_heads=max(width // 64, 1),
        vocab_size=vocab_size,
        text_length=min(32, text_positions),
        text_positions=text_positions,
        text_width=text_width,
        text_depth=depth("clip.transformer"),
        text_heads=max(text_width // 64, 1),
        objects_per_frame=objects,
        trajectories=2 * objects,
        action_tokens=actions,
        trajectory_depth=depth("clip.object_fusion.transformer"),
        action_depth=depth("clip.object_act_fusion.transformer"),
        fusion_depth=_FUSION_DEPTH,
        fusion_heads=max(text_width // 64, 1),
        object_block=1,
        action_block=1,
    )
    # The authors pool every box to the size of the whole grid, so no bin is larger than a patch.
    return dataclasses.replace(paper.released(), fusion_position_rows=fusion_rows, roi_size=grid)


def read_released(
    tensors: TensorFile, c: ModelConfig, shapes: dict[str, Shape], report: Report
) -> dict[str, np.ndarray]:
    """Read the parameters of a `released` model from the authors' checkpoint."""
    wanted = {e.ours for e in TABLE}
    differing = sorted(n for n in shapes if n not in wanted and not n.startswith("fusion/answer/"))
    if differing:
        raise UserError(
            f"{tensors.path}: the authors' checkpoint fits only the preset `released`; it lacks "
            f"{', '.join(differing[:4])}, which config.model has; use "
            "ModelConfig.base().released(), or --config=configs/TASK.py:…,released"
        )
    params = read_table(TABLE, tensors, shapes, UNUSED, report)
    if c.trajectory_layers_run < c.trajectory_depth:
        report.notes.append(
            f"trajectory/blocks hold {c.trajectory_depth} blocks; the first "
            f"{c.trajectory_layers_run} run, as in the authors' code"
        )
    return params
