import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from stoa_jax.ops import assign

pytestmark = pytest.mark.timeout(120)
SOLVERS = ("device", "scipy", "auction")
# jit caches by function: one per solver, so that only new shapes compile.
ASSIGN = {s: jax.jit(lambda x, r, c, s=s: assign(x, r, c, solver=s)) for s in SOLVERS}


def _reference(scores, rows, columns):
    """Solve one problem after another by scipy in float64, on the rows and columns of the masks."""
    out = np.full(rows.shape, -1)
    for i in np.ndindex(rows.shape[:-1]):
        r, c = np.flatnonzero(rows[i]), np.flatnonzero(columns[i])
        a, b = linear_sum_assignment(scores[i].astype(np.float64)[np.ix_(r, c)], maximize=True)
        out[i][r[a]] = c[b]
    return out


def _totals(scores, assigned):
    picked = np.take_along_axis(scores.astype(np.float64), np.maximum(assigned, 0)[..., None], -1)
    return np.where(assigned >= 0, picked[..., 0], 0).sum(-1)


def _check_valid(got, rows, columns):
    """Check that pairs respect the masks, use each column once, and are as many as possible."""
    got = np.asarray(got)
    assert got.dtype == np.int32
    for i in np.ndindex(rows.shape[:-1]):
        used = got[i][got[i] >= 0]
        assert (got[i] >= -1).all()
        assert (got[i] < columns.shape[-1]).all()
        assert columns[i][used].all()
        assert len(set(used)) == len(used)
        assert not (got[i] >= 0)[~rows[i]].any()
        assert len(used) == min(rows[i].sum(), columns[i].sum())


def _check(scores, rows, columns, got):
    _check_valid(got, rows, columns)
    want = _totals(scores, _reference(scores, rows, columns))
    scale = np.maximum(np.abs(scores).max((-2, -1)), 1e-30)
    np.testing.assert_allclose(_totals(scores, np.asarray(got)) / scale, want / scale, atol=1e-6)


def _masks(rng, batch, n, m, keep):
    return rng.random((batch, n)) < keep, rng.random((batch, m)) < keep


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("n", "m"), [(20, 16), (4, 8), (5, 5), (1, 6), (6, 1)])
def test_equals_scipy(n, m, solver):
    rng = np.random.default_rng(n * m)
    scores = rng.normal(size=(16, n, m)).astype(np.float32)
    for keep in (1.0, 0.6):
        rows, columns = _masks(rng, 16, n, m, keep)
        got = ASSIGN[solver](scores, rows, columns)
        np.testing.assert_array_equal(got, _reference(scores, rows, columns))
        _check(scores, rows, columns, got)


