"""RoIAlign as one product with a matrix of interpolation weights.

Shapes: K boxes, H×W grid of C channels, oh×ow bins.
"""

import jax.numpy as jnp
from jax import Array, lax


def roi_align(
    features: Array,
    boxes: Array,
    output_size: tuple[int, int] = (7, 7),
    sampling_ratio: int = 2,
    spatial_scale: float = 1.0,
) -> Array:
    """Average features [H, W, C] in the bins of boxes [K, 4] (x1, y1, x2, y2): [K, oh, ow, C].

    Half-pixel aligned; `spatial_scale` converts box coordinates to cells of the grid. A sample more
    than one cell outside the grid counts as zero, a nearer one is clamped to the edge, and an
    inverted box is read mirrored, as in ONNX Runtime's `RoiAlign` (opset 16, `half_pixel`, `avg`).

    A box with a coordinate that is not finite gives zeros and passes no gradient. Coordinates are
    always float32; the products run in the dtype of `features`.
    """
    if sampling_ratio < 1:
        raise ValueError(
            f"roi_align: sampling_ratio is {sampling_ratio}; it must be 1 or more (adaptive "
            "sampling has no static shape; where boxes are no larger than the output, it is 1)"
        )
    if features.ndim != 3 or boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(
            f"roi_align: features are {features.shape} and boxes {boxes.shape}; they must be "
            "[H, W, C] and [K, 4] (use jax.vmap for a batch)"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        features = jnp.asarray(features, jnp.float32)
    boxes = jnp.asarray(boxes, jnp.float32)
    finite = jnp.isfinite(boxes).all(-1, keepdims=True)
    # Far outside the grid, so that such a box is handled like any other that covers nothing.
    boxes = jnp.where(finite, boxes * spatial_scale - 0.5, -2.0)
    height, width, channels = features.shape
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    rows = _interpolation(y1, y2, height, output_size[0], sampling_ratio)
    columns = _interpolation(x1, x2, width, output_size[1], sampling_ratio)
    # One matrix, although most of it is zero: interpolating one axis after the other has fewer
    # FLOPs and takes longer, because all columns of a row of bins are written and read again.
    weights = jnp.einsum("koh,kpw->kophw", rows, columns).astype(features.dtype)
    weights = weights.reshape(-1, height * width)
    # This is little work compared with a tower, so float32 stays exact on accelerators too.
    bins = jnp.dot(weights, features.reshape(-1, channels), precision=lax.Precision.HIGHEST)
    return bins.reshape(-1, *output_size, channels)


def _interpolation(start: Array, end: Array, size: int, bins: int, samples: int) -> Array:
    """Return the weight of each of `size` cells in each bin between start and end [K].

    The result is [K, bins, size]. A two-dimensional sample is outside if either coordinate is, so
    the product of both axes' weights is the weight of the sample, and the mean over samples also
    separates.
    """
    bin_size = ((end - start) / bins)[:, None, None]
    bin_index = jnp.arange(bins, dtype=jnp.float32)[:, None]
    sample = jnp.arange(samples, dtype=jnp.float32) + 0.5
    at = start[:, None, None] + bin_index * bin_size + sample * bin_size / samples  # [K, bins, S]
    inside = (at >= -1) & (at <= size)
    # A huge box overflows to inf or NaN. Replace it before the arithmetic to keep gradients finite.
    at = jnp.clip(jnp.where(inside, at, 0), 0, size - 1)
    distance = jnp.abs(at[..., None] - jnp.arange(size, dtype=jnp.float32))
    weights = jnp.maximum(1 - distance, 0) * inside[..., None]  # [K, bins, S, size]
    return weights.mean(-2)
