"""π0 in PyTorch, of any size: SigLIP tower, Gemma trunk over images and prompt, action expert over state and actions.

Modules are named so that `state_dict` has the names of LeRobot and openpi checkpoints. tests of this file against the
published policies' outputs: `check.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    width: int
    mlp: int


@dataclass(frozen=True)
class Size:
    """Dimensions; the defaults are those of the shipped policy."""

    image: int = 112
    patch: int = 14
    vision_width: int = 160
    vision_layers: int = 4
    vision_heads: int = 5
    vision_mlp: int = 448
    layers: int = 5
    heads: int = 4
    head_dim: int = 48
    trunk: Stack = Stack(192, 512)
    expert: Stack = Stack(128, 384)
    vocab: int = 320
    state_dim: int = 8
    action_dim: int = 8
    horizon: int = 32
    min_period: float = 0.004
    max_period: float = 4.0


class SiglipAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size.vision_width, eps=1e-6)
        self.self_attn = SiglipAttention(size.vision_width, size.vision_heads)
        self.layer_norm2 = nn.LayerNorm(size.vision_width, eps=1e-6)
        self.mlp = Mlp(size.vision_width, size.vision_mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        tokens = (size.image // size.patch) ** 2
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, size.vision_width, size.patch, size.patch)
        self.embeddings.position_embedding = nn.Embedding(tokens, size.vision_width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(SiglipLayer(size) for _ in range(size.vision_layers))
        self.post_layernorm = nn.LayerNorm(size.vision_width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, side, side] in [-1, 1] to [n, tokens, width]."""
        patch = self.embeddings.patch_embedding
        p = patch.kernel_size[0]
        # The convolution as a product: many times faster than the library's gradient of a 14x14 stride.
        cut = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(cut, patch.weight.flatten(1), patch.bias) + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class RmsNorm(nn.Module):
    """x / rms(x) · (1 + w)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.float())).to(x.dtype)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, half-split, base 10000. x [b, heads, n, d], positions [b, n]."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class GemmaAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, head_dim, bias=False)
        self.v_proj = nn.Linear(width, head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(self.k_proj(x)[:, None], positions), self.v_proj(x)[:, None]

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), positions)
        keys, values = (t.expand(-1, self.heads, -1, -1) for t in (keys, values))
        return self.o_proj(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).flatten(2))


class GemmaMlp(nn.Module):
    def __init__(self, width: int, mlp: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, size: Size, stack: Stack):
        super().__init__()
        self.self_attn = GemmaAttention(stack.width, size.heads, size.head_dim)
        self.mlp = GemmaMlp(stack.width, stack.mlp)
        self.input_layernorm = RmsNorm(stack.width)
        self.post_attention_layernorm = RmsNorm(stack.width)


class Gemma(nn.Module):
    def __init__(self, size: Size, stack: Stack, final_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(size, stack) for _ in range(size.layers))
        if final_norm:
            self.norm = RmsNorm(stack.width)


def module(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


class Pi0(nn.Module):
    """The policy in normalised space."""

    def __init__(self, size: Size = Size()):
        super().__init__()
        self.size = size
        width = size.expert.width
        self.paligemma_with_expert = module(
            paligemma=module(
                model=module(
                    vision_tower=module(vision_model=Siglip(size)),
                    multi_modal_projector=module(linear=nn.Linear(size.vision_width, size.trunk.width)),
                    language_model=Gemma(size, size.trunk, final_norm=False),
                ),
                lm_head=nn.Embedding(size.vocab, size.trunk.width),
            ),
            gemma_expert=module(model=Gemma(size, size.expert, final_norm=True)),
        )
        self.state_proj = nn.Linear(size.state_dim, width)
        self.action_in_proj = nn.Linear(size.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, size.action_dim)
        for name, parameter in self.named_parameters():
            if "embedding" in name or "lm_head" in name:
                # Scaled by √width on the way in.
                nn.init.normal_(parameter, std=size.trunk.width**-0.5 if "lm_head" in name else 0.02)
            elif parameter.ndim > 1 and "proj" in name and "paligemma_with_expert" in name:
                nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)

    @property
    def _pali(self) -> nn.Module:
        return self.paligemma_with_expert.paligemma

    def embed_prefix(self, images: Tensor, tokens: Tensor) -> Tensor:
        """images [b, views, 3, side, side], tokens [b, n] to [b, views·tokens + n, width]."""
        model = self._pali.model
        seen = model.multi_modal_projector.linear(model.vision_tower.vision_model(images.flatten(0, 1)))
        text = self._pali.lm_head(tokens) * math.sqrt(self.size.trunk.width)
        return torch.cat([seen.unflatten(0, images.shape[:2]).flatten(1, 2), text.to(seen.dtype)], 1)

    def prefix(self, x: Tensor, valid: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of every layer, and what the last whole layer says. `valid` [b, n] marks what is there."""
        positions = valid.cumsum(1) - 1
        mask = valid[:, None, None, :]
        cache = []
        layers = self._pali.model.language_model.layers
        for n, layer in enumerate(layers):
            u = layer.input_layernorm(x)
            cache.append(layer.self_attn.keys_values(u, positions))
            if n + 1 < len(layers):
                x = x + layer.self_attn(u, positions, *cache[-1], mask)
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return cache, x

    def velocity(self, cache: list[tuple[Tensor, Tensor]], valid: Tensor, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """noise − data, [b, horizon, action_dim], at `noisy` and `time` [b]."""
        width = self.size.expert.width
        fraction = torch.linspace(0, 1, width // 2, device=time.device, dtype=torch.float64)
        period = self.size.min_period * (self.size.max_period / self.size.min_period) ** fraction
        angle = (2 * math.pi / period) * time[:, None].double()
        embedded = torch.cat([angle.sin(), angle.cos()], -1).float()
        actions = self.action_in_proj(noisy)
        both = torch.cat([actions, embedded[:, None].expand(-1, actions.shape[1], -1).to(actions.dtype)], -1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        x = torch.cat([self.state_proj(state)[:, None], actions], 1)
        n = x.shape[1]
        positions = valid.sum(1, keepdim=True) + torch.arange(n, device=x.device)
        # The state sees the prefix and itself, actions see everything.
        own = torch.ones(n, n, dtype=torch.bool, device=x.device)
        own[0, 1:] = False
        mask = torch.cat([valid[:, None, None, :].expand(-1, 1, n, -1), own.expand(len(x), 1, n, n)], -1)
        expert = self.paligemma_with_expert.gemma_expert.model
        for layer, (keys, values) in zip(expert.layers, cache):
            u = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(u, positions)
            x = x + layer.self_attn(u, positions, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.action_out_proj(expert.norm(x[:, 1:]))

    @torch.no_grad()
    def act(self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, noise: Tensor, steps: int = 10,
            views: Tensor | None = None) -> dict[str, Tensor]:
        """A chunk by Euler steps from noise: `actions`, every step's velocity `v`, `prefix_embs`."""
        if views is None:
            views = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        prefix = self.embed_prefix(images, tokens)
        patches = (self.size.image // self.size.patch) ** 2
        valid = torch.cat([views.repeat_interleave(patches, 1), token_mask], 1)
        cache, _ = self.prefix(prefix, valid)
        x, velocities = noise, []
        for k in range(steps):
            time = torch.full((len(x),), 1 - k / steps, device=x.device)
            velocities.append(self.velocity(cache, valid, state, x, time).float())
            x = x - velocities[-1] / steps
        return {"actions": x, "v": torch.stack(velocities, 1), "prefix_embs": prefix}


def size_of(tensors: dict[str, Tensor], horizon: int, vision_heads: int, min_period: float, max_period: float) -> Size:
    """The dimensions of a checkpoint's tensors (names without a leading `model.`)."""
    vision = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    trunk = "paligemma_with_expert.paligemma.model.language_model.layers."
    expert = "paligemma_with_expert.gemma_expert.model.layers."

    def count(prefix: str) -> int:
        return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix))

    def stack(prefix: str) -> Stack:
        mlp, width = tensors[f"{prefix}0.mlp.gate_proj.weight"].shape
        return Stack(width, mlp)

    patch = tensors[vision + "embeddings.patch_embedding.weight"]
    tokens = len(tensors[vision + "embeddings.position_embedding.weight"])
    head_dim = len(tensors[trunk + "0.self_attn.k_proj.weight"])
    return Size(
        image=math.isqrt(tokens) * patch.shape[-1],
        patch=patch.shape[-1],
        vision_width=len(patch),
        vision_layers=count(vision + "encoder.layers."),
        vision_heads=vision_heads,
        vision_mlp=len(tensors[vision + "encoder.layers.0.mlp.fc1.weight"]),
        layers=count(trunk),
        heads=len(tensors[trunk + "0.self_attn.q_proj.weight"]) // head_dim,
        head_dim=head_dim,
        trunk=stack(trunk),
        expert=stack(expert),
        vocab=len(tensors["paligemma_with_expert.paligemma.lm_head.weight"]),
        state_dim=tensors["state_proj.weight"].shape[1],
        action_dim=tensors["action_in_proj.weight"].shape[1],
        horizon=horizon,
        min_period=min_period,
        max_period=max_period,
    )
