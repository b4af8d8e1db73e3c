"""The network in PyTorch.

Shapes: B clips, T frames, K objects per frame, N trajectories, A actions, P patches, L text
positions, S positions of a sequence, Q positions that are read, h vision width, d shared width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoa_jax.models.clip import MEAN, STD
from stoa_jax.models.config import ModelConfig

PAPER = ModelConfig()


class LayerNorm(nn.LayerNorm):
    """Layer norm whose result keeps the dtype of its input, which autocast would widen."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in float32."""
        return super().forward(x).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Apply the block to [B, S, h]; with positions `keep` [B, Q], return only these."""
        y = self.ln_1(x)
        if keep is None:
            q, k, v = self.qkv(y).chunk(3, -1)
        else:
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(positions(y, keep), weight[:width], bias[:width])
            k, v = F.linear(y, weight[width:], bias[width:]).chunk(2, -1)
            x = positions(x, keep)
            if mask is not None and mask.shape[1] > 1:
                mask = positions(mask.expand(x.shape[0], -1, -1), keep)
        split = [z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v)]
        mask = None if mask is None else mask[:, None]
        y = F.scaled_dot_product_attention(*split, attn_mask=mask, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.up(self.ln_2(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


def positions(x: Tensor, keep: Tensor) -> Tensor:
    """Return the positions `keep` [B, Q] of `x` [B, S, ...]."""
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def blocks(depth: int, width: int, heads: int) -> nn.ModuleList:
    """Return a stack of blocks."""
    return nn.ModuleList(Block(width, heads) for _ in range(depth))


def first(x: Tensor, count: int = 1) -> Tensor:
    """Return the indices [B, count] of the first positions of every row."""
    return torch.arange(count, device=x.device).expand(x.shape[0], count)


class VisionTower(nn.Module):
    """The vision transformer."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        h = c.vision_width
        self.config = c
        self.patch = nn.Linear(3 * c.patch_size**2, h, bias=False)
        self.cls = nn.Parameter(torch.zeros(h))
        self.positions = nn.Parameter(torch.zeros(c.grid**2 + 1, h))
        self.ln_pre, self.ln_post = LayerNorm(h), LayerNorm(h)
        self.blocks = blocks(c.vision_depth, h, c.vision_heads)
        self.proj = nn.Parameter(torch.zeros(h, c.text_width))
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def forward(self, pixels: Tensor, dtype: torch.dtype, skip: bool) -> tuple[Tensor, dict]:
        """Return frame tokens [N, d] of pixels [N, side, side, 3], and the tapped outputs."""
        c = self.config
        g, p = c.grid, c.patch_size
        x = (pixels.float() / 255 - self.mean) / self.std
        x = x.reshape(-1, g, p, g, p, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, g * g, 3 * p * p)
        x = self.patch(x.to(dtype))
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        x = self.ln_pre((x + self.positions).to(dtype))
        taps = {}
        for i, block in enumerate(self.blocks, 1):
            # Only [CLS] of the last block is read.
            last = skip and i == len(self.blocks) and i not in (c.object_block, c.action_block)
            x = block(x, keep=first(x) if last else None)
            if i in (c.object_block, c.action_block):
                taps[i] = x
        return self.ln_post(x[:, 0]) @ self.proj.to(dtype), taps


class TextTower(nn.Module):
    """The causal text transformer."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        d = c.text_width
        self.token_embedding = nn.Parameter(torch.zeros(c.vocab_size, d))
        self.mask_embedding = nn.Parameter(torch.zeros(d))
        self.positions = nn.Parameter(torch.zeros(c.text_positions, d))
        self.blocks = blocks(c.text_depth, d, c.text_heads)
        self.ln_final = LayerNorm(d)
        self.proj = nn.Parameter(torch.zeros(d, d))

    def forward(self, tokens: Tensor, masked: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode ids [B, L] to [B, L, d]; `masked` positions read [MASK]."""
        x = F.embedding(tokens, self.token_embedding)
        x = torch.where(masked[..., None], self.mask_embedding, x)
        x = (x + self.positions[: tokens.shape[1]]).to(dtype)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.ln_final(x) @ self.proj.to(dtype)


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.up, self.down = nn.Linear(d_in, d_out), nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_in] to [..., d_out]."""
        return self.down(F.gelu(self.up(x)))


class Regions(nn.Module):
    """Object tokens from patches and boxes."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        h = c.vision_width
        self.config = c
        self.mlp, self.box_mlp = Mlp(h, h), Mlp(4, h)
        self.frame_embedding = nn.Parameter(torch.zeros(c.frames, h))

    def forward(self, patches: Tensor, boxes: Tensor) -> Tensor:
        """Return [B, T, K, h] from patches [B, T, P, h] and boxes [B, T, K, 4]."""
        c = self.config
        rows, columns = (
            interpolation(boxes[..., i], boxes[..., i + 2], c.grid, c.roi_size) for i in (1, 0)
        )  # [B, T, K, R, grid]
        grid = patches.unflatten(2, (c.grid, c.grid))
        # Both axes at once, as one weight for each patch, so that one product does it all.
        weights = torch.einsum("btkoh,btkpw->btkophw", rows, columns).flatten(2, 4).flatten(3)
        bins = weights.to(grid.dtype) @ grid.flatten(2, 3)  # [B, T, K·R·R, h]
        pooled = bins.unflatten(2, (c.objects_per_frame, c.roi_size**2)).amax(3)
        x = self.mlp(pooled) + self.box_mlp(boxes.to(patches.dtype))
        return (x + self.frame_embedding[:, None]).to(patches.dtype)


