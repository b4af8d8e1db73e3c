"""Action tokens: learned queries gather from each frame, two layers read them over time.

Shapes: B clips, T frames, K objects a frame, P patches, A actions, h vision width, d shared width.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import LayerNorm, normal, run_blocks, stack


class ActionEncoder(nnx.Module):
    """`x = softmax(q · Fᵀ) F` in each frame, F its patches and objects; then [CLS] over time."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        h = c.vision_width
        self.config = c
        self.queries = normal(rngs, (c.action_tokens, h), h**-0.5)
        learned = c.action_cls == "learned"
        self.cls = normal(rngs, (h,), h**-0.5) if learned else None
        self.frame_embedding = normal(rngs, (c.frames, h), 1.0) if learned else None
        self.blocks = stack(c.action_depth, h, c.vision_heads, activation=c.activation, rngs=rngs)
        self.ln_post = LayerNorm(h)
        self.proj = normal(rngs, (h, c.text_width), h**-0.5)

    def gather(self, patches: Array, objects: Array | None, valid: Array | None) -> Array:
        """[B, T, P, h], [B, T, K, h] and [B, T, K] -> what each query saw [B, A, T, h]."""
        features, seen = patches, None
        if objects is not None:
            features = jnp.concatenate([patches, objects], 2)  # [B, T, P + K, h]
            seen = jnp.concatenate([jnp.ones(patches.shape[:3], bool), valid], 2)
        queries = self.queries[...].astype(features.dtype)
        logits = jnp.einsum("ah,btfh->batf", queries, features, preferred_element_type=jnp.float32)
        if seen is not None:
            logits = jnp.where(seen[:, None], logits, -jnp.inf)  # patches are always there
        weights = nnx.softmax(logits, -1).astype(features.dtype)
        return jnp.einsum("batf,btfh->bath", weights, features)

    def __call__(
        self, patches: Array, objects: Array | None, valid: Array | None, frame_cls: Array
    ) -> Array:
        """[B, T, P, h], [B, T, K, h], [B, T, K] and the frames' [CLS] [B, T, h] -> [B, A, d]."""
        c = self.config
        x = self.gather(patches, objects, valid)
        b, a, t, h = x.shape
        if c.action_cls == "learned":
            x = x + self.frame_embedding[...].astype(x.dtype)
            cls = self.cls[...].astype(x.dtype)
        else:
            cls = frame_cls.mean(1)[:, None, None]
        cls = jnp.broadcast_to(cls, (b, a, 1, h))
        x = jnp.concatenate([cls, x], 2).reshape(b * a, t + 1, h)
        x = run_blocks(self.blocks, x, scan=c.scan_layers, remat=c.remat)
        x = self.ln_post(x[:, 0]) @ self.proj[...].astype(x.dtype)
        return x.reshape(b, a, -1)
