"""The experiment's configuration: every key and its default.

Files in `configs/` start from `default()` and override keys; an unknown key raises an error.
"""

import dataclasses
import os

import ml_collections
from ml_collections import ConfigDict

from stoa_jax.errors import UserError
from stoa_jax.models.config import VARIANTS, ModelConfig

TOWERS = r"^(visual|text|logit_scale)"  # the parameters that come from CLIP, by name
# Parameters of CLIP's modules that CLIP does not provide; they learn at the rate of new ones.
NEW = r"^(text/mask_embedding|fusion/(more_positions|lm_proj|lm_bias|match|answer))"


def default(task: str = "pretrain", variant: str = "base") -> ConfigDict:
    """Return all settings of a run; setting an unknown key of the result raises an error."""
    c = ConfigDict()
    c.seed = 0  # of initial parameters, the order of examples, and every random choice
    c.task = task  # pretrain, retrieval, captioning, qa, multiple_choice

    # All fields of ModelConfig, so that a flag can override each.
    c.model = model_section(variant)

    # Initial weights, by the rules of `stoa_jax.load`: a CLIP file or directory, a checkpoint, or
    # a work directory. Empty: random initialisation.
    c.init = ConfigDict()
    c.init.path = ""
    # regex of parameters to initialise, whether `path` has them or not; empty: none
    c.init.reinit = ""

    # Weights of the losses; 0 switches a loss off.
    c.loss = ConfigDict(dict(vtc=1.0, vtm=1.0, mlm=1.0, plm=1.0, ota=1.0, asp=1.0))
    # beyond the paper: trajectories predict the verb and the adjective of their noun
    c.loss.verb = c.loss.adjective = 0.0
    c.loss.answer = c.loss.choice = 1.0  # of the task `joint`
    c.loss.none_weight = 1.0  # weight of pairs with Ø in OTA and ASP
    c.loss.match_names = False  # OTA prefers the noun that is the name of the trajectory's class
    c.loss.seen_words = False  # language models only choose among the words of the training texts
    c.loss.mask_rate = 0.15  # fraction of text tokens that MLM masks
    c.loss.proper_nouns = False  # PROPN counts as a noun in OTA
    c.loss.matching = "device"  # device, scipy, auction

    c.data = ConfigDict()
    c.data.dir = ""  # directory of built data sets; empty: $STOA_DATA or ./data
    # Render the synthetic world into memory at the start, with the model's frames and objects,
    # instead of reading a built set.
    c.data.live = False
    # Directory where rendered clips and what train.keep_vision keeps are written, and read again
    # by later runs; empty: in memory only.
    c.data.live_dir = ""
    # The live world: seed, pixels per side, clips that look alike, most objects per clip, whether
    # each clip has two of one class (twins), and clips per split.
    c.data.world = ConfigDict(dict(seed=0, size=64, siblings=2, max_objects=4, twins=0))
    c.data.world.update(dict(train=3000, validation=200, test=200))
    c.data.sets = (("synthetic/captions", 1.0),)  # (set, weight) of the training mixture
    c.data.train_split = "train"  # split for training
    c.data.eval_split = "validation"  # split for evaluation
    c.data.eval_set = ""  # data set for evaluation; empty: the first of `sets`
    c.data.questions = ""  # task `joint`: sets of questions about the clips of `sets`
    c.data.choices = ""  # task `joint`: set of multiple choices
    c.data.questions_per_clip = 2  # task `joint`: sampled in each step
    c.data.options_per_clip = 2  # task `joint`: of a multiple choice, sampled in each step
    c.data.crop = "random"  # training crop: random, center
    c.data.flip = False  # only if left and right do not matter
    c.data.workers = 0  # reader processes per host; 0 reads in the main process
    c.data.prefetch = 2  # batches prepared in advance
    # Which decoded clips are kept. auto: in memory, if they take less than 512 MB; off; memory;
    # device: on the accelerators, cropped (needs data.crop=center)
    c.data.cache = "auto"

    c.train = ConfigDict()
    c.train.batch_size = 64  # global, clips
    c.train.steps = 1000  # updates of the whole run
    c.train.epochs = 0.0  # if above 0, replaces steps
    c.train.keep_vision = False  # run a frozen vision tower once per clip and keep its outputs
    c.train.accumulate = 1  # micro-batches per step; VTC and VTM then contrast within one

    c.optim = ConfigDict()
    # (regex over parameter names, peak learning rate); the first match wins; 0 freezes.
    c.optim.groups = ((NEW, 1e-4), (TOWERS, 1e-6), (r"^fusion/", 1e-5), (r".*", 1e-4))
    c.optim.weight_decay = 0.2  # AdamW's, decoupled from the gradient
    # regex of parameters without weight decay
    c.optim.no_decay = r"(bias|scale|positions|frame_embedding|slot_embedding)$"
    c.optim.betas = (0.9, 0.98)  # AdamW's decay rates of the two moments
    c.optim.clip_norm = 1.0  # largest global norm of the gradient; 0: no clipping
    c.optim.warmup = 0.1  # fraction of the steps
    c.optim.schedule = "cosine"  # cosine, constant

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: all remaining devices

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 500  # steps between two checkpoints
    c.checkpoint.keep = 2  # number of newest checkpoints to keep
    c.checkpoint.best_metric = ""  # an evaluation key; its best checkpoint is kept too
    c.checkpoint.best_mode = "max"  # max or min: which value of `best_metric` is better

    c.eval = ConfigDict()
    c.eval.every_steps = 0  # 0: only at the end; -1: never during training
    c.eval.batch_size = 64  # global
    c.eval.max_examples = 0  # 0: the whole split; results on a part are marked partial
    c.eval.allow_partial = False  # evaluate even if clips of the published split are missing
    c.eval.variants = ()  # evaluated besides the full input: single_frame, text_only
    c.eval.beam = 5  # captioning; 1 is greedy
    c.eval.max_pieces = 30  # captioning
    c.eval.length_penalty = 0.0  # captioning: scores are divided by length to this power
    c.eval.no_repeat_ngram = 0  # captioning: length of n-grams that may not repeat; 0: no limit
    c.eval.rerank = 32  # retrieval: candidates that the fusion encoder re-ranks; 0: none
    c.eval.mismatches = 4  # calibration: wrong clips per caption
    c.eval.calibration_texts = 2000  # calibration: number of captions; 0: all
    c.eval.calibration_set = ""  # --mode=calibrate: a set of captions; empty: the evaluated set
    c.eval.calibration_split = "validation"  # --mode=calibrate
    c.eval.false_accept_rate = 0.01  # --mode=calibrate: accepted fraction of mismatches
    c.eval.num_answers = 0  # QA: most frequent training answers to keep; 0: the set's default

    # steps between two log lines; TensorBoard files; a progress line in the terminal
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True, progress=True))

    c.faults = ConfigDict()
    c.faults.max_nonfinite = 5  # consecutive steps without an update before a roll-back
    c.faults.max_rollbacks = 3  # roll-backs before the run stops with exit code 1
    c.faults.stall_seconds = 1800.0  # after this time without a step, dump all stacks and stop
    c.faults.grace_seconds = 25.0  # time for saving after SIGTERM
    return c.lock()


