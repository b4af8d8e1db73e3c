"""Published specifications of accelerators."""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published specification of one chip."""

    name: str
    flops: float  # bf16, per second
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    links: float  # all links to other chips, both directions, bytes per second
    per_host: int


# Sources: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; NVIDIA's data sheets (dense, SXM).
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 4),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, 4),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 448e9, 4),
    "a100": Chip("NVIDIA A100 80 GB", 312e12, 80 * GIB, 2039e9, 600e9, 8),
    "h100": Chip("NVIDIA H100", 989e12, 80 * GIB, 3350e9, 900e9, 8),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 900e9, 8),
    "cpu": Chip("virtual CPU device", math.nan, math.nan, math.nan, math.nan, 8),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the specification of a device by JAX's name for it, such as "NVIDIA H100 80GB HBM3".

    None if it is not in the table.
    """
    words = device_kind.lower().replace("tpu v5 lite", "v5e").replace("tpu v6 lite", "v6e")
    return next((CHIPS[kind] for kind in CHIPS if kind in words and kind != "cpu"), None)
