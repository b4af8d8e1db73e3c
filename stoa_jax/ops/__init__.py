"""Pure functions of arrays and masks, for use under jit, vmap and grad."""

from stoa_jax.ops.matching import assign
from stoa_jax.ops.roi_align import roi_align
from stoa_jax.ops.trajectories import packed_attention_mask, select_trajectories

__all__ = ["assign", "packed_attention_mask", "roi_align", "select_trajectories"]
