"""Write the golden CLIP in the format of OpenAI's files."""

import io
import pickle
import struct
import zipfile

import numpy as np
from clip_tiny import FOLDER

from stoa_jax import weights
from stoa_jax.weights import clip
from stoa_jax.weights.tables import write_table


def openai_tensors(folder=FOLDER):
    """Return the golden CLIP in OpenAI's names."""
    c, _ = weights.config_of(folder)
    params, _ = weights.initial_parameters(folder, c)
    towers = {n: x for n, x in params.items() if n.startswith(("visual/", "text/", "logit_scale"))}
    return write_table(clip.OPENAI, towers), c


def write_torchscript(path, tensors, *, evil=None, members=()):
    """Write a scripted module of nested attributes, in half precision like OpenAI's."""
    root: dict = {}
    arrays = {}
    for i, (name, x) in enumerate(tensors.items()):
        node = root
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        arrays[str(i)] = np.asarray(x, np.float16)
        node[last] = (str(i), arrays[str(i)])
    out = io.BytesIO()
    out.write(b"\x80\x02")

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def write(node):
        if isinstance(node, dict):
            out.write(b"c__torch__.multimodal\nModule\n)\x81}(")
            for name, value in node.items():
                out.write(text(name))
                write(value)
            out.write(b"ub")
            return
        key, x = node
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text(key) + text("cpu"))
        out.write(number(x.size) + b"tQ" + number(0))
        strides = [s // 2 for s in x.strides]
        out.write(b"(" + b"".join(map(number, x.shape)) + b"t")
        out.write(b"(" + b"".join(map(number, strides)) + b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")

    if evil is not None:
        out.write(evil)
    else:
        write(root)
    out.write(b".")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("clip/data.pkl", out.getvalue())
        archive.writestr("clip/constants.pkl", pickle.dumps(()))
        for key, x in arrays.items():
            archive.writestr(f"clip/data/{key}", x.tobytes())
        for name in members:
            archive.writestr(name, b"")