def interpolation(start: Tensor, end: Tensor, size: int, bins: int, samples: int = 2) -> Tensor:
    """Return RoIAlign's weight of each of `size` cells in each bin of [...]: [..., bins, size]."""
    start, end = start * size - 0.5, end * size - 0.5
    width = ((end - start) / bins)[..., None, None]
    device = start.device
    offset = (torch.arange(samples, device=device) + 0.5) / samples
    at = start[..., None, None] + width * (torch.arange(bins, device=device)[:, None] + offset)
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    distance = (at[..., None] - torch.arange(size, device=device)).abs()
    return ((1 - distance).clamp(min=0) * inside[..., None]).mean(-2)


class Trajectories(nn.Module):
    """Trajectory tokens, packed into one sequence per clip or each in its own sequence."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        h = c.vision_width
        self.cls = nn.Parameter(torch.zeros(h))
        self.blocks = blocks(c.trajectory_depth, h, c.vision_heads)
        self.ln_post = LayerNorm(h)
        self.proj = nn.Parameter(torch.zeros(h, c.text_width))

    def forward(self, objects: Tensor, members: Tensor, separate: bool, skip: bool) -> Tensor:
        """Return [B, N, d] from objects [B, T·K, h] and their membership [B, N, T·K]."""
        b, n, count = members.shape
        h, dtype = objects.shape[-1], objects.dtype
        if separate:
            x = objects[:, None].expand(-1, n, -1, -1).reshape(b * n, count, h)
            x = torch.cat([self.cls.to(dtype).expand(b * n, 1, -1), x], 1)
            mask = F.pad(members.reshape(b * n, 1, count), (1, 0), value=True)
            read = first(x)
        else:
            x = torch.cat([self.cls.to(dtype).expand(b, n, -1), objects], 1)
            own = torch.eye(n, dtype=torch.bool, device=x.device).expand(b, -1, -1)
            group = torch.cat([own, members], 2).to(torch.float32)
            itself = torch.eye(n + count, dtype=torch.bool, device=x.device)
            mask = (group.transpose(1, 2) @ group > 0) | itself
            read = first(x, n)
        for i, block in enumerate(self.blocks, 1):
            x = block(x, mask, read if skip and i == len(self.blocks) else None)
        x = x[:, : read.shape[1]]
        return (self.ln_post(x) @ self.proj.to(dtype)).reshape(b, n, -1)


class Actions(nn.Module):
    """Action tokens."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        h = c.vision_width
        self.queries = nn.Parameter(torch.zeros(c.action_tokens, h))
        self.cls = nn.Parameter(torch.zeros(h))
        self.frame_embedding = nn.Parameter(torch.zeros(c.frames, h))
        self.blocks = blocks(c.action_depth, h, c.vision_heads)
        self.ln_post = LayerNorm(h)
        self.proj = nn.Parameter(torch.zeros(h, c.text_width))

    def forward(self, patches: Tensor, objects: Tensor, valid: Tensor, skip: bool) -> Tensor:
        """Return [B, A, d] from patches [B, T, P, h] and objects [B, T, K, h]."""
        dtype = patches.dtype
        features = torch.cat([patches, objects], 2)
        logits = torch.einsum("ah,btfh->btaf", self.queries.to(dtype), features).float()
        mask = F.pad(valid, (patches.shape[2], 0), value=True)
        weights = logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(dtype)
        x = torch.einsum("btaf,btfh->bath", weights, features)
        x = (x + self.frame_embedding).to(dtype)
        b, a, t, h = x.shape
        x = torch.cat([self.cls.to(dtype).expand(b, a, 1, h), x], 2).reshape(b * a, t + 1, h)
        for i, block in enumerate(self.blocks, 1):
            x = block(x, keep=first(x) if skip and i == len(self.blocks) else None)
        return (self.ln_post(x[:, 0]) @ self.proj.to(dtype)).reshape(b, a, -1)


