"""Pure functions of arrays and masks, for use under jit, vmap and grad."""

from stoa_jax.ops.attention import attention
from stoa_jax.ops.cudnn import choose_attention, cudnn_attention
from stoa_jax.ops.elementwise import gelu, layer_norm, quick_gelu
from stoa_jax.ops.matching import assign
from stoa_jax.ops.products import einsum_float32, project
from stoa_jax.ops.roi_align import roi_align
from stoa_jax.ops.trajectories import (
    packed_attention_mask,
    select_trajectories,
    track_objects,
)

__all__ = [
    "assign",
    "attention",
    "choose_attention",
    "cudnn_attention",
    "einsum_float32",
    "gelu",
    "layer_norm",
    "packed_attention_mask",
    "project",
    "quick_gelu",
    "roi_align",
    "select_trajectories",
    "track_objects",
]
