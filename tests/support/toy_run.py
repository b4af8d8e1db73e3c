"""A run small enough to be started, killed and compared dozens of times.

The real loop, checkpoints and optimizer around a model of two layers. As a script, it is one
process of a run: `python tests/support/toy_run.py WORKDIR [--set key=value …] [--fault …]`.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import threading
import time

import numpy as np


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Sizes of the toy model."""

    inputs: int = 8
    width: int = 16


def build_model(config: ToyConfig, *, rngs):
    """Build two layers, named like the real model's."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, n, m):
            self.kernel = nnx.Param(jax.random.normal(rngs.params(), (n, m)) / n**0.5)
            self.bias = nnx.Param(jnp.zeros(m))

    class Toy(nnx.Module):
        def __init__(self):
            self.visual = Layer(config.inputs, config.width)
            self.fusion = Layer(config.width, config.inputs)

        def __call__(self, x):
            x = jnp.tanh(x @ self.visual.kernel[...] + self.visual.bias[...])
            return x @ self.fusion.kernel[...] + self.fusion.bias[...]

    return Toy()


class ToyTask:
    """Contrast every row with every other of the global batch, with a little noise from the key."""

    name = "toy"

    def __init__(self, slow_evaluation: float = 0.0):
        self.slow_evaluation = slow_evaluation

    def model_config(self):
        """Return the toy's configuration."""
        return ToyConfig()

    def loss(self, model, batch, key):
        """Compute InfoNCE between the model's output and its input."""
        import jax
        import jax.numpy as jnp

        x = batch["x"]
        y = model(x + 0.01 * jax.random.normal(key, x.shape))
        logits = y @ x.T
        loss = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))
        hits = jnp.mean(jnp.argmax(logits, -1) == jnp.arange(len(x)))
        return loss, {"loss_vtc": loss, "batch_r1": hits}

    def extras(self):
        """Record nothing."""
        return {}

    def evaluators(self):
        """Return the exact sum of the parameters, to compare two runs."""

        def evaluate(model, mesh):
            import jax

            time.sleep(self.slow_evaluation)
            yield "sum", float(sum(np.asarray(x).sum() for x in jax.tree.leaves(model)))

        return {"sum": evaluate}


class ToyLoader:
    """Loader whose row i is a function of the seed and i."""

    steps_per_epoch = 50

    def __init__(self, c, start_step, poison=(), stall_at=None, wait=0.0):
        import jax

        self.c, self.step = c, start_step
        self.poison, self.stall_at, self.wait = poison, stall_at, wait
        size = c.train.batch_size // jax.process_count()
        self.rows = slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def __iter__(self):
        return self

    def __next__(self):
        position, self.step = self.step, self.step + 1
        if position == self.stall_at:
            time.sleep(1000)
        time.sleep(self.wait)
        rng = np.random.default_rng((self.c.seed, position))
        x = rng.normal(size=(self.c.train.batch_size, 8)).astype(np.float32)
        if position in self.poison:
            x[0, 0] = np.nan
        return {"x": x[self.rows], "index": np.arange(len(x), dtype=np.int32)[self.rows]}


class RealTask:
    """The real model and all six losses, in sizes that compile in seconds."""

    name = "pretrain"

    def __init__(self, c):
        self.c = c

    def model_config(self):
        """Return a small configuration."""
        from stoa_jax.models.config import ModelConfig

        return ModelConfig(
            **dict(image_size=16, patch_size=8, frames=2, vocab_size=1024, text_length=8),
            **dict(vision_width=32, vision_depth=2, vision_heads=2, text_positions=8),
            **dict(text_width=32, text_depth=1, text_heads=2, fusion_depth=1, fusion_heads=2),
            **dict(objects_per_frame=3, trajectories=3, action_tokens=2, roi_size=2),
            **dict(object_block=2, action_block=2, trajectory_depth=1, action_depth=1),
            **dict(trajectory_layers_run=1, scan_layers=False),
        )

    def loss(self, model, batch, key):
        """Compute the shipped loss."""
        from stoa_jax.joint_loss import joint_loss

        return joint_loss(model, batch, key, self.c.loss.to_dict())

    def extras(self):
        """Record nothing."""
        return {}

    def evaluators(self):
        """Evaluate nothing."""
        return {}


