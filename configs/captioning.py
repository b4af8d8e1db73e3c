"""Fine-tune and evaluate captioning.

    python -m stoa_jax.main --config=configs/captioning.py:msrvtt --workdir=runs/captioning \
        --config.init.path=runs/pretrain

Sets: synthetic, msrvtt (6513/497/2990), msvd (1200/100/670).

synthetic, after `configs/pretrain.py:synthetic`, on two CPU cores (Intel Xeon): CIDEr 1.11 and
BLEU-4 0.242 by greedy decoding of 200 test clips, in 1.8 minutes and 1.8 GiB
(`python -m benchmarks.configs`). msrvtt, msvd: not measured.
"""

from stoa_jax import config
from stoa_jax.data.sources import data_set_for


def get_config(dataset: str = "synthetic"):
    data_set = data_set_for("captioning", dataset)
    if dataset == "synthetic":
        return synthetic(data_set)
    c = config.finetuning("captioning")
    config.set_losses(c, plm=1.0, ota=1.0, asp=1.0)
    c.optim.groups = ((config.NEW, 1e-4), (config.TOWERS, 1e-6), (r"^fusion/", 1e-5), (r".*", 1e-4))
    c.data.sets = ((data_set.name, 1.0),)
    c.data.eval_split = "test"
    return c


def synthetic(data_set):
    c = config.small("captioning")
    config.set_losses(c, plm=1.0, ota=0.1, asp=0.1)
    c.data.sets = ((data_set.name, 1.0),)
    c.train.steps = 150
    return c
