"""The VLA as HuggingFace knows it: OpenVLA's architecture, its processor, and actions <-> tokens.

This file knows no environment, no algorithm and no checkpoint folder. One class serves two models:
- openvla-7b in its published layout: DINOv2 and SigLIP towers, then Llama-2. `from_pretrained`
  reads the published folder as it is, with the published parameter names.
- the tiny default of `tiny_config`: a convolutional tower and a three-layer Llama with about
  1 M parameters.
Importing this file registers both with HuggingFace's Auto classes.

Letters: B batch, A action tokens, L text tokens, P image patches, D hidden width,
V vocabulary.
The sequence is `<s>`, P patches, one proprioception token (tiny model only), text, action tokens.
Action bin b is token id V_text - 1 - b, where V_text is the vocabulary without its padding.
Source: openvla/openvla@c8f03f4 (prismatic/extern/hf) for the architecture and timm for the names
of the ViT's parameters. The code is our own.
"""

import contextlib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import is_peft_available, is_vision_available
from transformers.utils import logging as transformers_logging

# A checkpoint holds a copy of this file. It acts without PEFT, which LoRA alone needs.
if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model

Tensor = torch.Tensor

# Roll-out and update must give the same log-probabilities.
# TF32 would round the convolutions of a float32 model on a GPU.
torch.backends.cudnn.allow_tf32 = False

# The published towers by their timm ids.
# `prefix` counts the class and register tokens before the patches.
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {
        "width": 1024,
        "blocks": 24,
        "heads": 16,
        "mlp": 4096,
        "patch": 14,
        "prefix": 5,
        "layer_scale": True,
    },
    "vit_so400m_patch14_siglip_224": {
        "width": 1152,
        "blocks": 27,
        "heads": 16,
        "mlp": 4304,
        "patch": 14,
        "prefix": 0,
        "layer_scale": False,
    },
}

# Llama's token for a space. The published prompt ends in it.
LLAMA_SPACE_ID = 29871
PUBLISHED_PROMPT = "In: What action should the robot take to {instruction}?\nOut: "
TINY_PROMPT = "{instruction}: "


