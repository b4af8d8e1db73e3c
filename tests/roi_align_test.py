import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from stoa_jax.ops import roi_align

H, W, C = 9, 13, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(H, W, C)).astype(np.float32)


def _random_boxes(low, high, n=40):
    a, b = RNG.uniform(low, high, (2, n, 2))
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], 1).astype(np.float32)


BOXES = {
    "inside": _random_boxes(0, H),
    "partly outside": _random_boxes(-8, 22),
    "wholly outside": np.float32([[-9, -9, -3, -3], [20, 2, 30, 5], [2, 30, 4, 40]]),
    "tiny": np.float32([[3.3, 4.4, 3.3001, 4.4001], [0, 0, 1e-6, 1e-6], [12.9, 8.9, 13, 9]]),
    "empty": np.float32([[3, 4, 3, 4], [2, 1, 5, 1], [0, 0, 0, 0], [-1, -1, -1, -1]]),
    "inverted": _random_boxes(-3, 15)[:, [2, 3, 0, 1]],
    "half inverted": _random_boxes(-3, 15)[:, [2, 1, 0, 3]],
    "at the borders": np.float32([[0, 0, W, H], [-1, -1, W + 1, H + 1], [-0.5, -0.5, 0.5, 0.5]]),
    "huge": np.float32([[-1e4, -1e4, 1e4, 1e4]]),
}


def _onnx(features, boxes, output_size, sampling_ratio, spatial_scale):
    node = onnx.helper.make_node(
        "RoiAlign",
        ["x", "rois", "batch"],
        ["y"],
        mode="avg",
        coordinate_transformation_mode="half_pixel",
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )
    info, f32, i64 = onnx.helper.make_tensor_value_info, 1, 7
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [info("x", f32, None), info("rois", f32, None), info("batch", i64, None)],
        [info("y", f32, None)],
    )
    opset = [onnx.helper.make_opsetid("", 16)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = features.transpose(2, 0, 1)[None]
    feeds = {"x": x, "rois": boxes, "batch": np.zeros(len(boxes), np.int64)}
    return session.run(None, feeds)[0].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3, 4])
def test_equals_onnx_runtime(sampling_ratio):
    boxes = np.concatenate(list(BOXES.values()))
    kinds = np.repeat(list(BOXES), [len(b) for b in BOXES.values()])
    for size, scale in (((7, 7), 1.0), ((2, 5), 0.5)):
        got = jax.jit(roi_align, static_argnums=(2, 3, 4))(
            FEATURES, boxes, size, sampling_ratio, scale
        )
        want = _onnx(FEATURES, boxes, size, sampling_ratio, scale)
        assert got.shape == (len(boxes), *size, C)
        for kind in BOXES:
            here = kinds == kind
            np.testing.assert_allclose(got[here], want[here], atol=1e-5, rtol=0, err_msg=kind)


def test_a_linear_ramp_is_read_exactly():
    y, x = np.mgrid[:H, :W].astype(np.float32)
    ramp = np.stack([x, y, 2 * x - 3 * y + 1], -1)
    boxes = np.float32([[1, 1, 12, 8], [2.3, 3.1, 9.7, 6.2], [4, 5, 4.5, 5.5], [9, 6, 3, 2]])
    out = np.asarray(jax.jit(roi_align, static_argnums=2)(ramp, boxes, (3, 4)))
    x1, y1, x2, y2 = boxes.T
    center_x = x1[:, None] + (x2 - x1)[:, None] * (np.arange(4) + 0.5) / 4 - 0.5
    center_y = y1[:, None] + (y2 - y1)[:, None] * (np.arange(3) + 0.5) / 3 - 0.5
    center_x, center_y = np.broadcast_arrays(center_x[:, None], center_y[:, :, None])
    want = np.stack([center_x, center_y, 2 * center_x - 3 * center_y + 1], -1)
    np.testing.assert_allclose(out, want, atol=1e-5)


BAD = np.float32(
    [
        [np.nan, 0, 1, 1],
        [np.inf, np.inf, np.inf, np.inf],
        [-np.inf, 0, np.inf, 5],
        [-1, -1, -1, -1],
        [-3e38, -3e38, 3e38, 3e38],
        [1e38, 1e38, -1e38, -1e38],
    ]
)


@pytest.mark.parametrize("scale", [1.0, 14.0, 1 / 16])
def test_bad_boxes_give_no_nan_and_change_no_other_box(scale):
    good = np.float32([[1, 1, 5, 5]])

    @jax.jit
    def f(features, boxes):
        return roi_align(features, boxes, (4, 4), spatial_scale=scale)

    both = np.concatenate([BAD, good])
    out = f(FEATURES, both)
    assert np.isfinite(out).all()
    assert not np.asarray(out[:3]).any()
    np.testing.assert_allclose(out[-1:], f(FEATURES, good), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1)))
    gradients = gradient(jnp.asarray(FEATURES), jnp.asarray(both))
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[1][:3]).any()
    # The -1 box touches the border at scale 1/16, so only non-finite boxes are left out.
    finite = np.concatenate([BAD[3:], good])
    alone, _ = gradient(jnp.asarray(FEATURES), jnp.asarray(finite))
    np.testing.assert_allclose(gradients[0], alone, rtol=1e-5, atol=1e-6)


def test_gradients_equal_finite_differences():
    # Samples half a cell or a cell apart, all away from the kinks at the middle of each cell.
    boxes = jnp.float32([[1.13, 1.21, 4.13, 4.21], [2.71, 1.33, 8.71, 7.33]])
    weights = RNG.normal(size=(2, 3, 3, C)).astype(np.float32)

    @jax.jit
    def loss(features, boxes):
        return (roi_align(features, boxes, (3, 3)) * weights).sum()

    by_features, by_boxes = jax.grad(loss, (0, 1))(jnp.asarray(FEATURES), boxes)
    change = RNG.normal(size=FEATURES.shape).astype(np.float32)
    want = loss(FEATURES + change, boxes) - loss(FEATURES, boxes)  # linear in the features
    np.testing.assert_allclose((by_features * change).sum(), want, rtol=1e-4)
    step = 1e-2
    for k in range(2):
        for i in range(4):
            plus, minus = (loss(FEATURES, boxes.at[k, i].add(s)) for s in (step, -step))
            np.testing.assert_allclose(by_boxes[k, i], (plus - minus) / (2 * step), atol=2e-3)


def test_vmap_equals_a_loop():
    features = RNG.normal(size=(2, H, W, C)).astype(np.float32)
    boxes = np.stack([BOXES["inside"], BOXES["partly outside"]])
    got = jax.jit(jax.vmap(roi_align))(features, boxes)
    for i in range(2):
        np.testing.assert_allclose(got[i], jax.jit(roi_align)(features[i], boxes[i]), atol=1e-5)


def test_there_is_no_gather_and_the_dtype_of_the_features_stays():
    text = jax.jit(roi_align).lower(FEATURES, BOXES["inside"]).as_text()
    assert "gather" not in text
    assert "dot_general" in text
    out = roi_align(jnp.asarray(FEATURES, jnp.bfloat16), BOXES["inside"])
    assert out.dtype == jnp.bfloat16
    want = roi_align(FEATURES, BOXES["inside"])
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.05)


def test_a_clear_error():
    with pytest.raises(ValueError, match="sampling_ratio is 0"):
        roi_align(FEATURES, BOXES["inside"], sampling_ratio=0)
    with pytest.raises(ValueError, match=r"\[H, W, C\]"):
        roi_align(FEATURES[None], BOXES["inside"])
