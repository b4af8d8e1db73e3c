"""Configuration of the model: every size, and every field in which the presets differ."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from stoa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one STOA-VLP model. The defaults are the paper's (`base`).

    Letters in brackets are the dimensions in shapes and in the documentation.
    """

    # Video
    image_size: int = 224  # side of a frame in pixels [S]
    patch_size: int = 16  # side of a square patch in pixels
    frames: int = 12  # [T]
    vision_width: int = 768  # [h]
    vision_depth: int = 12  # blocks of the video encoder
    vision_heads: int = 12  # attention heads of the video encoder
    # Text
    vocab_size: int = 49408  # [V]; if smaller, CLIP's BPE cut after its first merges
    text_length: int = 32  # [L]
    text_positions: int = 77  # rows of CLIP's position table
    text_width: int = 512  # [d], also of the shared space and of fusion
    text_depth: int = 12  # blocks of the text encoder
    text_heads: int = 8  # attention heads of the text encoder
    # Objects and actions
    objects: bool = True  # compute trajectories and pass them to fusion
    actions: bool = True  # compute action tokens and pass them to fusion
    objects_per_frame: int = 10  # [K]
    trajectories: int = 20  # [N]
    action_tokens: int = 4  # [A]
    trajectory_depth: int = 2  # blocks of the trajectory encoder
    action_depth: int = 2  # blocks of the action encoder
    object_block: int = 10  # blocks whose patches objects and actions use, counted from 1
    action_block: int = 11  # the block whose patches the action queries read
    roi_size: int = 7  # bins along each side of a region
    # Fusion
    fusion_depth: int = 6
    fusion_heads: int = 8  # attention heads of the fusion encoder
    num_answers: int = 0  # classes of the question-answering head; 0: no head
    # Computation
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # parameters are always float32
    # Execution: parameters and results do not depend on these
    scan_layers: bool | None = None  # a loop over layers; None: a loop, but unrolled on a GPU
    # what the backward pass recomputes: nothing, everything but products (with or without the
    # products of attention), everything
    remat: Literal["none", "dots", "products", "full"] = "none"
    # implementation in the video encoder; auto: cuDNN where it runs, which is on NVIDIA GPUs
    attention: Literal["auto", "xla", "cudnn"] = "auto"

    # Differences between the presets. The defaults are `paper`; `released()` is the authors' code.
    action_patches_stop_gradient: bool = False
    joint_blocks: int = 0  # last video blocks, which attend over all frames of a clip
    # order in an object's features
    region: Literal["pool_then_mlp", "mlp_then_pool"] = "pool_then_mlp"
    trajectory_layers_run: int = 2  # of the trajectory encoder's blocks
    # which classes are trajectories; `tracked`, beyond the paper: tracks of a class, each by itself
    trajectory_choice: Literal["largest", "first_met", "tracked"] = "largest"
    action_cls: Literal["learned", "frame_mean"] = "learned"  # [CLS] of an action's sequence
    fusion_positions: Literal["all", "tokens_only"] = "all"  # tokens_only: none for v_cls, t_sep
    masked_text: Literal["learned", "zero"] = "learned"  # a masked token: a learned vector or id 0
    fusion_position_rows: int = 0  # 0: visual_length + text_positions
    prefix_lm: Literal["causal", "position_query"] = "causal"  # what PLM predicts a token from
    match_head: Literal["linear", "bilinear"] = "linear"  # form of the match classifier
    head_dropout: float = 0.0  # rate on the inputs of the LM and match heads in training
    alignment: Literal["cosine", "dot"] = "cosine"  # similarity of OTA and ASP
    fusion_stop_gradient: bool = False  # True: MLM, PLM and VTM do not train the towers
    # what a question's answer is chosen from
    answer_head: Literal["classifier", "first_piece"] = "classifier"

    # Beyond the paper; the preset `plus` switches it on.
    # what OTA and ASP regress toward: a word's feature in its sentence, or of the word alone
    alignment_target: Literal["sentence", "alone"] = "sentence"
    trajectory_verbs: bool = False  # a second projection of trajectories, which learns verbs
    trajectory_adjectives: bool = False  # a third one, which learns adjectives

    def __post_init__(self) -> None:
        for message in _errors(self):
            raise UserError(f"config.model: {message}")

    # Named variants: literal numbers.
    @classmethod
    def base(cls) -> "ModelConfig":
        """CLIP ViT-B/16, the paper's sizes."""
        return cls()

    @classmethod
    def base32(cls) -> "ModelConfig":
        """CLIP ViT-B/32."""
        return cls(patch_size=32)

    @classmethod
    def large14(cls) -> "ModelConfig":
        """CLIP ViT-L/14."""
        return cls(
            patch_size=14,
            vision_width=1024,
            vision_depth=24,
            vision_heads=16,
            text_width=768,
            text_heads=12,
            fusion_heads=12,
            object_block=22,
            action_block=23,
        )

    @classmethod
    def large14_336(cls) -> "ModelConfig":
        """CLIP ViT-L/14 at 336 pixels."""
        return dataclasses.replace(cls.large14(), image_size=336)

    @classmethod
    def tiny(cls) -> "ModelConfig":
        """Sizes that train on two CPU cores in minutes, for the demo and the tests."""
        return cls(
            image_size=48,
            patch_size=12,
            frames=4,
            vision_width=128,
            vision_depth=3,
            vision_heads=4,
            vocab_size=8192,
            text_length=24,
            text_width=96,
            text_depth=2,
            text_heads=3,
            objects_per_frame=6,
            trajectories=5,
            action_tokens=3,
            object_block=2,
            action_block=2,
            roi_size=3,
            fusion_depth=2,
            fusion_heads=3,
        )

    @classmethod
    def small(cls) -> "ModelConfig":
        """Sizes for eight frames that train on two CPU cores in an hour or two."""
        return dataclasses.replace(
            cls.tiny(),
            frames=8,
            text_width=128,
            text_heads=4,
            fusion_depth=3,
            fusion_heads=4,
            action_tokens=2,
        )

    def plus(self) -> "ModelConfig":
        """Return the same sizes with the extensions beyond the paper."""
        return dataclasses.replace(
            self, alignment_target="alone", trajectory_verbs=True, trajectory_adjectives=True
        )

    def released(self) -> "ModelConfig":
        """Return the same sizes with the options of the authors' public code."""
        return dataclasses.replace(
            self,
            object_block=max(1, self.vision_depth - 1),
            action_block=max(1, self.vision_depth - 2),
            action_patches_stop_gradient=True,
            joint_blocks=2,
            roi_size=14,
            region="mlp_then_pool",
            trajectory_layers_run=1,
            trajectory_choice="first_met",
            action_cls="frame_mean",
            fusion_positions="tokens_only",
            fusion_position_rows=90 + 12 * self.objects_per_frame,
            masked_text="zero",
            prefix_lm="position_query",
            match_head="bilinear",
            head_dropout=0.5,
            alignment="dot",
            fusion_stop_gradient=True,
            answer_head="first_piece",
        )

    @property
    def grid(self) -> int:
        """Number of patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def visual_length(self) -> int:
        """Number of fusion positions before the text: frames, clip, trajectories, actions."""
        objects = self.trajectories if self.objects else 0
        actions = self.action_tokens if self.actions else 0
        return self.frames + 1 + objects + actions


VARIANTS = ("base", "base32", "large14", "large14_336", "tiny", "small")


def _errors(c: ModelConfig) -> Iterator[str]:
    if c.image_size % c.patch_size:
        yield (
            f"image_size {c.image_size} is not a multiple of patch_size {c.patch_size}; "
            f"use {c.image_size // c.patch_size * c.patch_size or c.patch_size}"
        )
    for width, heads in (
        ("vision_width", "vision_heads"),
        ("text_width", "text_heads"),
        ("text_width", "fusion_heads"),
    ):
        if getattr(c, width) % getattr(c, heads):
            yield f"{width} {getattr(c, width)} is not a multiple of {heads} {getattr(c, heads)}"
    least = {"frames": 1, "text_length": 4, "objects_per_frame": 1, "roi_size": 1}
    if c.objects:
        least["trajectories"] = 1
    if c.actions:
        least["action_tokens"] = 1
    for name, low in least.items():
        if getattr(c, name) < low:
            yield f"{name} is {getattr(c, name)}; it must be at least {low}"
    if c.text_length > c.text_positions:
        yield (
            f"text_length {c.text_length} is longer than the position table "
            f"({c.text_positions} rows); raise text_positions"
        )
    if c.vocab_size < 1024 or c.vocab_size > 49408:
        yield f"vocab_size is {c.vocab_size}; it must be between 1024 and 49408 (all of CLIP's)"
    for name in ("object_block", "action_block"):
        if not 1 <= getattr(c, name) <= c.vision_depth:
            yield f"{name} is {getattr(c, name)}; there are video blocks 1 to {c.vision_depth}"