# ---- actions <-> tokens --------------------------------------------------------------------------
def action_ranges(stats: dict, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The lists q01, q99 and mask of action statistics as tensors (A,), (A,) and (A,) bool.

    Statistics without a mask scale every dimension.
    """
    q01 = torch.tensor(stats["q01"], device=device)
    q99 = torch.tensor(stats["q99"], device=device)
    everything = [True] * len(stats["q01"])
    mask = torch.tensor(stats.get("mask", everything), device=device)
    return q01, q99, mask


def constant_dims(stats: dict) -> Tensor:
    """(A,) bool: true for the dimensions that never vary in the demonstrations.

    These decode to q01 whatever their token is, so no loss counts their tokens.
    """
    return torch.tensor(stats["q99"]) - torch.tensor(stats["q01"]) < 1e-6


def tokenize_actions(actions: Tensor, stats: dict, n_bins: int = 256) -> Tensor:
    """Actions (B, A) in the env's units -> bins (B, A) long in 0..n_bins-1.

    stats: the `action` entry of `norm_stats`, with lists `q01`, `q99` and (optional) `mask`.
    Where mask is true, [q01, q99] maps to [-1, 1]. Where it is false, the action is not scaled.
    Values outside [-1, 1] are clipped. The binning is that of OpenVLA's ActionTokenizer: n_bins
    edges over [-1, 1]. A dimension with q99 - q01 < 1e-6 gets bin n_bins // 2.
    """
    q01, q99, mask = action_ranges(stats, actions.device)
    constant = q99 - q01 < 1e-6
    # A constant dimension is divided by 1, because its range is zero.
    width = torch.where(constant, 1.0, q99 - q01)
    scaled = 2 * (actions - q01) / width - 1
    # Unscaled dimensions are expected in [-1, 1] as they are.
    scaled = torch.where(mask, scaled, actions).clamp(-1, 1)
    # Only the value 1 itself falls into the last bin.
    bins = ((scaled + 1) * (n_bins - 1) / 2).floor().long()
    bins = bins.clamp(0, n_bins - 1)
    return torch.where(constant, n_bins // 2, bins)


def detokenize_actions(tokens: Tensor, stats: dict, n_bins: int = 256) -> Tensor:
    """Bins (B, A) -> actions (B, A) float in the env's units.

    stats: as for `tokenize_actions`. Bin b decodes to the centre of interval min(b, n_bins - 2).
    Where the list `binary` (optional, from `signed_gripper`) is true, only the sign counts: the
    action is 1 or -1. Dimensions that never vary decode to q01.
    """
    q01, q99, mask = action_ranges(stats, tokens.device)
    # n_bins edges enclose n_bins - 1 intervals, so the last two bins share one.
    interval = tokens.clamp(0, n_bins - 2).float()
    scaled = (2 * interval + 1) / (n_bins - 1) - 1
    unscaled = (scaled + 1) / 2 * (q99 - q01) + q01
    actions = torch.where(mask, unscaled, scaled)
    # Statistics without the list `binary` have no such dimension.
    nothing = [False] * len(q01)
    binary = torch.tensor(stats.get("binary", nothing), device=tokens.device)
    actions = torch.where(binary, 2.0 * (actions > 0) - 1, actions)
    return torch.where(q99 - q01 < 1e-6, q01, actions).float()


def blur_bins(bins: Tensor, deviation: float, n_bins: int, generator: torch.Generator) -> Tensor:
    """Bins (B, A) long, each moved by Gaussian noise of `deviation` bins: a soft target.

    The noise is reflected at the outermost bins. Clamping would put half the mass of an outermost
    label into one bin. At deviation 4 that is five times the peak of any other label, and argmax
    would choose the outermost bin where it is the less likely one.
    """
    last = n_bins - 1
    noise = deviation * torch.randn(bins.shape, generator=generator)
    # The absolute value reflects at bin 0, the line below it at the last bin.
    moved = (bins + noise.round().long()).abs()
    moved = last - (last - moved).abs()
    # Noise wider than the whole range has been reflected to below bin 0.
    return moved.clamp(min=0)


def shift_images(rgb: Tensor, shift: Tensor) -> Tensor:
    """Images (B, H, W, 3), each moved along both axes. shift: (B, 2) whole pixels.

    Where nothing moves in, the pixels of the edge are repeated (DrQ, Yarats et al. 2021).
    """
    B, H, W, _ = rgb.shape
    rows = (torch.arange(H) + shift[:, :1]).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W) + shift[:, 1:]).clamp(0, W - 1)  # (B, W)
    image = torch.arange(B)
    return rgb[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def signed_gripper(stats: dict) -> dict:
    """Statistics of OpenVLA's data for an env whose gripper command runs from -1 to 1.

    The gripper is the last dimension. In published data 0 is closed and 1 is open, mostly unscaled
    (mask false). Here a gripper above 0.5 decodes to 1, any other to -1, as in RL4VLA and
    SimplerEnv. One that is scaled and goes below 0 is in the env's units and stays as it is.
    Returns the `action` entry alone: the proprioception statistics are those of other robots.
    Raises ValueError where the range is neither.
    """
    action = stats["action"]
    q01 = list(action["q01"])
    q99 = list(action["q99"])
    mask = action.get("mask", [True] * len(q01))
    if not all(mask[:-1]):
        raise ValueError(f"mask is {mask}: only the gripper, the last, may be unscaled")
    # Statistics that were signed before stay as they are.
    if action.get("binary", [False])[-1]:
        return {"action": action}
    scaled = mask[-1]
    check_gripper(q01[-1], q99[-1], scaled)
    binary = not scaled or q01[-1] > -0.1
    if binary and scaled:
        # [0, 1] maps to [-1, 1], so that 0.5 maps to 0, where the sign changes.
        q01[-1] = 2 * q01[-1] - 1
        q99[-1] = 2 * q99[-1] - 1
    elif binary:
        # The token's value is the gripper. [-1, 1] maps to [-3, 1], and 0.5 to 0 as well.
        q01[-1] = -3.0
        q99[-1] = 1.0
    signed = {
        "q01": q01,
        "q99": q99,
        "mask": [True] * len(q01),
        "binary": [False] * (len(q01) - 1) + [binary],
    }
    return {"action": signed}


def check_gripper(low: float, high: float, scaled: bool) -> None:
    """Raises ValueError where a gripper's q01 and q99 say neither 0 to 1 nor -1 to 1."""
    if high - low >= 1e-6:
        # Fingers measured in metres would never pass the threshold.
        fits = low < 0.5 < high or (scaled and low <= -0.1)
    else:
        # A gripper that never moves is open or closed. A scaled 0 could also be half open.
        ends = (-1, 1) if scaled else (-1, 0, 1)
        fits = min(abs(high - end) for end in ends) < 0.1
    if not fits or low < -1.1 or high > 1.1:
        raise ValueError(
            f"the gripper, last in q01 and q99, runs from {low} to {high}: "
            "neither from 0 (closed) to 1 (open) nor from -1 to 1"
        )


# ---- configuration -------------------------------------------------------------------------------
class OpenVLAConfig(PreTrainedConfig):
    """openvla-7b's `config.json`, plus what the tiny model needs.

    timm_model_ids: names of the published towers. image_sizes: pixels, one for each tower.
    norm_stats: task or data set -> its statistics `action` and `proprio`.
    pad_to_multiple_of: how many rows of the vocabulary are padding.
    vision_widths: replaces the towers by one convolutional tower of these widths.
    vit_overrides: shrinks the ViTs for tests ("width", "blocks", "heads", "mlp").
    proprio_dim: numbers of proprioception. 0: the model has no proprioception token.
    """

    model_type = "openvla"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        text_config=None,
        timm_model_ids=(),
        image_sizes=(224, 224),
        n_action_bins=256,
        norm_stats=None,
        pad_to_multiple_of=64,
        vision_widths=None,
        vit_overrides=None,
        proprio_dim=0,
        **kwargs,
    ):
        if isinstance(text_config, LlamaConfig):
            text_config = text_config.to_dict()
        text_config = dict(text_config or {})
        # The class LlamaConfig knows its own model type.
        text_config.pop("model_type", None)
        self.text_config = LlamaConfig(**text_config)
        self.timm_model_ids = list(timm_model_ids)
        self.image_sizes = list(image_sizes)
        self.n_action_bins = n_action_bins
        self.norm_stats = norm_stats or {}
        self.pad_to_multiple_of = pad_to_multiple_of
        self.vision_widths = vision_widths
        self.vit_overrides = vit_overrides
        self.proprio_dim = proprio_dim
        # OpenVLA's head of the vocabulary has weights of its own.
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def action_id_end(self) -> int:
        """Bin b is token id `action_id_end - 1 - b`.

        The action bins are the last ids of the vocabulary without its padding.
        """
        return self.text_config.vocab_size - self.pad_to_multiple_of


