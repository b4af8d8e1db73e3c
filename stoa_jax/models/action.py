"""Action tokens: learned queries pool each frame, two layers attend over the frames.

Shapes: B clips, T frames, K objects per frame, P patches, A actions, h vision width,
d shared width.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import LayerNorm, normal, run_blocks, stack


class ActionEncoder(nnx.Module):
    """Pool each frame by `softmax(q · Fᵀ) F` over its patches and objects F, then attend over time.

    The output at a prepended [CLS] is the action token.
    """

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

    def pool(self, patches: Array, objects: Array | None, valid: Array | None) -> Array:
        """Pool patches [B, T, P, h] and objects [B, T, K, h] by every query: [B, A, T, h].

        `valid` [B, T, K] is False for padded objects.
        """
        weights, features = self.attention(patches, objects, valid)
        return jnp.einsum("batf,btfh->bath", weights, features)

    def attention(
        self, patches: Array, objects: Array | None, valid: Array | None
    ) -> tuple[Array, Array]:
        """Return the weights [B, A, T, P + K] of every query, and what they weigh [B, T, P + K, h].

        Takes what `pool` takes; without objects K is 0.
        """
        features, mask = patches, None
        if objects is not None and valid is not None:
            features = jnp.concatenate([patches, objects], 2)  # [B, T, P + K, h]
            mask = jnp.concatenate([jnp.ones(patches.shape[:3], bool), valid], 2)
        queries = self.queries[...].astype(features.dtype)
        logits = jnp.einsum("ah,btfh->batf", queries, features, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask[:, None], logits, -jnp.inf)  # patches are never masked
        return nnx.softmax(logits, -1).astype(features.dtype), features

    def __call__(
        self, patches: Array, objects: Array | None, valid: Array | None, frame_cls: Array
    ) -> Array:
        """Return action tokens [B, A, d].

        Takes patches [B, T, P, h], objects [B, T, K, h] with their mask `valid` [B, T, K], and the
        frames' [CLS] outputs [B, T, h].
        """
        c = self.config
        x = self.pool(patches, objects, valid)
        b, a, t, h = x.shape
        if self.cls is not None and self.frame_embedding is not None:
            x = x + self.frame_embedding[...].astype(x.dtype)
            cls = self.cls[...].astype(x.dtype)
        else:
            cls = frame_cls.mean(1)[:, None, None]
        cls = jnp.broadcast_to(cls, (b, a, 1, h))
        x = jnp.concatenate([cls, x], 2).reshape(b * a, t + 1, h)
        x = run_blocks(self.blocks, x, keep=slice(0, 1), scan=c.scan_layers, remat=c.remat)
        x = self.ln_post(x[:, 0]) @ self.proj[...].astype(x.dtype)
        return x.reshape(b, a, -1)