def small(task: str) -> ConfigDict:
    """Return what all runs of the small variant on the built synthetic world share."""
    c = default(task, "tiny")
    c.model.scan_layers = False  # two or three layers run faster unrolled
    # The small CLIP saw pictures of the same world: keep its vision tower frozen, which cuts a
    # step's time to a fifth.
    c.optim.groups = ((r"^visual/", 0.0), (NEW, 1e-3), (TOWERS, 3e-4), (r".*", 1e-3))
    c.optim.weight_decay = 0.05
    c.eval.batch_size = 100
    c.checkpoint.every_steps = 100
    c.log.every_steps = 10
    return c


def live(task: str, variant: str = "small") -> ConfigDict:
    """Return what all runs on the live synthetic world share; they need no build."""
    c = small(task)
    c.model.update(model_section(variant))
    c.model.scan_layers = False
    c.data.live = True
    c.data.world.update(dict(size=c.model.image_size, siblings=1, max_objects=3))
    c.data.world.update(dict(train=30000, validation=200, test=500))
    c.data.eval_split = "test"
    c.log.tensorboard = False
    return c


def finetuning(task: str) -> ConfigDict:
    """Return what every fine-tuning of the `base` model shares, by the paper's recipe."""
    c = default(task, "base")
    c.model.dtype = "bfloat16"
    c.data.workers = 8
    c.train.batch_size = 128  # global, clips
    c.train.epochs = 5.0
    return c


def set_losses(c: ConfigDict, **weights: float) -> None:
    """Set the weights of the named losses; switch all others off."""
    from stoa_jax.joint_loss import LOSSES

    for name in weights:
        if name not in LOSSES:
            raise UserError(f"config.loss: no loss {name!r}; there are {', '.join(LOSSES)}")
    c.loss.update({name: weights.get(name, 0.0) for name in LOSSES})


def data_folder(c: ConfigDict) -> str:
    """Return the directory of the built data sets: `data.dir`, else $STOA_DATA, else `data`."""
    return c.data.dir or os.environ.get("STOA_DATA") or "data"


def model_section(variant: str) -> ConfigDict:
    """Return the model's fields with the values of a named variant."""
    if variant not in VARIANTS:
        raise UserError(f"config.model: no variant {variant!r}; there are {', '.join(VARIANTS)}")
    return ConfigDict(dataclasses.asdict(getattr(ModelConfig, variant)()))


def model_config(c: ConfigDict) -> ModelConfig:
    """Return the frozen model configuration of the section `model`."""
    return ModelConfig(**c.model.to_dict())


def frozen(c: ConfigDict) -> ml_collections.FrozenConfigDict:
    """Return a hashable copy."""
    return ml_collections.FrozenConfigDict(c)