class Fusion(nn.Module):
    """The encoder of all modalities, and the heads on top of it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        d = c.text_width
        self.positions = nn.Parameter(torch.zeros(c.text_positions, d))
        self.more_positions = nn.Parameter(torch.zeros(c.visual_length, d))
        self.blocks = blocks(c.fusion_depth, d, c.fusion_heads)
        self.lm_proj = nn.Parameter(torch.zeros(d, d))
        self.lm_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.match = nn.Linear(2 * d, 2)

    def forward(self, x: Tensor, mask: Tensor, reads: list[Tensor], skip: bool) -> list[Tensor]:
        """Encode [B', S, d], and return the outputs at each of `reads` (positions [rows, Q])."""
        table = torch.cat([self.positions, self.more_positions])
        x = (x + table[: x.shape[1]]).to(x.dtype)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        last, sizes = self.blocks[-1], [len(read) for read in reads]
        if not skip:
            return [positions(y, r) for y, r in zip(last(x, mask).split(sizes), reads, strict=True)]
        parts = zip(x.split(sizes), mask.split(sizes), reads, strict=True)
        return [last(rows, rows_mask, read) for rows, rows_mask, read in parts]


class Video(NamedTuple):
    """Features of a batch of clips."""

    frames: Tensor  # [B, T, d]
    objects: Tensor  # [B, N, d]
    object_mask: Tensor  # [B, N]
    actions: Tensor  # [B, A, d]


class Twin(nn.Module):
    """The whole network.

    With `separate`, every trajectory is its own sequence. Without `skip`, every layer computes all
    positions, even those that nothing reads.
    """

    def __init__(self, c: ModelConfig, *, separate: bool = False, skip: bool = True):
        super().__init__()
        same = ("region", "trajectory_choice", "action_cls", "fusion_positions", "masked_text")
        same += ("prefix_lm", "match_head", "head_dropout", "alignment", "fusion_stop_gradient")
        same += ("joint_blocks", "trajectory_verbs", "trajectory_adjectives", "activation")
        same += ("objects", "actions", "alignment_target")
        for name in same:
            if getattr(c, name) != getattr(PAPER, name):
                raise ValueError(
                    f"the PyTorch twin has no {name}={getattr(c, name)!r}; "
                    f"it covers the preset `paper` only ({getattr(PAPER, name)!r})"
                )
        self.config, self.separate, self.skip = c, separate, skip
        self.visual, self.text = VisionTower(c), TextTower(c)
        self.regions, self.trajectory, self.action = Regions(c), Trajectories(c), Actions(c)
        self.fusion = Fusion(c)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.dtype = torch.float32  # of activations

    def encode_video(self, pixels: Tensor, boxes: Tensor, classes: Tensor, scores: Tensor) -> Video:
        """Encode clips [B, T, side, side, 3] with their objects [B, T, K]."""
        c = self.config
        b, t = pixels.shape[:2]
        frames, taps = self.visual(pixels.flatten(0, 1), self.dtype, self.skip)
        taps = {i: x.unflatten(0, (b, t)) for i, x in taps.items()}
        valid = classes >= 0
        boxes = torch.where(valid[..., None], boxes, 0)
        objects = self.regions(taps[c.object_block][:, :, 1:], boxes)
        members, mask = choose_trajectories(classes.flatten(1), scores.flatten(1), c.trajectories)
        x = self.trajectory(objects.flatten(1, 2), members, self.separate, self.skip)
        x = torch.where(mask[..., None], x, 0)
        actions = self.action(taps[c.action_block][:, :, 1:], objects, valid, self.skip)
        return Video(frames.unflatten(0, (b, t)), x, mask, actions)

    def fusion_input(
        self, video: Video, text: Tensor, text_mask: Tensor, text_attention: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sequence [B, S, d] and its mask [B, S, S] (True: may attend)."""
        cls = video.frames.mean(1, keepdim=True)
        x = torch.cat([video.frames, cls, video.objects, video.actions, text], 1)
        t = video.frames.shape[1]
        visual = F.pad(video.object_mask, (t + 1, video.actions.shape[1]), value=True)
        if text_attention is None:
            mask = torch.cat([visual, text_mask], 1)[:, None].expand(-1, x.shape[1], -1)
            return x, mask
        seen = visual[:, None].expand(-1, x.shape[1], -1)
        to_text = F.pad(text_attention & text_mask[:, None], (0, 0, visual.shape[1], 0))
        return x, torch.cat([seen, to_text], 2)

    def word_logits(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of features [..., d]."""
        x = x @ self.fusion.lm_proj.to(x.dtype)
        return F.linear(x, self.text.token_embedding.to(x.dtype)).float() + self.fusion.lm_bias


def choose_trajectories(classes: Tensor, scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the objects [B, N, T·K] of the N classes with the most confidence, and which N exist.

    Takes classes and scores [B, T·K]; a negative class is padding.
    """
    valid = classes >= 0
    same = (classes[:, :, None] == classes[:, None]) & valid[:, None] & valid[:, :, None]
    earlier = torch.ones_like(same[0]).tril(-1)
    is_first = valid & ~(same & earlier).any(2)
    total = torch.where(same, scores[:, None], 0).sum(2)
    # Two stable sorts: by class, then by confidence; objects that represent no class come last.
    by_class = classes.argsort(dim=1, stable=True)
    key = torch.where(is_first, total, -1).gather(1, by_class)
    order = by_class.gather(1, key.argsort(dim=1, descending=True, stable=True))[:, :num]
    order = F.pad(order, (0, num - order.shape[1]))
    exists = torch.arange(num, device=classes.device) < is_first.sum(1, keepdim=True)
    chosen = classes.gather(1, order)
    return (classes[:, None] == chosen[..., None]) & exists[..., None] & valid[:, None], exists
