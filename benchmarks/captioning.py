"""Time captioning with five beams: with cached keys and values, without, and in transformers.

    python -m benchmarks.captioning [--clips=4] [--pieces=20] [--rounds=3] [--smoke]

The decoder is that of `base` (a text encoder of 12 layers and a fusion encoder of 6, width 512,
49,408 pieces) over random clip features, in float32. transformers runs `generate` of a GPT-2 with
18 layers of the same width and vocabulary, with its own cache, on a prefix as long as our visual
positions. With random weights no caption ends early, so all sides decode the same number of pieces.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from stoa_jax import decode, objectives
from stoa_jax.inference.programs import caption_tokens
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import VideoFeatures
from stoa_jax.models.stoa import Stoa

BEAMS = 5


def random_features(c: ModelConfig, clips: int) -> VideoFeatures:
    """Return random features of clips, in the form that fusion reads."""
    shapes = jax.eval_shape(
        lambda model, x, boxes, classes: model.encode_video(x, boxes, classes, classes * 1.0),
        jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0))),
        jax.ShapeDtypeStruct((clips, c.frames, c.image_size, c.image_size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((clips, c.frames, c.objects_per_frame, 4), jnp.float32),
        jax.ShapeDtypeStruct((clips, c.frames, c.objects_per_frame), jnp.int32),
    )
    rng = np.random.default_rng(0)

    def sample(x):
        if x.dtype == jnp.bool_:
            return jnp.ones(x.shape, bool)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(sample, shapes)


@functools.partial(jax.jit, static_argnames=("pieces",))
def without_cache(model: Stoa, video: VideoFeatures, pieces: int) -> jax.Array:
    """Return captions [B, M + 2] of the same search, encoding the whole text for every piece."""
    c, clips = model.config, video.cls.shape[0]
    repeated = jax.tree.map(lambda x: jnp.repeat(x, BEAMS, 0), video)
    length = pieces + 1

    def step(cache, tokens, position):
        texts = cache["texts"][0].at[:, :, position].set(tokens)
        flat = texts.reshape(clips * BEAMS, length)
        text = model.encode_text(flat)
        attention = objectives.prefix_attention(jnp.ones(len(flat), jnp.int32), length)
        mask = jnp.ones(flat.shape, bool)
        fused = model.fuse(repeated, text.tokens, mask, attention).text
        here = jax.lax.dynamic_index_in_dim(fused, position, 1, keepdims=False)
        return model.lm_logits(here).reshape(clips, BEAMS, -1), {"texts": texts[None]}

    cache = {"texts": jnp.zeros((1, clips, BEAMS, length), jnp.int32)}
    options = {"start": c.vocab_size - 2, "end": c.vocab_size - 1, "max_pieces": pieces}
    return decode.beam_search(step, cache, clips, beams=BEAMS, **options).tokens


def by_transformers(c: ModelConfig, clips: int, pieces: int):
    """Return a function that runs `generate` on a decoder of equal size; None without torch."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        print(f"transformers is left out: {error}")
        return None
    torch.manual_seed(0)
    prefix = c.visual_length
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=prefix + pieces + 2,
            n_embd=c.text_width,
            n_layer=c.text_depth + c.fusion_depth,
            n_head=c.text_heads,
        )
    ).eval()
    tokens = torch.randint(0, 1000, (clips, prefix))
    mask = torch.ones_like(tokens)

    @torch.inference_mode()
    def generate() -> None:
        model.generate(
            tokens,
            attention_mask=mask,
            num_beams=BEAMS,
            min_new_tokens=pieces,
            max_new_tokens=pieces,
            do_sample=False,
            pad_token_id=0,
        )

    return generate


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check that cached and uncached captions agree, print the table, and return the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    c, clips, pieces = ModelConfig.base(), args.clips, args.pieces
    if args.smoke:
        c = dataclasses.replace(ModelConfig.tiny(), text_depth=1, fusion_depth=1, vocab_size=1024)
        clips, pieces = 2, 4
    model = jax.jit(lambda: Stoa(c, rngs=nnx.Rngs(0)))()
    video = random_features(c, clips)
    sides = {
        "with cache": lambda: np.asarray(
            caption_tokens(model, video, beams=BEAMS, max_pieces=pieces)
        ),
        "without cache": lambda: np.asarray(without_cache(model, video, pieces)),
    }
    cached, plain = (run() for run in sides.values())
    assert cached.shape == plain.shape and (cached == plain).mean() > 0.9, "captions differ"
    generate = by_transformers(c, clips, pieces)
    if generate is not None:
        sides["generate of transformers"] = generate
    seconds = timing.in_turn(sides, 1 if args.smoke else args.rounds)
    print(timing.environment("jax", "torch", "transformers"))
    print(f"{(cached == plain).mean():.1%} of the tokens are equal with and without cache")
    timing.table(
        [f"{clips} clips, {BEAMS} beams, {pieces} pieces", "s", "with cache is faster by"],
        [[name, f"{s:.2f}", f"{s / seconds['with cache']:.1f}×"] for name, s in seconds.items()],
    )
    return seconds


if __name__ == "__main__":
    main()