@pytest.mark.parametrize("kind", ["softmax", "ties", "infinite"])
def test_many_problems_in_parts(kind):
    """More than one part of a CPU, the last filled up; scores where bids must be careful."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(150, 9, 7)).astype(np.float32)
    if kind == "softmax":
        scores = np.asarray(jax.nn.softmax(20 * scores, -1))
    elif kind == "ties":
        scores = rng.integers(0, 3, scores.shape).astype(np.float32)
    rows, columns = _masks(rng, 150, 9, 7, 0.8)
    if kind == "infinite":
        scores[rng.random(scores.shape) < 0.1] = -np.inf
        got = ASSIGN["device"](scores, rows, columns)
        _check_valid(got, rows, columns)
        finite = np.where(np.isinf(scores), -1e3, scores)
        _check(finite, rows, columns, got)
    else:
        _check(scores, rows, columns, ASSIGN["device"](scores, rows, columns))


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_masks_means_that_all_exist(solver):
    rng = np.random.default_rng(0)
    for n, m in ((3, 5), (5, 3)):
        scores = rng.normal(size=(2, 4, n, m)).astype(np.float32)
        ones = np.ones((2, 4, n), bool), np.ones((2, 4, m), bool)
        got = jax.jit(lambda x: assign(x, solver=solver))(scores)
        np.testing.assert_array_equal(got, _reference(scores, *ones))
        np.testing.assert_array_equal(assign(scores[0, 0], solver=solver), got[0, 0])


@pytest.mark.parametrize("solver", ["device", "scipy"])
def test_equals_scipy_where_tiny_scores_decide(solver):
    """A sharp softmax: with float32 prices, a score of 1e-9 would be lost beside 1."""
    rng = np.random.default_rng(1)
    scores = np.array(jax.nn.softmax(jnp.asarray(rng.normal(size=(64, 8, 8)) * 8, "float32"), -1))
    rows, columns = _masks(rng, 64, 8, 8, 0.8)
    got = ASSIGN[solver](scores, rows, columns)
    np.testing.assert_array_equal(got, _reference(scores, rows, columns))


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=40, deadline=None, database=None)
@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 2, 3, 10]), keep=st.floats(0, 1))
def test_ties(solver, seed, levels, keep):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (8, 6, 7)).astype(np.float32) - 1
    rows, columns = _masks(rng, 8, 6, 7, keep)
    _check(scores, rows, columns, ASSIGN[solver](scores, rows, columns))


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty(solver):
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 0, 0)):
        got = assign(jnp.zeros(shape), solver=solver)
        assert got.shape == shape[:-1]
        assert got.dtype == jnp.int32
        assert (np.asarray(got) == -1).all()
    scores = np.ones((2, 6, 7), np.float32)
    rows, columns = np.ones((2, 6), bool), np.ones((2, 7), bool)
    assert (np.asarray(ASSIGN[solver](scores, ~rows, columns)) == -1).all()
    assert (np.asarray(ASSIGN[solver](scores, rows, ~columns)) == -1).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1e30, float(np.finfo(np.float32).max), 1e-30, 1e-38, 3e-45])
def test_huge_and_tiny_scores(size, solver):
    rng = np.random.default_rng(2)
    scores = (rng.uniform(-1, 1, (8, 6, 7)) * size).astype(np.float32)
    rows, columns = _masks(rng, 8, 6, 7, 0.8)
    got = ASSIGN[solver](scores, rows, columns)
    _check_valid(got, rows, columns)
    if size > 1e-38:
        np.testing.assert_array_equal(got, _reference(scores, rows, columns))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", SOLVERS)
def test_huge_beside_ordinary_scores(solver):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(16, 6, 7)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] *= 1e30
    rows, columns = _masks(rng, 16, 6, 7, 0.8)
    _check(scores, rows, columns, ASSIGN[solver](scores, rows, columns))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_with_nan_is_as_if_masked(solver):
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(16, 6, 7)).astype(np.float32)
    rows, columns = _masks(rng, 16, 6, 7, 0.8)
    nan = rng.random(scores.shape) < 0.05
    poisoned = (nan & columns[:, None]).any(-1)
    assert poisoned.any()
    assert (~poisoned).any()
    got = ASSIGN[solver](np.where(nan, np.nan, scores), rows, columns)
    np.testing.assert_array_equal(got, _reference(scores, rows & ~poisoned, columns))
    everywhere = ASSIGN[solver](np.full_like(scores, np.nan), rows, columns)
    assert (np.asarray(everywhere) == -1).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", SOLVERS)
def test_infinities_outweigh_everything_finite(solver):
    rng = np.random.default_rng(5)
    scores = rng.uniform(-1, 1, (32, 6, 7)).astype(np.float32)
    kind = rng.random(scores.shape)
    infinite = np.where(kind < 0.15, np.inf, np.where(kind > 0.85, -np.inf, scores))
    rows, columns = _masks(rng, 32, 6, 7, 0.8)
    got = ASSIGN[solver](infinite.astype(np.float32), rows, columns)
    _check_valid(got, rows, columns)
    large = np.where(np.isinf(infinite), np.sign(infinite) * 1000, scores)
    want = _reference(large, rows, columns)
    np.testing.assert_allclose(_totals(large, np.asarray(got)), _totals(large, want), atol=1e-5)
    for value in (np.inf, -np.inf):
        all_ = ASSIGN[solver](np.full_like(scores, value), rows, columns)
        _check_valid(all_, rows, columns)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_masked_is_not_read(solver):
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(16, 6, 7)).astype(np.float32)
    rows, columns = _masks(rng, 16, 6, 7, 0.6)
    want = ASSIGN[solver](scores, rows, columns)
    exists = rows[:, :, None] & columns[:, None]
    for junk in (np.nan, np.inf, -np.inf, 3e38):
        got = ASSIGN[solver](np.where(exists, scores, np.float32(junk)), rows, columns)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("solver", SOLVERS)
def test_under_vmap(solver):
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(2, 3, 6, 7)).astype(np.float32)
    rows, columns = np.ones((2, 3, 6), bool), rng.random((7,)) < 0.7
    want = assign(scores, rows, columns, solver=solver)
    f = lambda x, r: assign(x, r, columns, solver=solver)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(f)))(scores, rows), want)
    np.testing.assert_array_equal(jax.vmap(f, in_axes=1, out_axes=1)(scores, rows), want)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loss_that_uses_it_can_be_differentiated(solver):
    scores = jnp.asarray(np.random.default_rng(8).normal(size=(3, 6, 7)), "float32")

    def loss(x):
        columns = assign(x, solver=solver)
        return jnp.take_along_axis(x, columns[..., None], -1).sum()

    for gradient in (jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss))):
        want = jax.nn.one_hot(assign(scores, solver=solver), 7)
        np.testing.assert_array_equal(gradient(scores), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_other_dtypes(solver, dtype):
    scores = jnp.asarray(np.random.default_rng(9).permutation(42).reshape(1, 6, 7), dtype)
    rows, columns = np.ones((1, 6), bool), np.ones((1, 7), bool)
    got = ASSIGN[solver](scores, rows, columns)
    _check(np.asarray(scores, np.float32), rows, columns, got)


# A batch that is sharded over devices

COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def _mesh(shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sharded_batch_needs_no_collective(solver, shape):
    rng = np.random.default_rng(10)
    scores = rng.normal(size=(16, 6, 7)).astype(np.float32)
    rows, columns = _masks(rng, 16, 6, 7, 0.8)
    mesh = _mesh(shape)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    args = jax.device_put((scores, rows, columns), sharding)
    with jax.set_mesh(mesh):
        f = jax.jit(lambda *x: assign(*x, solver=solver), in_shardings=sharding)
        compiled = f.lower(*args).compile()
        for _ in range(5):  # a deadlock of the host callback would not occur every time
            got = compiled(*args)
    text = compiled.as_text()
    assert "num_partitions=8" in text
    assert not [c for c in COLLECTIVES if c in text]
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(got, _reference(scores, rows, columns))


def test_the_collectives_are_seen_where_there_are_any():
    """Without the mesh in context XLA gathers, which the test above would detect."""
    mesh = _mesh((8, 1, 1))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    f = jax.jit(lambda x: assign(x), in_shardings=sharding)
    text = f.lower(jax.ShapeDtypeStruct((16, 6, 7), jnp.float32)).compile().as_text()
    assert [c for c in COLLECTIVES if c in text]


@pytest.mark.parametrize("solver", SOLVERS)
def test_inside_shard_map_and_batches_that_do_not_divide(solver):
    rng = np.random.default_rng(11)
    scores = rng.normal(size=(16, 6, 7)).astype(np.float32)
    want = _reference(scores, np.ones((16, 6), bool), np.ones((16, 7), bool))
    spec = PartitionSpec(("data", "fsdp"))

    def f(x):
        return assign(x, solver=solver)

    with jax.set_mesh(_mesh((2, 2, 2))):
        inside = jax.shard_map(f, in_specs=spec, out_specs=spec, check_vma=False)
        np.testing.assert_array_equal(jax.jit(inside)(scores), want)
        np.testing.assert_array_equal(jax.jit(f)(scores[:3]), want[:3])
        np.testing.assert_array_equal(jax.jit(f)(scores[0]), want[0])
        np.testing.assert_array_equal(jax.jit(jax.vmap(f))(scores), want)
        np.testing.assert_array_equal(f(scores), want)
        gradient = jax.jit(jax.grad(lambda x: (x.max(-1) * f(x)).sum()))(scores)
        assert np.isfinite(gradient).all()


def test_a_clear_error():
    with pytest.raises(ValueError, match="'hungarian'; use one of device, scipy, auction"):
        assign(jnp.zeros((2, 3)), solver="hungarian")
    with pytest.raises(ValueError, match=r"row_mask is \(3,\); it must be \(2,\)"):
        assign(jnp.zeros((2, 3)), jnp.ones(3, bool))
    with pytest.raises(ValueError, match="scores are"):
        assign(jnp.zeros(3))
