"""Fine-tune and evaluate text-video retrieval.

    python -m stoa_jax.main --config=configs/retrieval.py:msrvtt --workdir=runs/retrieval \
        --config.init.path=runs/pretrain

Zero-shot, with any weights, also CLIP alone: add --mode=eval and an empty --workdir.
Sets: synthetic, msrvtt (9k list, 1k-A test), msvd, lsmdc, didemo.

synthetic, after `configs/pretrain.py:synthetic`, on two CPU cores (Intel Xeon), 1,000 texts among
200 test clips: text-to-video R@1 44.0 % by the dual encoder and 44.5 % re-ranked, in 1.4 minutes
and 1.8 GiB (`python -m benchmarks.configs`). The other sets: not measured.
"""

from stoa_jax import config
from stoa_jax.data.sources import data_set_for


def get_config(dataset: str = "synthetic"):
    data_set = data_set_for("retrieval", dataset)
    if dataset == "synthetic":
        return synthetic(data_set)
    c = config.finetuning("retrieval")
    config.set_losses(c, vtc=1.0, vtm=1.0, ota=1.0, asp=1.0)
    # The towers have the lowest rate, because CLIP was trained for retrieval.
    c.optim.groups = ((config.NEW, 1e-4), (config.TOWERS, 1e-7), (r"^fusion/", 1e-5), (r".*", 1e-4))
    c.data.sets = ((data_set.name, 1.0),)
    c.data.eval_split = "test"
    if dataset == "didemo":  # a paragraph: all descriptions of a video
        c.model.text_length = 64
    return c


def synthetic(data_set):
    c = config.small("retrieval")
    config.set_losses(c, vtc=1.0, vtm=1.0, ota=0.1, asp=0.1)
    c.data.sets = ((data_set.name, 1.0),)
    c.train.steps = 150
    return c