def tiny_config(
    vocab_size: int = 768,
    image_size: int = 128,
    width: int = 128,
    layers: int = 3,
) -> OpenVLAConfig:
    """Configuration of the tiny model.

    vocab_size: text tokens and 256 action bins. image_size: pixels. width: D.
    16 image tokens keep a training sample near 3 ms on two CPU cores. A stem of small convolutions
    localises a cube three times better than one patch projection of equal cost.
    """
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=352 * width // 128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        # These are the ids of the special tokens in `tiny_processor`.
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return OpenVLAConfig(
        text.to_dict(),
        image_sizes=[image_size, image_size],
        pad_to_multiple_of=0,
        vision_widths=[32, 64, 128, 128],
        proprio_dim=8,
    )


# ---- vision --------------------------------------------------------------------------------------
# The order in which modules are made is the order in which they draw their initial weights.
class LayerScale(nn.Module):
    """One learned factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Attention(nn.Module):
    """Self-attention over all positions. (B, positions, width) -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        # Each of the three is (B, heads, positions, width / heads).
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # The patches of one image attend to each other without a mask.
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, applied to each position alone."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """One transformer block with the normalisation first, as in timm."""

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Without LayerScale `ls1` and `ls2` do nothing.
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, P, width): one linear map of each square patch."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        # (B, width, H / patch, W / patch) -> (B, P, width)
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """One published tower under timm's parameter names. (B, 3, H, W) -> (B, P, width).

    It returns what OpenVLA uses: the patches after the second-to-last block. The last block and
    the norm are not run. They exist because the published files hold their weights.
    """

    def __init__(self, timm_id: str, image_size: int, overrides: dict | None):
        super().__init__()
        # Tests shrink the tower, except for its patches and its prefix.
        shape = {**TOWERS[timm_id], **(overrides or {})}
        width = shape["width"]
        num_patches = (image_size // shape["patch"]) ** 2
        self.width = width
        self.prefix = shape["prefix"]
        self.patch_embed = PatchEmbed(width, shape["patch"])
        # A published model loads its own values, so zeros are enough here.
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        if self.prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, self.prefix - 1, width))
        blocks = []
        for _ in range(shape["blocks"]):
            block = Block(width, shape["heads"], shape["mlp"], shape["layer_scale"])
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        if self.prefix:
            # Class and register tokens have no position of their own.
            cls = self.cls_token.expand(len(x), -1, -1)
            reg = self.reg_token.expand(len(x), -1, -1)
            x = torch.cat([cls, reg, x], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        # Only the patches go on to the language model.
        return x[:, self.prefix :]


class TwoTowers(nn.Module):
    """DINOv2 and SigLIP side by side. (B, 6, H, W) -> (B, P, sum of both widths).

    The first three channels are normalised for DINOv2, the last three for SigLIP.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        dino, siglip = config.timm_model_ids
        dino_size, siglip_size = config.image_sizes
        self.featurizer = ViT(dino, dino_size, config.vit_overrides)
        self.fused_featurizer = ViT(siglip, siglip_size, config.vit_overrides)
        self.width = self.featurizer.width + self.fused_featurizer.width

    def forward(self, pixels: Tensor) -> Tensor:
        dino = self.featurizer(pixels[:, :3])
        siglip = self.fused_featurizer(pixels[:, 3:])
        return torch.cat([dino, siglip], -1)


