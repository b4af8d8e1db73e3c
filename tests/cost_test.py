"""Work and collectives, against independent counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from stoa_jax import cost


def work(function, *arguments):
    return cost.jaxpr_work(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_work_counts_every_turn_of_a_loop_as_the_unrolled_program_does():
    w = jnp.ones((5, 64, 64))
    x = jnp.ones((32, 64))

    def scanned(w, x):
        body = jax.checkpoint(lambda x, w: (jnp.maximum(x @ w, 0), None))
        return jax.lax.scan(body, x, w)[0].sum()

    def unrolled(w, x):
        for one in w:
            x = jax.checkpoint(lambda x, w: jnp.maximum(x @ w, 0))(x, one)
        return x.sum()

    counted = jax.jit(jax.grad(unrolled, (0, 1))).lower(w, x).cost_analysis()["flops"]
    ours = work(jax.grad(scanned, (0, 1)), w, x)
    # The compiler counts the maxima and sums too.
    assert ours.flops == work(jax.grad(unrolled, (0, 1)), w, x).flops
    assert ours.flops == pytest.approx(counted, rel=0.02)


def test_work_of_a_convolution_and_of_a_batched_product():
    image, kernel = jnp.ones((2, 16, 16, 3)), jnp.ones((4, 4, 3, 8))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    counted = jax.jit(convolve).lower(image, kernel).cost_analysis()["flops"]
    assert work(convolve, image, kernel).flops == pytest.approx(counted, rel=0.02)
    a, b = jnp.ones((6, 8, 32)), jnp.ones((6, 32, 16))
    assert work(lambda a, b: a @ b, a, b).flops == 2 * 6 * 8 * 32 * 16


def test_work_inside_shard_map_is_of_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = jnp.ones((16, 32)), jnp.ones((32, 32))
    mapped = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert work(mapped, x, w).flops == 2 * 16 * 32 * 32


HLO = """
HloModule jit_step

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=3, to_apply=%add
}

%condition.1 (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body.2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%t), condition=%condition.1, body=%body.1
}

%never (p: f32[4]) -> f32[4] {
  %all-reduce.9 = f32[4]{0} all-reduce(%x), channel_id=99, to_apply=%add
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w2 = (s32[], f32[4]) while(%t), condition=%c, body=%body.2, backend_config={"known_trip_count":{"n":"2"}}
  %s = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), channel_id=5, metadata={op_name="jit(step)/gather"}
  %d = bf16[16,8]{1,0} all-gather-done(%s), channel_id=5
  %r = (f32[3]{0}, f32[]) all-reduce(%b, %c), channel_id=6, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_once_and_as_often_as_their_loop_runs():
    found = {c.kind + str(len(c.shapes)): c for c in cost.collectives(HLO)}
    assert set(found) == {"all-reduce1", "all-gather1", "all-reduce2"}
    assert found["all-reduce1"].times == 24 and found["all-reduce1"].bytes == 24 * 16
    assert found["all-gather1"].shapes == (("bf16", (16, 8)),)
    assert found["all-gather1"].bytes == 256 and found["all-gather1"].source == "jit(step)/gather"
    assert found["all-reduce2"].bytes == 16


def test_collectives_of_a_shard_map_count_although_they_share_a_channel():
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=auto, devices=jax.devices()[:4])
    split, copied = P("data"), P()

    def local(x, y):
        rows = jax.lax.all_gather(x, "data", tiled=True)
        return jax.lax.psum(rows.sum() + y, "data")

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, copied), out_specs=copied))
    x, y = jnp.zeros((8, 4), jnp.float32), jnp.zeros((16,), jnp.float32)
    found = {c.kind: c.bytes for c in cost.collectives(run.lower(x, y).compile().as_text())}
    assert found == {"all-gather": 8 * 4 * 4, "all-reduce": 16 * 4}
