"""Time each part of our step separately, and compare it with the least time it can take."""

import glob
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import setting
from benchmarks.results import Results
from stoa_jax import objectives, ops, optim
from stoa_jax.chips import chip_of
from stoa_jax.cost import Work, jaxpr_work
from stoa_jax.joint_loss import align
from stoa_jax.models.clip import text_ends
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import FusionPass, TextFeatures, VideoFeatures
from stoa_jax.models.parameters import with_parameters
from stoa_jax.models.stoa import embed_text, embed_video


class Peaks(NamedTuple):
    """The peak rates of a device."""

    flops: float  # per second
    bandwidth: float  # bytes per second
    source: str


class Part(NamedTuple):
    """A part of the step: a function of the model, floating-point inputs and other data."""

    prefixes: tuple[str, ...]  # of the parameters that it trains
    run: Callable[[Any, Any, Any], Any]
    inputs: Any  # arrays that receive a gradient
    data: Any  # arrays that do not


def peaks(device: jax.Device, dtype: str) -> Peaks:
    """Return the published peaks of a GPU or TPU, or measured peaks of any other device."""
    chip = chip_of(device.device_kind)
    if chip is not None:
        return Peaks(chip.flops, chip.bandwidth, "published")
    n = 2048
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    flops = 2 * n**3 / seconds_of(jax.jit(lambda x: x @ x), x)
    y = jax.device_put(jnp.ones(2**26, jnp.float32), device)
    bandwidth = 2 * y.nbytes / seconds_of(jax.jit(lambda y: y + 1), y)
    return Peaks(flops, bandwidth, f"measured: a product of {n} × {n}, a copy of 256 MiB")


def seconds_of(f: Callable, *args: Any, budget: float = 1.0) -> float:
    """Return the median seconds of a call, from at least three calls in about `budget` seconds."""
    jax.block_until_ready(f(*args))
    times: list[float] = []
    while sum(times) < budget or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parts_of(c: ModelConfig, model: Any, batch: Mapping[str, Any], config: Any) -> dict[str, Part]:
    """Return the parts of the step, each with random inputs of the shapes it gets in the step."""
    b = len(batch["tokens"])
    settings = config.loss.to_dict()
    objects = tuple(batch[k] for k in ("boxes", "classes", "scores"))
    clip, d, h = jax.random.key(0), c.text_width, c.vision_width

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(clip, shape, jnp.float32).astype(c.dtype)

    patches = random(b, c.frames, c.grid**2, h)
    valid = jnp.asarray(batch["classes"]) >= 0
    n, a, length = c.trajectories, c.action_tokens, c.text_length
    most = max(1, int(0.15 * (length - 2) + 0.5))
    video = VideoFeatures(
        frames=random(b, c.frames, d),
        cls=random(b, d),
        objects=random(b, n, d),
        object_mask=jnp.ones((b, n), bool),
        object_classes=jnp.zeros((b, n), jnp.int32),
        actions=random(b, a, d),
        verbs=random(b, 0, d),
        adjectives=random(b, 0, d),
    )
    start = c.visual_length
    sequence, mask = random(b, start + length, d), jnp.ones((b, *(start + length,) * 2), bool)
    reads = {name: jnp.zeros((b, 2), jnp.int32) for name in ("pair", "video", "text")}
    reads |= {"mlm": jnp.full((b, most), start), "plm": jnp.full((b, length - 1), start)}

    def vision(model, _, pixels):
        seen = model.encode_frames(pixels)
        return seen.frames, seen.taps

    def text(model, _, tokens):
        return model.encode_text(tokens).tokens, model.encode_text(tokens, tokens > 3).tokens

    def regions(model, patches, data):
        boxes, classes, scores = data
        found = model.regions(patches, jnp.where((classes >= 0)[..., None], boxes, 0))
        _, members = jax.vmap(lambda k, s: ops.select_trajectories(k, s, n))(classes, scores)
        return model.trajectory(found, members, (classes >= 0).reshape(b, -1))

    def actions(model, inputs, valid):
        patches, found, frame_cls = inputs
        return model.action(patches, found, valid, frame_cls)

    def fusion(model, x, data):
        mask, reads = data
        return model.fuse_passes({k: FusionPass(x, mask, read) for k, read in reads.items()})

    def heads(model, inputs, data):
        words, pairs = inputs
        found = [
            objectives.cross_entropy_and_hits(model.lm_logits(x), label)
            for x, label in zip(words, data, strict=True)
        ]
        match = objectives.cross_entropy(model.match_logits(pairs), jnp.zeros((3, b), jnp.int32))
        return [loss for loss, _ in found], match

    def losses(model, inputs, batch):
        frames, found, acts, tokens = inputs
        video_now = video._replace(frames=frames, objects=found, actions=acts)
        sep_index, seen = text_ends(batch["tokens"], c.vocab_size)
        text = TextFeatures(tokens, tokens[:, 0], seen, sep_index)
        loss, similarity = objectives.vtc(
            embed_video(video_now), embed_text(text), model.scale(), batch["valid"]
        )
        negatives = objectives.hard_negatives(clip, similarity, batch["tokens"], batch["valid"])
        aligned = align(model, video_now, text, batch, settings, {"ota", "asp"})
        return loss, [x.loss for x in aligned.values()], jax.tree.map(jnp.float32, negatives)

    labels = jnp.zeros((b, most), jnp.int32), jnp.zeros((b, length - 1), jnp.int32)
    words = random(b, most, d), random(b, length - 1, d)
    found = random(b, c.frames, c.objects_per_frame, h)
    pooled = patches, found, random(b, c.frames, h)
    return {
        "ViT": Part(("visual/",), vision, (), batch["pixels"]),
        "text, twice": Part(("text/",), text, (), batch["tokens"]),
        "trajectories": Part(("regions/", "trajectory/"), regions, patches, objects),
        "actions": Part(("action/",), actions, pooled, valid),
        "fusion": Part(
            ("fusion/blocks", "fusion/positions", "fusion/more"), fusion, sequence, (mask, reads)
        ),
        "heads": Part(
            ("fusion/lm", "fusion/match", "text/token_embedding"),
            heads,
            (words, random(3, b, 2, d)),
            labels,
        ),
        "losses": Part(
            ("logit_scale",),
            losses,
            (video.frames, video.objects, video.actions, random(b, length, d)),
            batch,
        ),
    }