class ConvTower(nn.Module):
    """The tower of the tiny model. (B, 3, 128, 128) -> (B, 16, width).

    An 8x8 convolution of stride 4 comes first, then 3x3 convolutions of stride 2.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        widths = config.vision_widths
        layers = [nn.Conv2d(3, widths[0], 8, 4, padding=2), nn.GELU()]
        for before, after in zip(widths, widths[1:]):
            layers += [
                nn.Conv2d(before, after, 3, 2, padding=1),
                nn.GroupNorm(8, after),
                nn.GELU(),
            ]
        self.stem = nn.Sequential(*layers)
        self.width = widths[-1]
        # The first convolution divides the side by 4, each of the others by 2.
        stride = 4 * 2 ** (len(widths) - 1)
        side = config.image_sizes[0] // stride
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, self.width))

    def forward(self, pixels: Tensor) -> Tensor:
        # (B, width, side, side) -> (B, P, width)
        return self.stem(pixels).flatten(2).transpose(1, 2) + self.pos_embed


class Projector(nn.Module):
    """A linear map into the language model's width, with hidden layers.

    It has three layers behind the two published towers (`fused`), and two in the tiny model.
    """

    def __init__(self, vision: int, text: int, fused: bool):
        super().__init__()
        hidden = 4 * vision if fused else text
        self.fc1 = nn.Linear(vision, hidden)
        self.fc2 = nn.Linear(hidden, text)
        self.fc3 = nn.Linear(text, text) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        if self.fc3 is not None:
            x = self.fc3(F.gelu(x))
        return x


# ---- the language model --------------------------------------------------------------------------
# These functions run the layers of transformers' LlamaModel, whose modules hold the weights.
# Its own pass takes longer, because it computes the last layer at all positions.
def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Llama's normalisation with the weights of its module `norm`. (..., D) -> the same."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x: (B, L, heads, width). cos, sin: (B, L, 1, width).

    The first half of `sin` has the opposite sign.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin)


def llama_layer(layer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past, kept: int):
    """One layer over x (B, L, D), which stands after the cached positions.

    cos, sin: as for `rotate`. mask: (B, 1, L, positions), -inf where a token may not look.
    past: keys and values (B, heads, positions, width) of the cached positions, or None.
    Returns the output at the last `kept` positions (0: at all), and keys and values of all.
    """
    attention = layer.self_attn
    heads = (len(x), -1, attention.config.num_attention_heads, attention.head_dim)
    # Several heads may share their keys and values.
    shared = (len(x), -1, attention.config.num_key_value_heads, attention.head_dim)
    normed = rms_norm(layer.input_layernorm, x)
    k = rotate(attention.k_proj(normed).view(shared), cos, sin).transpose(1, 2)
    v = attention.v_proj(normed).view(shared).transpose(1, 2)
    if past is not None:
        k = torch.cat([past[0], k], 2)
        v = torch.cat([past[1], v], 2)
    # All that follows is needed at the kept positions alone.
    q = attention.q_proj(normed[:, -kept:]).view(heads)
    q = rotate(q, cos[:, -kept:], sin[:, -kept:]).transpose(1, 2)
    bias = mask[:, :, -kept:]
    gqa = heads != shared
    attended = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=gqa)
    x = x[:, -kept:] + attention.o_proj(attended.transpose(1, 2).flatten(2))
    normed = rms_norm(layer.post_attention_layernorm, x)
    gated = F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    return x + layer.mlp.down_proj(gated), (k, v)


def llama(model, x: Tensor, mask: Tensor, past: list | None, kept: int, use_cache: bool = True):
    """All layers of a LlamaModel over embeddings x (B, L, D), after the cached positions.

    mask: (B, positions) over the cached positions and x, 0 at padding.
    past: keys and values of each layer, as an earlier call has returned them, or None.
    Returns the hidden state at the last `kept` positions (0: at all), and keys and values, which
    are dropped layer by layer without `use_cache`.
    """
    L = x.shape[1]
    # Padding does not advance the position, so it changes no log-probability.
    positions = mask.cumsum(-1)[:, -L:] - 1
    cos, sin = model.rotary_emb(x, positions)  # (B, L, width)
    first, second = sin.chunk(2, -1)
    sin = torch.cat([-first, second], -1)
    # All heads share them.
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    # A token sees itself and what comes before it, but no padding.
    before = mask.new_ones(L, mask.shape[1]).tril(mask.shape[1] - L)
    unseen = (before * mask[:, None])[:, None] == 0  # (B, 1, L, positions)
    bias = x.new_zeros(unseen.shape).masked_fill(unseen, -torch.inf)
    cache = []
    for i, layer in enumerate(model.layers):
        layer_past = past[i] if past else None
        # Nothing reads the other outputs of the last layer.
        layer_kept = kept if i == len(model.layers) - 1 else 0
        run = llama_layer
        if layer.gradient_checkpointing and layer.training:
            run = functools.partial(checkpoint, llama_layer, use_reentrant=False)
        x, keys_values = run(layer, x, cos, sin, bias, layer_past, layer_kept)
        if use_cache:
            cache.append(keys_values)
    return rms_norm(model.norm, x), cache


# ---- the model -----------------------------------------------------------------------------------
@dataclass
class OpenVLAOutput(ModelOutput):
    """What `forward` returns."""

    logits: Tensor | None = None
    """(B, kept positions, V)"""
    last_hidden_state: Tensor | None = None
    """(B, kept positions, D)"""
    past_key_values: object | None = None
    """the key-value cache, with use_cache"""


class OpenVLAForActionPrediction(PreTrainedModel):
    """Image, instruction and (tiny model) proprioception -> logits of the next token."""

    config_class = OpenVLAConfig
    base_model_prefix = ""
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # The published files hold a pooling layer of SigLIP that the published forward does not use.
    # Files of older versions of transformers hold the frequencies of Llama's rotation.
    _keys_to_ignore_on_load_unexpected = [r"\.attn_pool\.", r"\.rotary_emb\.inv_freq$"]

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        fused = not config.vision_widths
        self.vision_backbone = TwoTowers(config) if fused else ConvTower(config)
        self.projector = Projector(self.vision_backbone.width, width, fused)
        self.language_model = LlamaForCausalLM(config.text_config)
        if config.proprio_dim:
            self.proprio_projector = Projector(config.proprio_dim, width, False)
        self.post_init()

    def _init_weights(self, module):
        """Keeps PyTorch's own initialisation of a new model.

        The language model is the exception. It initialises itself (normal, deviation 0.02).
        """

    def init_action_rows(self) -> None:
        """Makes neighbouring bins alike from the start.

        The action rows of embedding and head become smooth functions of the bin:
        row[t, k] = 0.1 cos(pi t k) / (1 + k / 8), with t in [0, 1] over the bins and channel k.
        Cross-entropy does not know that bin 130 is next to bin 131. These rows tell it.
        """
        n_bins = self.config.n_action_bins
        end = self.config.action_id_end
        t = torch.linspace(0, 1, n_bins)[:, None]
        k = torch.arange(self.config.text_config.hidden_size)
        rows = 0.1 * torch.cos(math.pi * t * k) / (1 + k / 8)
        # Bin 0 is the last id, so the rows are flipped.
        rows = rows.flip(0)
        self.language_model.get_input_embeddings().weight.data[end - n_bins : end] = rows
        self.language_model.get_output_embeddings().weight.data[end - n_bins : end] = rows

    def get_input_embeddings(self):
        """The token embedding, which HuggingFace asks for by this name."""
        return self.language_model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        proprio: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> OpenVLAOutput:
        """One pass over `<s>`, patches, text, and the action tokens that stand in `input_ids`.

        input_ids, attention_mask: (B, L), `<s>` first, padding between `<s>` and the text.
        pixel_values: (B, 3 * towers, H, W). proprio: (B, proprio_dim), normalised.
        Returns logits (B, L + num_prefix, V), or those of the last `logits_to_keep` positions.
        With past_key_values, input_ids (B, n) are the next tokens alone and attention_mask covers
        the whole sequence so far (`sample_action` in the scripts does this).
        """
        embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        mask = attention_mask
        if past_key_values is None:
            inserted = self.projector(self.vision_backbone(pixel_values.to(embeds.dtype)))
            if self.config.proprio_dim:
                token = self.proprio_projector(proprio.to(embeds.dtype))[:, None]
                inserted = torch.cat([inserted, token], 1)
            # The observation stands between `<s>` and the text.
            embeds = torch.cat([embeds[:, :1], inserted, embeds[:, 1:]], 1)
            seen = mask.new_ones(inserted.shape[:2])
            mask = torch.cat([mask[:, :1], seen, mask[:, 1:]], 1)
        hidden, cache = llama(
            self.language_model.model, embeds, mask, past_key_values, logits_to_keep, use_cache
        )
        # The head is the widest layer, so it runs on the kept positions alone.
        logits = self.language_model.lm_head(hidden)
        return OpenVLAOutput(
            logits=logits,
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
        )

    @torch.no_grad()
    def predict_action(self, unnorm_key: str, **inputs: Tensor) -> Tensor:
        """Greedy actions (B, A) in the env's own units, as the published model's function.

        unnorm_key: an entry of `norm_stats`, here a task. inputs: what the processor returns.
        Each token takes a whole pass. `sample_action` in the scripts keeps keys and values.
        """
        stats = self.config.norm_stats[unnorm_key]["action"]
        n_bins = self.config.n_action_bins
        end = self.config.action_id_end
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        for constant in constant_dims(stats):
            bins = torch.full_like(ids[:, :1], n_bins // 2)
            if not constant:
                seen = {**inputs, "input_ids": ids, "attention_mask": mask}
                logits = self(**seen, logits_to_keep=1).logits[:, -1, end - n_bins : end]
                # The flip puts bin 0 first.
                bins = logits.flip(-1).argmax(-1, keepdim=True)
            # Bin b is token id end - 1 - b.
            ids = torch.cat([ids, end - 1 - bins], 1)
            mask = torch.cat([mask, torch.ones_like(bins)], 1)
        action_ids = ids[:, inputs["input_ids"].shape[1] :]
        return detokenize_actions(end - 1 - action_ids, stats, n_bins)

    @classmethod
    def from_pretrained(cls, folder, *inputs, output_loading_info: bool = False, **kwargs):
        """As in transformers, except that every weight of the model must come from the files.

        Raises ValueError where a weight is missing in the folder's files, differs from them or is
        not finite. Only safetensors files are read.
        transformers 5.0.0 only logs a missing weight. It can also initialise a weight again after
        loading it, which changes the weight.
        """
        transformers_logging.disable_progress_bar()
        # A pickle may run code when it is opened.
        kwargs = {"use_safetensors": True, **kwargs}
        model, info = super().from_pretrained(folder, *inputs, output_loading_info=True, **kwargs)
        wrong = set(info["missing_keys"])
        for name, *_ in info["mismatched_keys"]:
            wrong.add(name)
        wrong |= weights_unlike_files(model, Path(folder))
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights are not those of its files, {min(wrong)} for example: "
                "a part is missing, or transformers has changed them"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, folder, **kwargs) -> None:
        """As in transformers, except that LoRA matrices are merged into what is written.

        A checkpoint is therefore always a whole model.
        """
        transformers_logging.disable_progress_bar()
        state = {}
        # A merged checkpoint has the names of a model without LoRA.
        for name, weight in self.state_dict().items():
            if ".lora_" not in name:
                state[name.replace(".base_layer.", ".")] = weight
        for name, layer in lora_layers(self).items():
            weight = state[f"{name}.weight"]
            # The sum is taken in float32, so a bfloat16 weight is rounded once.
            merged = weight.float() + layer.get_delta_weight("default")
            # The merged weights go to the CPU: a GPU has no room for a second model.
            state[f"{name}.weight"] = merged.to(weight.dtype).cpu()
        super().save_pretrained(folder, state_dict=state, **kwargs)

    def num_prefix(self) -> int:
        """Positions that `forward` inserts after `<s>`: patches, and proprioception (tiny)."""
        # The position embeddings of the published towers leave out class and register tokens.
        if self.config.vision_widths:
            num_patches = self.vision_backbone.pos_embed.shape[1]
        else:
            num_patches = self.vision_backbone.featurizer.pos_embed.shape[1]
        return num_patches + 1 if self.config.proprio_dim else num_patches

    def text_room(self) -> int:
        """How many tokens an instruction may have.

        It is the context without `<s>`, the inserted positions and the seven action tokens.
        """
        return self.config.text_config.max_position_embeddings - 1 - self.num_prefix() - 7


def weights_unlike_files(model: nn.Module, folder: Path) -> set[str]:
    """Names of the model's weights that differ from those in the folder's files."""
    unlike = set()
    weights = model.state_dict()
    names = ["model.safetensors"]
    if not (folder / "model.safetensors").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
    for file in [folder / name for name in names]:
        with safe_open(file, "pt") as tensors:
            for name in weights.keys() & set(tensors.keys()):
                weight = weights[name].cpu()
                written = tensors.get_tensor(name)
                # Both ends of the range are NaN where any number is.
                if not torch.stack(written.aminmax()).isfinite().all():
                    raise ValueError(f"{name} in {file.name} holds NaN or infinite numbers")
                # The model may have been loaded in another precision than that of its files.
                if not torch.equal(weight, written.to(weight.dtype)):
                    unlike.add(name)
    return unlike


# ---- LoRA ----------------------------------------------------------------------------------------
class LowRank(nn.Linear):
    """A LoRA matrix: float32 weights, multiplied in the precision of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to which `add_lora` has added matrices, by their names."""
    # Only PEFT's layers have this method.
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def add_lora(model: OpenVLAForActionPrediction, rank: int) -> None:
    """Freezes the model and adds trainable low-rank matrices to its linear layers.

    The head of the vocabulary gets none. The scale is 1 and B = 0 at the start (Hu et al. 2021).
    The matrices are float32 in every model, because bfloat16 would lose a step of 1e-4. Their
    products are in the model's precision, because float32 products cost half a pass more.
    """
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            targets.append(name)
    # The scale is lora_alpha / r.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    inject_adapter_in_model(config, model)
    for layer in lora_layers(model).values():
        # PEFT would cast the input to the float32 of the matrices.
        layer.cast_input_dtype_enabled = False
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            matrix.__class__ = LowRank
    # PEFT makes the matrices in the precision of their layer.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prepare_training(
    model: OpenVLAForActionPrediction,
    lora_rank: int,
    gradient_checkpointing: bool,
) -> list[nn.Parameter]:
    """The parameters to train: all of them, or those of LoRA if its rank is not 0.

    With gradient checkpointing a model in training mode recomputes the activations of its layers
    in the backward pass. Training and evaluation mode differ in nothing else.
    """
    if lora_rank:
        add_lora(model, lora_rank)
    elif model.dtype.itemsize < 4:
        # bfloat16 would lose a step of 5e-5.
        model.float()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def lora_off(model: OpenVLAForActionPrediction):
    """Inside this context the model is the one before `add_lora`.

    A model without LoRA does not change.
    """
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# ---- the processor -------------------------------------------------------------------------------
# Both classes have the names of the published ones.
# The Auto classes therefore choose them for a published folder, not its remote code.
class PrismaticImageProcessor(BaseImageProcessor):
    """Reads openvla-7b's `preprocessor_config.json`.

    An image is resized once, then normalised for each tower. The results are stacked as channels.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        input_sizes=((3, 128, 128),),
        means=((0.5, 0.5, 0.5),),
        stds=((0.5, 0.5, 0.5),),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_sizes = input_sizes
        self.means = means
        self.stds = stds

    def preprocess(self, images: Tensor, **kwargs) -> BatchFeature:
        """images: (B, H, W, 3) uint8 -> pixel_values (B, 3 * towers, h, w) float."""
        x = torch.as_tensor(images).movedim(-1, 1).float()
        size = tuple(self.input_sizes[0][1:])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
            # OpenVLA resizes with Pillow, which returns whole numbers from 0 to 255.
            x = x.clamp(0, 255).round()
        # The channels of a pixel stay side by side in memory, which suits convolutions.
        x = x.movedim(1, -1)[..., None, :]  # (B, h, w, 1, 3)
        mean = torch.tensor(self.means, device=x.device)
        std = torch.tensor(self.stds, device=x.device)
        # (x / 255 - mean) / std in one pass. It scales whole rows of pixels, because a loop over
        # three channels is slow.
        scale = (1 / (255 * std)).repeat(size[1], 1, 1)  # (w, towers, 3)
        offset = (-mean / std).repeat(size[1], 1, 1)
        pixels = torch.addcmul(offset, x, scale)  # (B, h, w, towers, 3)
        # Each tower has its own mean and deviation.
        pixels = pixels.flatten(3).movedim(-1, 1)
        return BatchFeature({"pixel_values": pixels})