class RealLoader(ToyLoader):
    """Batches of noise in the pipeline's form."""

    def __next__(self):
        m = RealTask(self.c).model_config()
        b, t, k = self.c.train.batch_size, m.frames, m.objects_per_frame
        rng = np.random.default_rng((self.c.seed, self.step))
        self.step += 1
        length = rng.integers(3, m.text_length - 1, (b, 1))
        place = np.arange(m.text_length)[None]
        words = rng.integers(1, m.vocab_size - 2, (b, m.text_length))
        tokens = np.where(place < length, words, np.where(place == length, m.vocab_size - 1, 0))
        tokens[:, 0] = m.vocab_size - 2
        inside = (place > 0) & (place < length)
        low, size = rng.uniform(0, 0.5, (b, t, k, 2)), rng.uniform(0.2, 0.5, (b, t, k, 2))
        batch = {
            "pixels": rng.integers(0, 256, (b, t, m.image_size, m.image_size, 3), np.uint8),
            "boxes": np.concatenate([low, low + size], -1).astype(np.float32),
            "classes": rng.integers(-1, 6, (b, t, k)).astype(np.int32),
            "scores": rng.uniform(size=(b, t, k)).astype(np.float32),
            "tokens": tokens.astype(np.int32),
            "tags": np.where(inside, rng.integers(0, 4, tokens.shape), 0).astype(np.int8),
            "valid": np.ones(b, bool),
            "index": np.arange(b, dtype=np.int32),
        }
        return {name: value[self.rows] for name, value in batch.items()}


def toy_config(**settings):
    """Return the default configuration, small; `train__steps=7` sets train.steps."""
    from stoa_jax import config

    c = config.default(variant="tiny")
    c.optim.groups = ((r"^visual", 1e-2), (r".*", 3e-2))
    c.train.batch_size, c.eval.batch_size, c.train.steps = 16, 16, 20
    c.checkpoint.every_steps, c.log.every_steps = 5, 1
    c.log.tensorboard, c.log.progress = False, False
    for key, value in settings.items():
        section, _, name = key.partition("__")
        if name:
            c[section][name] = value
        else:
            c[section] = value
    return c


@contextlib.contextmanager
def compiled_once(folder):
    """Compile programs once, and read them from `folder` afterwards."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(workdir, c=None, **faults):
    """Run the loop on the toy, in this process."""
    from stoa_jax import train

    c = c or toy_config()
    slow = faults.pop("slow_evaluation", 0.0)
    return train.train(
        c,
        workdir,
        task=ToyTask(slow),
        build_model=build_model,
        open_loader=lambda start: ToyLoader(c, start, **faults),
    )


def main():
    """Run one process of a run, with a fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--process", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--loader", default="{}", help="JSON: what the loader does wrong")
    parser.add_argument("--signal", help="NAME:SECONDS or NAME:save, to this process")
    parser.add_argument("--real", action="store_true", help="the real model and losses")
    parser.add_argument("--largest-file", type=int, help="bytes; as on a full disk")
    parser.add_argument("--slow-evaluation", type=float, default=0.0)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The test's flags but for the number of devices: other flags could change the bits.
    devices = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{devices}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} {devices}={args.devices}"
    if args.processes > 1:
        os.environ["JAX_COORDINATOR_ADDRESS"] = f"localhost:{args.port}"
        os.environ["JAX_NUM_PROCESSES"] = str(args.processes)
        os.environ["JAX_PROCESS_ID"] = str(args.process)
    from stoa_jax import main as entry
    from stoa_jax import sharding

    sharding.FSDP_MIN_SIZE = 1  # otherwise nothing in the toy is large enough to be sharded
    settings = {}
    for pair in args.set:
        key, _, value = pair.partition("=")
        settings[key.replace(".", "__")] = json.loads(value)
    c = toy_config(**settings)
    if args.largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.largest_file,) * 2)
    if args.signal:
        name, _, when = args.signal.partition(":")
        threading.Thread(
            target=send, args=(getattr(signal, name), when, args.workdir), daemon=True
        ).start()
    loader = json.loads(args.loader)

    def work():
        if args.real:
            from stoa_jax import train

            # The shipped rate of the small variant. The toy's rate is thirty times as high: in ten
            # steps it would amplify rounding errors more than the model itself does.
            c.optim.groups = ((r".*", 1e-3),)
            train.train(c, args.workdir, task=RealTask(c), open_loader=lambda s: RealLoader(c, s))
            return
        run(args.workdir, c, slow_evaluation=args.slow_evaluation, **loader)

    entry.guarded(work)


def send(kind, when, workdir):
    """Send a signal to this process after some seconds, at a step (`step:7`), or during a save."""
    folder = os.path.join(workdir, "checkpoints")
    if when == "save":
        while not any(
            "tmp" in name for name in (os.path.exists(folder) and os.listdir(folder)) or ()
        ):
            time.sleep(0.0005)
    elif when.startswith("step"):
        path = os.path.join(workdir, "metrics.jsonl")
        while not (os.path.exists(path) and open(path).read().count("\n") >= int(when[4:])):
            time.sleep(0.005)
    else:
        time.sleep(float(when))
    os.kill(os.getpid(), kind)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