def with_gradient(part: Part, model: Any) -> Callable:
    """Return a function that runs a part forward and backward; it returns outputs and gradients."""

    def run(params: dict[str, jax.Array], inputs: Any, data: Any) -> Any:
        chosen = {k: v for k, v in params.items() if k.startswith(part.prefixes)}

        def forward(chosen, inputs):
            return part.run(with_parameters(model, {**params, **chosen}), inputs, data)

        outputs, pull = jax.vjp(forward, chosen, inputs)
        return outputs, pull(outputs)

    return run


def update_of(config: Any, program: Any) -> Callable:
    """Return the optimizer's part of the step: norm, clipping, AdamW."""
    optimizer = optim.make_optimizer(config, program.rates, 1000)

    def run(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run


def report(
    c: ModelConfig,
    config: Any,
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    device: jax.Device,
    results: Results,
    whole: float | None = None,
) -> None:
    """Time every part, forward and backward, and print its floor and its share of the step."""
    program, _ = setting.our_program(c, config, device)
    peak = peaks(device, c.dtype)
    results.add(
        "peaks",
        f"{peak.flops / 1e12:.3g} TFLOP/s, {peak.bandwidth / 1e9:.3g} GB/s ({peak.source})",
        flops=peak.flops,
        bandwidth=peak.bandwidth,
    )
    state = program.start(params)
    on_device = {k: jax.device_put(v, device) for k, v in batch.items()}
    spent, least = 0.0, 0.0

    def add(name: str, seconds: float, work: Work) -> None:
        nonlocal spent, least
        compute, traffic = work.flops / peak.flops, work.bytes / peak.bandwidth
        floor = max(compute, traffic)
        spent, least = spent + seconds, least + floor
        share = f", {seconds / whole:6.1%} of the step" if whole else ""
        results.add(
            f"part {name}",
            f"{seconds * 1e3:9.2f} ms; floor {floor * 1e3:9.2f} ms "
            f"(FLOPs {compute * 1e3:.2f}, bytes {traffic * 1e3:.2f}){share}",
            seconds=seconds,
            floor_flops_s=compute,
            floor_bytes_s=traffic,
            share=seconds / whole if whole else None,
        )

    for name, part in parts_of(c, program.model, on_device, config).items():
        run = jax.jit(with_gradient(part, program.model))
        args = state.params, part.inputs, part.data
        work = jaxpr_work(run.trace(*args).jaxpr.jaxpr)
        add(name, seconds_of(run, *args), work)
    size = sum(v.nbytes for v in state.params.values())
    # Parameters, gradients and two moments are read, and all but the gradients written.
    run = jax.jit(update_of(config, program))
    grads = jax.tree.map(jnp.ones_like, state.params)
    add("optimizer", seconds_of(run, state.params, grads, state.opt_state), Work(0.0, 7.0 * size))
    text = f"{spent * 1e3:.1f} ms one by one, floors {least * 1e3:.1f} ms"
    if whole:
        text += f", the whole step {whole * 1e3:.1f} ms"
    results.add("all parts", text, seconds=spent, floor_s=least, step_s=whole)


def report_kernels(step: Callable[[], Any], results: Results, most: int = 20) -> None:
    """Print the operations that take the most time in three steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                step()
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        spent = kernel_times(jax.profiler.ProfileData.from_file(path))
    total = sum(spent.values()) or 1.0
    for name, nanoseconds in spent.most_common(most):
        results.add(
            "kernel",
            f"{nanoseconds / 3e6:8.3f} ms a step, {nanoseconds / total:5.1%}: {name}",
            name=name,
            ms=nanoseconds / 3e6,
        )


def kernel_times(profile: Any) -> Counter[str]:
    """Return the nanoseconds of each GPU kernel, or of each CPU operation, in a profile."""
    planes = list(profile.planes)
    devices = [p for p in planes if p.name.startswith("/device:GPU")]
    spent: Counter[str] = Counter()
    for plane in devices or [p for p in planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # On a GPU streams hold kernels; on a CPU XLA's threads hold operations.
            if not line.name.startswith("Stream" if devices else "tf_XLA"):
                continue
            for event in line.events:
                # The rest is what XLA's threads do between operations.
                if "::" not in event.name and not event.name.startswith("end: "):
                    spent[event.name] += event.duration_ns
    return spent