class PrismaticProcessor(ProcessorMixin):
    """Prompt, image and proprioception -> the model's inputs."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        prompt=PUBLISHED_PROMPT,
        **kwargs,
    ):
        self.prompt = prompt
        # The same few instructions come in every batch, so their ids are kept.
        self.text_cache = {}
        super().__init__(image_processor, tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels."""
        return self.image_processor.input_sizes[0][-1]

    def prompt_ids(self, instruction: str) -> list[int]:
        """The ids of the prompt without `<s>`."""
        if instruction not in self.text_cache:
            prompt = self.prompt.format(instruction=instruction.lower())
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            space = self.tokenizer.convert_tokens_to_ids("▁")
            # The published prompt has this space before the first action token.
            if space == LLAMA_SPACE_ID and ids[-1] != space:
                ids = [*ids, space]
            self.text_cache[instruction] = ids
        return self.text_cache[instruction]

    def __call__(
        self,
        images: Tensor,
        text: list[str],
        proprio: Tensor | None = None,
        proprio_stats: dict | None = None,
        device=None,
    ) -> BatchFeature:
        """B observations -> the arguments of the model's `forward`, on `device`.

        images: (B, H, W, 3) uint8. text: B instructions. proprio: (B, proprio_dim) raw.
        proprio_stats: its lists `mean` and `std`. Without them there is no proprioception.
        Returns input_ids and attention_mask (B, L), with the padding between `<s>` and the text,
        pixel_values, and proprio, normalised and clipped to [-5, 5].
        """
        rows = [self.prompt_ids(instruction) for instruction in text]
        longest = max(map(len, rows))
        bos = self.tokenizer.bos_token_id
        pad = self.tokenizer.pad_token_id
        ids = []
        mask = []
        for row in rows:
            # Padding comes first, so every text ends right before the action tokens.
            missing = longest - len(row)
            ids.append([bos] + [pad] * missing + row)
            mask.append([1] + [0] * missing + [1] * len(row))
        inputs = BatchFeature()
        inputs["input_ids"] = torch.tensor(ids, device=device)
        inputs["attention_mask"] = torch.tensor(mask, device=device)
        inputs.update(self.image_processor.preprocess(images.to(device)))
        if proprio_stats is not None:
            # The clip bounds what the model sees of a joint far outside the demonstrations.
            mean = torch.tensor(proprio_stats["mean"], device=device)
            std = torch.tensor(proprio_stats["std"], device=device)
            inputs["proprio"] = ((proprio.to(device) - mean) / std).clamp(-5, 5)
        return inputs


