"""Object tokens, and the trajectory tokens computed from them.

Shapes: B clips, T frames, K objects per frame, N trajectories, P = G·G patches, h vision width,
d shared width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import LayerNorm, Mlp, normal, run_blocks, stack


class RegionEncoder(nnx.Module):
    """Encode objects as `MLP(MaxPool(RoIAlign(patches, box)))` plus a box and a frame embedding."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        h = c.vision_width
        self.config = c
        # Box and frame embeddings start larger than the appearance: at equal size, hardly any
        # motion was learned in the same number of steps (benchmarks/notes/motion.md).
        self.mlp = Mlp(h, h, h, stds=(h**-0.5, 0.1 * h**-0.5), rngs=rngs)
        self.box_mlp = Mlp(4, h, h, stds=(0.5, 4 * h**-0.5), rngs=rngs)
        self.frame_embedding = normal(rngs, (c.frames, h), 1.0)

    def __call__(self, patches: Array, boxes: Array) -> Array:
        """Return object tokens [B, T, K, h] from patches [B, T, P, h] and boxes [B, T, K, 4].

        Boxes are (x1, y1, x2, y2) in [0, 1].
        """
        c = self.config
        b, t, _, h = patches.shape
        grid = patches.reshape(b, t, c.grid, c.grid, h)

        def align(features: Array, boxes: Array) -> Array:
            return ops.roi_align(
                features, boxes, (c.roi_size, c.roi_size), sampling_ratio=2, spatial_scale=c.grid
            )

        regions = jax.vmap(jax.vmap(align))(grid, boxes)  # [B, T, K, R, R, h]
        tokens = self.mlp(regions.max((3, 4)).astype(patches.dtype))
        box = self.box_mlp(boxes.astype(patches.dtype))
        frame = self.frame_embedding[...].astype(patches.dtype)[:, None]
        return tokens + box + frame


class TrajectoryEncoder(nnx.Module):
    """Encode the objects of each chosen class, over all frames, into one trajectory token.

    Every object belongs to one class, so the N trajectories of a clip run as one packed sequence
    of N [CLS] tokens and T·K objects, in which every class attends only to itself. The outputs
    equal those of N separate sequences of 1 + T·K positions each.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        h = c.vision_width
        self.config = c
        self.cls = normal(rngs, (h,), h**-0.5)
        self.blocks = stack(
            c.trajectory_depth, h, c.vision_heads, activation=c.activation, rngs=rngs
        )
        self.ln_post = LayerNorm(h)
        self.proj = normal(rngs, (h, c.text_width), h**-0.5)
        verbs, adjectives = c.trajectory_verbs, c.trajectory_adjectives
        self.verb_proj = normal(rngs, (h, c.text_width), h**-0.5) if verbs else None
        self.adjective_proj = normal(rngs, (h, c.text_width), h**-0.5) if adjectives else None

    def __call__(self, objects: Array, membership: Array, valid: Array) -> Array:
        """Return trajectory tokens [B, N, d] in the shared space; arguments as in `read`."""
        return self.tokens(self.read(objects, membership, valid))

    def tokens(self, x: Array) -> Array:
        """Project trajectories [B, N, h] to the tokens that are aligned with nouns [B, N, d]."""
        return x @ self.proj[...].astype(x.dtype)

    def verbs(self, x: Array) -> Array:
        """Project trajectories [B, N, h] to verb features [B, N, d]; [B, 0, d] if that is off."""
        return self._projected(x, self.verb_proj)

    def adjectives(self, x: Array) -> Array:
        """Project trajectories [B, N, h] to adjective features; [B, 0, d] if that is off."""
        return self._projected(x, self.adjective_proj)

    def _projected(self, x: Array, proj: nnx.Param | None) -> Array:
        if proj is None:
            return jnp.zeros((x.shape[0], 0, self.config.text_width), x.dtype)
        return x @ proj[...].astype(x.dtype)

    def read(self, objects: Array, membership: Array, valid: Array) -> Array:
        """Return trajectories [B, N, h] in the vision tower's width.

        Takes objects [B, T, K, h], `membership` [B, N, T·K] (True where the object belongs to the
        trajectory) and `valid` [B, T·K] (False for padded objects).
        """
        c = self.config
        b, n, _ = membership.shape
        objects = objects.reshape(b, -1, objects.shape[-1])
        cls = jnp.broadcast_to(self.cls[...].astype(objects.dtype), (b, n, objects.shape[-1]))
        x = jnp.concatenate([cls, objects], 1)  # [B, N + T·K, h]
        mask = jax.vmap(ops.packed_attention_mask)(membership, valid)
        x = run_blocks(
            self.blocks,
            x,
            mask,
            stop=c.trajectory_layers_run,
            keep=slice(0, n),
            scan=c.scan_layers,
            remat=c.remat,
        )
        return self.ln_post(x)
