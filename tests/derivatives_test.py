"""Operations with custom derivatives, against automatic differentiation of plain formulas."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stoa_jax import objectives, ops
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import Block, run_blocks, stack
from stoa_jax.ops import products

# `stoa_jax.ops.attention` is the function; this is its module.
attention_module = importlib.import_module("stoa_jax.ops.attention")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def plain_layer_norm(x, scale, bias):
    y = x - x.mean(-1, keepdims=True)
    return y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * scale + bias


def plain_attention(q, k, v, mask):
    logits = jnp.einsum("nsad,ntad->nast", q, k) / math.sqrt(q.shape[-1])
    logits = logits if mask is None else jnp.where(mask[:, None], logits, -jnp.inf)
    return jnp.einsum("nast,ntad->nsad", jax.nn.softmax(logits, -1), v)


def plain_cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


MASK = jnp.asarray(RNG.random((2, 5, 7)) < 0.6).at[:, :, 0].set(True)
LABELS = jnp.asarray(RNG.integers(0, 9, (4, 3)))
CASES = {
    "layer_norm": (ops.layer_norm, plain_layer_norm, (3 + normal(4, 5, 6), normal(6), normal(6))),
    "quick_gelu": (ops.quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), (3 * normal(40),)),
    "gelu": (ops.gelu, lambda x: jax.nn.gelu(x, approximate=False), (3 * normal(40),)),
    "einsum_float32": (
        lambda x, y: ops.einsum_float32("nsad,ntad->nast", x, y),
        lambda x, y: jnp.einsum("nsad,ntad->nast", x, y),
        (normal(2, 3, 4, 5), normal(2, 6, 4, 5)),
    ),
    "project": (
        lambda x, kernel: ops.project(x, kernel),
        lambda x, kernel: jnp.einsum("nsh,hcad->nscad", x, kernel),
        (normal(2, 3, 4), normal(4, 3, 2, 5)),
    ),
    "project_two_axes": (
        lambda x, kernel: ops.project(x, kernel, 2),
        lambda x, kernel: jnp.einsum("nsad,adh->nsh", x, kernel),
        (normal(2, 3, 4, 5), normal(4, 5, 6)),
    ),
    "attention": (
        lambda q, k, v: ops.attention(q, k, v),
        lambda q, k, v: plain_attention(q, k, v, None),
        (normal(2, 5, 3, 4), normal(2, 7, 3, 4), normal(2, 7, 3, 4)),
    ),
    "masked_attention": (
        lambda q, k, v: ops.attention(q, k, v, MASK),
        lambda q, k, v: plain_attention(q, k, v, MASK),
        (normal(2, 5, 3, 4), normal(2, 7, 3, 4), normal(2, 7, 3, 4)),
    ),
    "cross_entropy": (
        lambda x: objectives.cross_entropy(x, LABELS),
        lambda x: plain_cross_entropy(x, LABELS),
        (3 * normal(4, 3, 9),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    ours, plain, inputs = CASES[name]
    weight = normal(*jax.eval_shape(plain, *inputs).shape)
    results = [
        jax.jit(jax.value_and_grad(lambda *x, f=f: (f(*x) * weight).sum(), range(len(inputs))))(
            *inputs
        )
        for f in (ours, plain)
    ]
    for ours, plain in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_query_without_keys_is_finite():
    q = normal(1, 2, 3, 4)
    mask = jnp.array([[[True, False], [False, False]]])
    gradients = jax.grad(lambda q: ops.attention(q, q, q, mask).sum())(q)
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("masked", [None, 1, 6])
@pytest.mark.parametrize("weights", [1, 4 * 3 * 35, 2**20], ids=["1 row", "3 rows", "all rows"])
def test_a_cpu_takes_some_rows_at_a_time(monkeypatch, weights, masked):
    """Tests run on a CPU, so the form of other platforms is called by name."""
    monkeypatch.setattr(attention_module, "_CPU_WEIGHTS", weights)
    q, k, v, gradient = (
        normal(6, 5, 4, 3),
        normal(6, 7, 4, 3),
        normal(6, 7, 4, 3),
        normal(6, 5, 4, 3),
    )
    mask = None if masked is None else jnp.asarray(RNG.random((masked, 5, 7)) < 0.6)
    x, kept = attention_module._attend(q, k, v, mask)
    expected = x, *attention_module._differentiate(q, k, v, kept, gradient)
    y, backward = jax.vjp(lambda q, k, v: ops.attention(q, k, v, mask), q, k, v)
    for ours, general in zip((y, *backward(gradient)), expected, strict=True):
        np.testing.assert_allclose(ours, general, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2])
def test_flat_products_are_the_general_ones(axes):
    x, kernel = normal(2, 3, 4, 5), normal(*(4, 5)[2 - axes :], 6, 7)
    gradient = normal(*x.shape[: 4 - axes], 6, 7)
    flat = products._project_gradients_flat(axes, x, kernel, gradient)
    general = products._project_gradients(axes, x, kernel, gradient)
    for ours, theirs in zip(flat, general, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_norm", "quick_gelu", "gelu", "attention"])
def test_bfloat16_gradients_have_the_dtype_of_the_input(name):
    ours, _, inputs = CASES[name]
    x = inputs[0].astype(jnp.bfloat16)
    rest = [y.astype(jnp.bfloat16) if name == "attention" else y for y in inputs[1:]]
    gradient = jax.grad(lambda x: ours(x, *rest).astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16 and ours(x, *rest).dtype == jnp.bfloat16


def test_no_product_of_a_block_mixes_float32_and_bfloat16():
    """A float32 gradient times a bfloat16 operand is slow on a GPU."""
    block = jax.eval_shape(lambda: Block(64, 2, depth=1, activation="gelu", rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 9, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 9, 9), bool)
    step = jax.grad(lambda b, x, mask: b(x, mask).astype(jnp.float32).sum(), (0, 1))
    found = list(equations(jax.make_jaxpr(step)(block, x, mask).jaxpr))
    assert len(found) > 12
    for product in found:
        assert {v.aval.dtype for v in product.invars} == {np.dtype(jnp.bfloat16)}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_hit_is_the_label_of_the_largest_logit(label):
    logits = jnp.array([0.5, 2.0, -1.0])
    loss, hit = objectives.cross_entropy_and_hits(logits, jnp.array(label))
    assert bool(hit) == (label == 1)
    np.testing.assert_allclose(loss, plain_cross_entropy(logits, jnp.array(label)), rtol=1e-6)


def saved_bytes(remat: str, dtype: str = "bfloat16") -> int:
    """Return the bytes that a block of ViT-B/16 keeps for the backward pass of one frame."""
    c = dataclasses.replace(ModelConfig.base(), remat=remat)
    width = c.vision_width
    blocks = jax.eval_shape(
        lambda: stack(1, width, c.vision_heads, activation=c.activation, rngs=nnx.Rngs(0))
    )
    length = c.grid**2 + 1
    x = jax.ShapeDtypeStruct((1, length, width), dtype)

    def backward(blocks, x):
        return jax.vjp(lambda b, x: run_blocks(b, x, scan=False, remat=remat), blocks, x)[1]

    kept = jax.jit(backward).trace(blocks, x).jaxpr.jaxpr.outvars
    # The rest is parameters or copies of them, which do not grow with frames.
    kept = {v for v in kept if length in v.aval.shape}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


@pytest.mark.parametrize(
    ("remat", "most"), [("none", 5.9e6), ("products", 3.1e6), ("full", 0.31e6)]
)
def test_what_a_block_keeps_for_the_backward_pass(remat, most):
    assert saved_bytes(remat) < most


@pytest.mark.parametrize("keep", [slice(0, 1), slice(2, None, 3), np.array([[1, 4], [4, 0]])])
@pytest.mark.parametrize("remat", ["none", "products"])
def test_the_last_block_computes_only_what_is_kept(keep, remat):
    blocks = stack(2, 12, 3, activation="quick_gelu", rngs=nnx.Rngs(0))
    x = normal(2, 5, 12)
    mask = jnp.asarray(RNG.random((2, 5, 5)) < 0.7) | jnp.eye(5, dtype=bool)
    rows = np.arange(5)[keep] if isinstance(keep, slice) else keep

    def whole(blocks, x):
        y = run_blocks(blocks, x, mask)
        return y[:, rows] if rows.ndim == 1 else jnp.take_along_axis(y, rows[..., None], 1)

    def kept(blocks, x):
        return run_blocks(blocks, x, mask, keep=keep, remat=remat)

    weight = normal(*jax.eval_shape(whole, blocks, x).shape)
    results = [
        jax.jit(jax.value_and_grad(lambda b, x, f=f: (f(b, x) * weight).sum(), (0, 1)))(blocks, x)
        for f in (whole, kept)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