class Codec:
    """Between an env and the model: observations to the model's inputs, action bins to actions."""

    def __init__(self, processor, instruction: str, stats: dict, n_bins: int, device: torch.device):
        """stats: the task's entry of `norm_stats`. instruction: the same for all observations."""
        self.processor = processor
        self.instruction = instruction
        self.stats = stats
        self.n_bins = n_bins
        self.device = device

    def inputs(self, obs: dict) -> BatchFeature:
        """The model's inputs from `rgb` (B, H, W, 3) uint8 and `proprio` (B, P)."""
        texts = [self.instruction] * len(obs["rgb"])
        proprio_stats = self.stats.get("proprio")
        return self.processor(obs["rgb"], texts, obs["proprio"], proprio_stats, self.device)

    def actions(self, bins: Tensor) -> Tensor:
        """Actions (B, A) in the env's own units from bins (B, A)."""
        return detokenize_actions(bins, self.stats["action"], self.n_bins)


def tiny_processor(
    texts: list[str],
    vocab_size: int = 512,
    image_size: int = 128,
) -> PrismaticProcessor:
    """Processor of the tiny model, with a byte-level BPE that is trained on `texts`.

    texts: the instructions. Each of their words is about one token, and any other text can be
    read too. Ids from `vocab_size` on are the action bins. image_size: pixels.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>"],
        # Bytes that no instruction contains are tokens too.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [TINY_PROMPT.format(instruction=text) for text in texts]
    tokenizer.train_from_iterator(prompts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=128,
    )
    images = PrismaticImageProcessor(input_sizes=[[3, image_size, image_size]])
    return PrismaticProcessor(images, fast, TINY_PROMPT)


# ---- registration --------------------------------------------------------------------------------
# save_pretrained copies this file beside the weights and names these classes in config.json. So the
# Auto classes load a checkpoint without this repository, with trust_remote_code=True.
OpenVLAConfig.register_for_auto_class()
OpenVLAForActionPrediction.register_for_auto_class("AutoModelForImageTextToText")
PrismaticImageProcessor.register_for_auto_class("AutoImageProcessor")
PrismaticProcessor.register_for_auto_class("AutoProcessor")
# Here the Auto classes find them by the model_type in a folder's config.json.
AutoConfig.register("openvla", OpenVLAConfig)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction)
# Without Pillow transformers has no image processors.
if is_vision_available():
    AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
