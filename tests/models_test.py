"""Properties of the network that hold for any weights."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stoa_jax import objectives, ops
from stoa_jax.errors import UserError
from stoa_jax.models.config import VARIANTS, ModelConfig
from stoa_jax.models.layers import run_blocks
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa, at_position, embed_text, embed_video

B = 3
TINY = dataclasses.replace(
    ModelConfig.tiny(),
    image_size=24,
    vision_width=24,
    vision_depth=3,
    text_width=24,
    text_depth=2,
    text_length=12,
    vocab_size=1024,
    trajectories=6,
    object_block=2,
    action_block=3,
)


@functools.cache
def model(config: ModelConfig = TINY) -> Stoa:
    """Return a model with random parameters, including biases and norms."""
    made = Stoa(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    params = named_parameters(made)
    return with_parameters(
        made,
        {k: v + 0.05 * rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()},
    )


def make_batch(config: ModelConfig = TINY, seed: int = 0, b: int = B) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    t, k, length, v = config.frames, config.objects_per_frame, config.text_length, config.vocab_size
    corner = rng.random((b, t, k, 2, 2), np.float32)
    classes = rng.integers(-1, 5, (b, t, k)).astype(np.int32)
    tokens = np.zeros((b, length), np.int32)
    for i in range(b):
        n = rng.integers(2, length - 1)
        tokens[i, : n + 2] = [v - 2, *rng.integers(1, v - 2, n), v - 1][: n + 2]
    return dict(
        pixels=rng.integers(0, 256, (b, t, config.image_size, config.image_size, 3), np.uint8),
        boxes=np.concatenate([corner.min(-2), corner.max(-2)], -1),
        classes=classes,
        scores=np.where(classes >= 0, rng.random((b, t, k), np.float32), 0),
        tokens=tokens,
    )


_encode_video, encode_text, fuse = map(jax.jit, (Stoa.encode_video, Stoa.encode_text, Stoa.fuse))


def encode_video(m: Stoa, x):
    return _encode_video(m, x["pixels"], x["boxes"], x["classes"], x["scores"])


def test_packed_trajectories_equal_separate_ones():
    m, x = model(), make_batch()
    t, k, n, h = TINY.frames, TINY.objects_per_frame, TINY.trajectories, TINY.vision_width
    objects = jnp.asarray(np.random.default_rng(1).normal(size=(B, t, k, h)), jnp.float32)
    chosen, membership = jax.vmap(lambda c, s: ops.select_trajectories(c, s, n))(
        x["classes"], x["scores"]
    )
    valid = (x["classes"] >= 0).reshape(B, -1)
    real = (chosen >= 0)[..., None]
    assert real.any() and not real.all()  # padding is tried too

    def packed(encoder, objects):
        return jnp.where(real, encoder(objects, membership, valid), 0)

    def separate(encoder, objects):
        """Run N sequences of a [CLS] and all objects, each attending to one class."""

        def one(objects, member):
            sequence = jnp.concatenate([encoder.cls[...][None], objects.reshape(t * k, h)])
            seen = jnp.concatenate([jnp.ones(1, bool), member])
            mask = jnp.broadcast_to(seen, (1, 1 + t * k, 1 + t * k))
            y = run_blocks(encoder.blocks, sequence[None], mask)
            return encoder.ln_post(y[0, 0]) @ encoder.proj[...]

        y = jax.vmap(lambda o, m: jax.vmap(lambda row: one(o, row))(m))(objects, membership)
        return jnp.where(real, y, 0)

    a, b = (jax.jit(f)(m.trajectory, objects) for f in (packed, separate))
    np.testing.assert_allclose(a, b, atol=1e-5)

    def gradients(f):
        weight = jnp.asarray(np.random.default_rng(2).normal(size=(B, n, TINY.text_width)))
        return jax.jit(jax.grad(lambda e, o: (f(e, o) * weight).mean(), (0, 1)))(
            m.trajectory, objects
        )

    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients(packed)),
        jax.tree.leaves(gradients(separate)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


def test_padded_objects_change_nothing():
    m, x = model(), make_batch()
    y = dict(x)
    padding = x["classes"] < 0
    rng = np.random.default_rng(3)
    y["boxes"] = np.where(padding[..., None], rng.normal(size=x["boxes"].shape), x["boxes"])
    y["boxes"] = y["boxes"].astype(np.float32)
    y["scores"] = np.where(padding, 0.9, x["scores"]).astype(np.float32)
    y["boxes"][0][padding[0]] = np.nan
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        encode_video(m, x),
        encode_video(m, y),
    )


def test_objects_may_stand_in_any_slot():
    m, x = model(), make_batch()
    order = np.random.default_rng(4).permutation(TINY.objects_per_frame)
    y = {k: v[:, :, order] if k in ("boxes", "classes", "scores") else v for k, v in x.items()}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        encode_video(m, x),
        encode_video(m, y),
    )


def test_a_clip_without_objects_is_finite():
    m, x = model(), make_batch()
    x["classes"][:] = -1
    video = encode_video(m, x)
    assert not video.object_mask.any() and (video.object_classes == -1).all()
    assert all(np.isfinite(leaf).all() for leaf in video)


def _loss_and_gradient(m: Stoa):
    x = make_batch()

    def loss(m):
        video = m.encode_video(x["pixels"], x["boxes"], x["classes"], x["scores"])
        text = m.encode_text(x["tokens"])
        return m.fuse(video, text.tokens, text.mask).text.sum() / 100

    return jax.jit(jax.value_and_grad(loss))(m)


@functools.cache
def _looped():
    return _loss_and_gradient(model(dataclasses.replace(TINY, scan_layers=True)))


@pytest.mark.parametrize(
    "change",
    [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}],
    ids=["unrolled", "remat", "remat_dots"],
)
def test_how_it_runs_does_not_change_the_numbers(change):
    other = Stoa(dataclasses.replace(TINY, **change), rngs=nnx.Rngs(1))
    a, b = _looped(), _loss_and_gradient(with_parameters(other, named_parameters(model())))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    for name, g in named_parameters(a[1]).items():
        np.testing.assert_allclose(g, named_parameters(b[1])[name], atol=1e-5, err_msg=name)


def test_text_is_causal():
    m, x = model(), make_batch()
    length = TINY.text_length
    mask = jnp.tril(jnp.ones((1, length, length), bool))

    @jax.jit
    def gradient(embedded, i):
        return jax.grad(lambda e: run_blocks(m.text.blocks, e, mask)[:, i].sum())(embedded)

    embedded = m.text.embed(jnp.asarray(x["tokens"]))
    for i in range(length):
        g = np.abs(gradient(embedded, i)).sum((0, 2))
        assert (g[i + 1 :] == 0).all() and (g[: i + 1] > 0).all()


def test_padding_after_sep_changes_nothing():
    m, x = model(), make_batch()
    text = encode_text(m, x["tokens"])
    other = encode_text(m, np.where(text.mask, x["tokens"], 17))
    np.testing.assert_allclose(text.sep, other.sep, atol=1e-6)
    video = encode_video(m, x)
    a, b = (fuse(m, video, t.tokens, t.mask) for t in (text, other))
    np.testing.assert_allclose(a.cls, b.cls, atol=1e-5)


def test_a_language_model_sees_no_later_word_and_video_sees_none():
    m, x = model(), make_batch()
    video, text = encode_video(m, x), encode_text(m, x["tokens"])
    length = TINY.text_length
    prefix = np.array([1, 3, 2])
    attention = objectives.prefix_attention(jnp.asarray(prefix), length)

    @jax.jit
    def gradient(of_clip, of_text):
        """Return the gradient of a mix of the fused outputs by input text positions [B, L]."""

        def f(tokens):
            fused = m.fuse(video, tokens, jnp.ones_like(text.mask), attention)
            return (fused.cls.sum(-1) * of_clip).sum() + (fused.text.sum(-1) * of_text).sum()

        return jnp.abs(jax.grad(f)(text.tokens)).sum(-1)

    assert not gradient(1.0, jnp.zeros(length)).any()
    for i in range(length):
        g = gradient(0.0, jax.nn.one_hot(i, length))
        for b in range(B):
            seen = max(i + 1, prefix[b]) if i < prefix[b] else i + 1
            assert (g[b, seen:] == 0).all() and (g[b, :seen] > 0).all()


def test_masked_words_do_not_reach_fusion():
    m, x = model(), make_batch()
    masked = np.zeros(x["tokens"].shape, bool)
    masked[:, 1] = True
    video = encode_video(m, x)

    def fused(tokens):
        text = encode_text(m, tokens, jnp.asarray(masked))
        return m.fuse(video, text.tokens, text.mask, masked=jnp.asarray(masked)).text

    other = np.where(masked, 5, x["tokens"])
    np.testing.assert_allclose(fused(x["tokens"]), fused(other), atol=1e-6)


def test_fusion_starts_by_looking_at_what_is_alike():
    attention = Stoa(TINY, rngs=nnx.Rngs(0)).fusion.blocks.attention
    q, k, _ = (attention.qkv.kernel[...][0, :, i] for i in range(3))
    np.testing.assert_array_equal(q, k)
    x = jax.random.normal(jax.random.key(0), (TINY.text_width, TINY.text_width))
    logits = jnp.einsum("sh,had,gad,tg->st", x, q, k, x)
    assert (logits.argmax(1) == jnp.arange(len(x))).mean() > 0.9


def test_words_start_with_a_spread_of_one():
    logits = Stoa(TINY, rngs=nnx.Rngs(0)).lm_logits(
        jax.random.normal(jax.random.key(0), (64, TINY.text_width))
    )
    assert 0.7 < logits.std() < 1.4


def test_without_objects_or_actions():
    x = make_batch()
    for change in (
        dict(objects=False),
        dict(actions=False),
        dict(objects=False, actions=False),
    ):
        config = dataclasses.replace(TINY, **change)
        m = Stoa(config, rngs=nnx.Rngs(0))
        video, text = encode_video(m, x), encode_text(m, x["tokens"])
        assert fuse(m, video, text.tokens, text.mask).cls.shape == (B, TINY.text_width)
        names = {name.split("/")[0] for name in named_parameters(m)}
        assert ("trajectory" in names) == ("regions" in names) == config.objects
        assert ("action" in names) == config.actions


def test_embeddings_have_unit_length():
    m, x = model(), make_batch()
    for v in (embed_video(encode_video(m, x)), embed_text(encode_text(m, x["tokens"]))):
        np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1, atol=1e-6)


def test_at_position():
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    index = np.array([0, 4, 2, 2])
    np.testing.assert_array_equal(at_position(jnp.asarray(x), index), x[np.arange(4), index])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_size_shapes(variant, dtype):
    c = dataclasses.replace(getattr(ModelConfig, variant)(), dtype=dtype, num_answers=7)
    b, t, k, d = 2, c.frames, c.objects_per_frame, c.text_width

    def run():
        m = Stoa(c, rngs=nnx.Rngs(0))
        video = m.encode_video(
            jnp.zeros((b, t, c.image_size, c.image_size, 3), jnp.uint8),
            jnp.zeros((b, t, k, 4)),
            jnp.zeros((b, t, k), jnp.int32),
            jnp.zeros((b, t, k)),
        )
        text = encode_text(m, jnp.zeros((b, c.text_length), jnp.int32))
        fused = fuse(m, video, text.tokens, text.mask)
        heads = (
            m.lm_logits(fused.text),
            m.match_logits(m.pair(video, text)),
            m.answer_logits(m.pair(video, text)),
        )
        return m, video, text, fused, heads

    m, video, text, fused, heads = jax.eval_shape(run)
    assert video.frames.shape == (b, t, d) and video.frames.dtype == dtype
    assert video.objects.shape == (b, c.trajectories, d)
    assert video.actions.shape == (b, c.action_tokens, d)
    assert text.tokens.shape == fused.text.shape == (b, c.text_length, d)
    assert [h.shape for h in heads] == [(b, c.text_length, c.vocab_size), (b, 2), (b, 7)]
    assert all(p.dtype == jnp.float32 for p in named_parameters(m).values())
    if variant == "base":
        # CLIP ViT-B/16 has 149.62 million parameters.
        towers = sum(
            p.size
            for name, p in named_parameters(m).items()
            if name.startswith(("visual", "text", "logit")) and "mask_embedding" not in name
        )
        assert towers == 149_620_737
        assert c.visual_length + c.text_length == 69


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(image_size=50), "image_size 50 is not a multiple of patch_size 12; use 48"),
        (dict(trajectories=0), "trajectories is 0"),
        (dict(text_length=2), "text_length is 2"),
        (dict(text_length=100), "raise text_positions"),
        (dict(object_block=9), "video blocks 1 to 3"),
        (dict(vision_heads=5), "vision_width 128 is not a multiple"),
    ],
)
def test_sizes_that_do_not_fit(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(ModelConfig.tiny(), **change)


def test_parameters_are_strict():
    params = named_parameters(model())
    params["more"] = params.pop("logit_scale")
    with pytest.raises(ValueError, match=r"missing \['logit_scale'\].*\['more'\]"):
        with_parameters(model(), params)


def test_the_network_and_its_losses_need_jax_alone():
    code = (
        "import stoa_jax.joint_loss, sys;"
        "foreign = {'grain', 'tensorflow', 'tensorflow_datasets', 'ml_collections', 'clu', 'cv2'};"
        "sys.exit(', '.join(foreign & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
