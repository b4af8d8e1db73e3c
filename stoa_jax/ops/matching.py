"""Maximum-weight assignment of rows to columns, by one of three solvers.

A softmax gives scores of 1 and of 1e-9 in one problem, and the small ones decide once the large
ones are taken. `device` and `auction` therefore keep prices as pairs of float32 (a value and its
rounding error, about 48 bits) and need no float64.

Shapes: n rows, m columns; s = max(n, m) after padding to a square.
"""

import math
from functools import partial

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec

from stoa_jax.ops import pairs
from stoa_jax.ops.augmenting import augment

SOLVERS = ("device", "scipy", "auction")
_BATCH_AXES = ("data", "fsdp")


def assign(
    scores: Array,
    row_mask: Array | None = None,
    col_mask: Array | None = None,
    solver: str = "device",
) -> Array:
    """Return each row's column [..., n] for the largest sum of scores [..., n, m]; -1 for none.

    Masks [..., n] and [..., m] say which rows and columns exist; min(existing rows, existing
    columns) pairs are made. A row with a NaN in an existing column counts as missing. An infinity
    outweighs all finite scores together. Scores are read as float32; no gradient flows.

    Solvers: `device` (shortest augmenting paths) and `scipy` (on the host) are exact. `auction`
    comes within s·2⁻³⁰ of the best sum, times the largest |score| (see `_auction`).

    Inside jit and `jax.set_mesh(mesh)`, the leading dimension of scores [B, ..., n, m] counts as
    sharded over the mesh axes "data" and "fsdp". If B divides, each device solves its own part
    without a collective. Without a mesh in context, or under an outer vmap, XLA may gather.
    """
    if solver not in SOLVERS:
        raise ValueError(f"assign: solver is {solver!r}; use one of {', '.join(SOLVERS)}")
    if scores.ndim < 2:
        raise ValueError(f"assign: scores are {scores.shape}; they must be [..., n, m]")
    *batch, n, m = scores.shape
    if 0 in scores.shape:
        return jnp.full((*batch, n), -1, jnp.int32)
    # With enough columns and none missing, rows never outnumber columns.
    wide = n <= m and col_mask is None
    args = (
        scores,
        _mask(row_mask, (*batch, n), "row_mask"),
        _mask(col_mask, (*batch, m), "col_mask"),
    )
    args = tuple(lax.stop_gradient(x) for x in args)

    def solve(*args: Array) -> Array:
        return _solve(*args, solver=solver, wide=wide)

    if _in_auto_mesh(args):
        axes = _batch_axes(batch)
        # A callback outside shard_map runs on one device, which jit does not always accept.
        if axes or solver == "scipy":
            spec = PartitionSpec(axes or None)
            solve = jax.shard_map(solve, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return solve(*args)


@partial(jax.jit, static_argnames=("solver", "wide"))
def _solve(scores: Array, rows: Array, columns: Array, *, solver: str, wide: bool) -> Array:
    """Solve on one device, jitted so that calls outside jit compile once."""
    scores, rows = _sanitise(scores, rows, columns)
    if solver == "scipy":
        return _scipy(scores, rows, columns)
    flat = tuple(x.reshape(-1, *x.shape[rows.ndim - 1 :]) for x in (scores, rows, columns))
    out = _as_wide(augment if solver == "device" else jax.vmap(_auction), *flat, wide=wide)
    return out.reshape(rows.shape)


def _mask(mask: Array | None, shape: tuple[int, ...], name: str) -> Array:
    if mask is None:
        return jnp.ones(shape, bool)
    try:
        return jnp.broadcast_to(jnp.asarray(mask, bool), shape)
    except ValueError:
        raise ValueError(f"assign: {name} is {jnp.shape(mask)}; it must be {shape}") from None


def _in_auto_mesh(args: tuple[Array, ...]) -> bool:
    """Return whether XLA, and not the caller, shards the traced arrays over a mesh."""
    types = jax.sharding.get_abstract_mesh().axis_types
    # Outside jit, arrays stay where they are. Inside a shard_map, the work is already local.
    return (
        AxisType.Auto in types
        and AxisType.Manual not in types
        and any(isinstance(x, Tracer) for x in args)
    )


def _batch_axes(batch: list[int]) -> tuple[str, ...]:
    """Return the mesh axes that shard the leading dimension; () for none."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in _BATCH_AXES if types.get(a) == AxisType.Auto)
    divides = batch and axes and batch[0] % math.prod(mesh.shape[a] for a in axes) == 0
    return axes if divides else ()


def _sanitise(scores: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    """Scale scores by a power of two into [-1, 1], replace infinities, and drop rows with NaN."""
    n, m = scores.shape[-2:]
    scores = scores.astype(jnp.float32)
    rows = rows & ~(jnp.isnan(scores) & columns[..., None, :]).any(-1)
    exists = rows[..., :, None] & columns[..., None, :]
    scores = jnp.where(exists, scores, 0)
    finite = jnp.isfinite(scores)
    largest = jnp.where(finite, jnp.abs(scores), 0).max((-2, -1), keepdims=True)
    # In two halves: the whole power may be subnormal, which XLA flushes to zero.
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1], 0)
    half = exponent // 2
    scaled = scores * _power_of_two(-half) * _power_of_two(half - exponent)
    # Sums of two assignments of finite scores differ by at most 2 · min(n, m).
    return jnp.where(finite, scaled, jnp.sign(scores) * 4 * min(n, m)), rows


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def _as_wide(solve, scores: Array, rows: Array, columns: Array, *, wide: bool) -> Array:
    """Run `solve` on problems [B, n, m], those transposed that have more rows than columns."""
    _, n, m = scores.shape
    if wide:
        return jnp.where(rows, solve(scores, rows, columns), -1)
    s = max(n, m)
    scores = jnp.pad(scores, ((0, 0), (0, s - n), (0, s - m)))
    rows = jnp.pad(rows, ((0, 0), (0, s - n)))
    columns = jnp.pad(columns, ((0, 0), (0, s - m)))
    flip = (rows.sum(-1) > columns.sum(-1))[:, None]
    column = solve(
        jnp.where(flip[..., None], scores.swapaxes(1, 2), scores),
        jnp.where(flip, columns, rows),
        jnp.where(flip, rows, columns),
    )
    # In the transposed problem the result gives the row of each column: invert it.
    index = jnp.arange(s, dtype=jnp.int32)
    inverse = jnp.where(column[..., None] == index, index[:, None], -1).max(1)
    return jnp.where(rows, jnp.where(flip, inverse, column), -1)[:, :n]


_FINEST = 2.0**-30  # ε of the auction's last phase, in units of the largest |score|
_COARSER = 8.0  # ratio of ε between one phase and the next


def _auction(scores: Array, rows: Array, columns: Array) -> Array:
    """Solve by Bertsekas's auction with ε-scaling: all rows without a column bid at once.

    The problem is padded to s×s with rows and columns of value zero. Every row ends with a column
    within ε of its best, so the sum is within s·ε of the largest. The last ε is 2⁻³⁰ (the largest
    score is 1; prices stay below 4·s, which pairs resolve to 2⁻⁴⁶·s).
    """
    n, m = scores.shape
    s = max(n, m)
    scores = jnp.pad(scores, ((0, s - n), (0, s - m)))
    rows, columns = jnp.pad(rows, (0, s - n)), jnp.pad(columns, (0, s - m))
    # There are enough columns for the existing rows; the other rows take the rest.
    allowed = columns | ~rows[:, None]
    worth = scores, jnp.zeros_like(scores)
    index = jnp.arange(s, dtype=jnp.int32)
    largest = jnp.abs(scores).max()
    # What a row pays for its only column: more than any other row could.
    only = (-8.0 * s * jnp.maximum(largest, 1), jnp.float32(0))

    def step(state: dict) -> dict:
        bidding = state["column_of"] < 0
        cost = pairs.add(state["price"], pairs.negative(worth))  # [row, column]
        best, choice = pairs.minimum(cost, allowed, 1)
        chosen = choice[:, None] == index
        second, _ = pairs.minimum(cost, allowed & ~chosen, 1)
        second = pairs.where(allowed.sum(1) > 1, second, pairs.add(best, pairs.negative(only)))
        rise = pairs.add(second, pairs.negative(best))
        paid = pairs.add(pairs.at(state["price"], choice), rise)
        bid = pairs.add(paid, (state["step"], jnp.float32(0)))
        offers = chosen & bidding[:, None]
        negative = -bid[0][:, None] + 0 * worth[0], -bid[1][:, None] + 0 * worth[0]
        top, winner = pairs.minimum(negative, offers, 0)
        sold = offers.any(0)
        price = pairs.where(sold, pairs.negative(top), state["price"])
        # A sold column leaves its previous row without one; its new row had none.
        won = sold & (winner == index[:, None])  # [row, column]
        lost = (state["column_of"][:, None] == index) & sold
        column_of = jnp.where(lost.any(1), -1, state["column_of"])
        column_of = jnp.where(won.any(1), choice, column_of)
        # When every row has a column, restart from these prices with a finer ε.
        settled = (column_of >= 0).all()
        finest = state["step"] <= _FINEST
        return {
            "column_of": jnp.where(settled & ~finest, -1, column_of),
            "price": price,
            "step": jnp.where(
                settled, jnp.maximum(state["step"] / _COARSER, _FINEST), state["step"]
            ),
            "settled": settled & finest,
            "rounds": state["rounds"] + 1,
        }

    zeros = jnp.zeros((s,), jnp.float32)
    state = {
        "column_of": jnp.full((s,), -1, jnp.int32),
        "price": (zeros, zeros),
        "step": jnp.maximum(largest / 4, _FINEST),
        "settled": jnp.bool_(False),
        "rounds": jnp.int32(0),
    }
    # Each round raises a price by at least ε, and within a phase no price rises by more than
    # s·(1 + _COARSER)·ε.
    phases = 2 + math.ceil(math.log(4 * s / _FINEST, _COARSER))
    limit = phases * s * s * (2 + int(_COARSER))
    state = lax.while_loop(lambda s: ~s["settled"] & (s["rounds"] < limit), step, state)
    return jnp.where(rows, state["column_of"], -1)[:n]


def _scipy(scores: Array, rows: Array, columns: Array) -> Array:
    """Solve by `scipy.optimize.linear_sum_assignment` on the host, one callback for the batch."""
    out = jax.ShapeDtypeStruct(rows.shape, jnp.int32)
    return jax.pure_callback(_on_host, out, scores, rows, columns, vmap_method="broadcast_all")


def _on_host(scores: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    scores, rows, columns = (np.asarray(x) for x in (scores, rows, columns))
    out = np.full(rows.shape, -1, np.int32)
    for i in np.ndindex(rows.shape[:-1]):
        row, column = np.flatnonzero(rows[i]), np.flatnonzero(columns[i])
        r, c = linear_sum_assignment(scores[i][np.ix_(row, column)], maximize=True)
        out[i][row[r]] = column[c]
    return out
