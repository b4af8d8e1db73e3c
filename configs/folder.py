"""Fine-tune on a folder of your own clips with captions, from any weights.

    python -m stoa_jax.data.build folder --manual-dir=CLIPS --data-dir=data
    python -m stoa_jax.main --config=configs/folder.py:retrieval,from=WEIGHTS --workdir=runs/mine

Tasks: retrieval, captioning, pretrain (all six losses). WEIGHTS: a work directory, a checkpoint, a
CLIP file or directory, or `synthetic`, the checkpoint that ships. The model takes its sizes from
them.

Scores depend on your clips. On two CPU cores, from `synthetic`, 20 steps of 8 clips with their
evaluation take a minute and 1.6 GiB (docs/fine_tune.md; `memory/host` in the run's result.json).
"""

from stoa_jax import config
from stoa_jax.errors import UserError
from stoa_jax.inference.loading import CLIP_KINDS, locate
from stoa_jax.weights import config_of

LOSSES = {
    "retrieval": dict(vtc=1.0, vtm=1.0, ota=1.0, asp=1.0),
    "captioning": dict(plm=1.0, ota=1.0, asp=1.0),
    "pretrain": dict(vtc=1.0, vtm=1.0, mlm=1.0, plm=1.0, ota=1.0, asp=1.0),
}


def get_config(argument: str = "retrieval,from=synthetic"):
    task, _, start = argument.partition(",")
    if task not in LOSSES:
        raise UserError(f"configs/folder.py:{task}: the tasks are {', '.join(LOSSES)}")
    source = start.removeprefix("from=")
    if not source or source == start:
        raise UserError(
            f"configs/folder.py:{argument}: name the weights to start from, for example "
            f"configs/folder.py:{task},from=runs/pretrain"
        )
    weights = locate(source)
    model, kind = config_of(weights)
    c = config.default(task)
    c.init.path = str(weights)
    c.model.update({name: getattr(model, name) for name in c.model})
    if kind in CLIP_KINDS:
        c.model.text_length = min(c.model.text_length, 32)  # CLIP's 77 cost time and help little
    config.set_losses(c, **LOSSES[task])
    towers = 1e-7 if task == "retrieval" else 1e-6  # CLIP was trained for retrieval
    c.optim.groups = (
        (config.NEW, 1e-4),
        (config.TOWERS, towers),
        (r"^fusion/", 1e-5),
        (r".*", 1e-4),
    )
    c.data.sets = (("folder/captions", 1.0),)
    c.train.batch_size = 32  # global, clips
    c.train.epochs = 10.0
    c.checkpoint.every_steps = 200
    return c
