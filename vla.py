"""The VLA as HuggingFace knows it: OpenVLA's architecture, its processor, and actions <-> tokens. No environment, no algorithm.

One class serves two configurations: openvla-7b's published layout (DINOv2 + SigLIP towers, Llama-2; `from_pretrained` reads its
folder as it is, with the published parameter names) and the tiny default (`tiny_config`: a convolutional tower and a three-layer
Llama, about 1 M parameters, trained from scratch by `sft.py`). Import this module and the Auto classes know both.

Letters: B batch, L text tokens, P image patches, A action tokens, D hidden width, V vocabulary.
Sequence: `<s>`, P patches, one proprioception token (tiny only), text, action tokens. Action bin b is token id V_text - 1 - b.
Architecture: openvla/openvla@c8f03f4 (prismatic/extern/hf) and timm's ViT names; written anew.
"""
import contextlib
import functools
import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
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
from transformers.utils import logging as transformers_logging

Tensor = torch.Tensor
torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on a GPU too: roll-out and update must give the same log-probabilities

# timm ids of the published towers -> width, blocks, heads, MLP width, patch, prefix tokens, LayerScale
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16, 4096, 14, 5, True),
    "vit_so400m_patch14_siglip_224": (1152, 27, 16, 4304, 14, 0, False),
}


# ---------------------------------------------------------------------------------------------------------------------
# Actions <-> tokens
# ---------------------------------------------------------------------------------------------------------------------
def constant_dims(stats: dict) -> Tensor:
    """(A,) bool: dimensions that never vary in the demonstrations. They decode to q01 whatever the token says, so no loss counts them."""
    return torch.tensor(stats["q99"]) - torch.tensor(stats["q01"]) < 1e-6


def tokenize_actions(actions: Tensor, stats: dict, n_bins: int = 256) -> Tensor:
    """Actions (N, A) in the env's units -> bins (N, A) long in 0..n_bins-1.

    stats: the `action` entry of `norm_stats`: lists `q01`, `q99` and (optional) `mask`. Where mask is true, [q01, q99] maps to
    [-1, 1]; where it is false the action is taken as it is. Values outside are clipped. Binning as OpenVLA's ActionTokenizer:
    n_bins edges over [-1, 1]; a dimension with q99 - q01 < 1e-6 gets bin n_bins // 2.
    """
    q01, q99, mask = (torch.tensor(x, device=actions.device) for x in (stats["q01"], stats["q99"], stats.get("mask", [True] * len(stats["q01"]))))
    constant = q99 - q01 < 1e-6
    scaled = torch.where(mask, 2 * (actions - q01) / torch.where(constant, 1.0, q99 - q01) - 1, actions).clamp(-1, 1)
    bins = ((scaled + 1) * (n_bins - 1) / 2).floor().long().clamp(0, n_bins - 1)
    return torch.where(constant, n_bins // 2, bins)


def detokenize_actions(tokens: Tensor, stats: dict, n_bins: int = 256) -> Tensor:
    """Bins (N, A) -> actions (N, A) float in the env's units: bin b decodes to the centre of interval min(b, n_bins - 2),
    which is 1 or -1 by its sign where `binary` (optional, of `signed_gripper`) is true."""
    q01, q99, mask = (torch.tensor(x, device=tokens.device) for x in (stats["q01"], stats["q99"], stats.get("mask", [True] * len(stats["q01"]))))
    scaled = (2 * tokens.clamp(0, n_bins - 2).float() + 1) / (n_bins - 1) - 1
    actions = torch.where(mask, (scaled + 1) / 2 * (q99 - q01) + q01, scaled)
    actions = torch.where(torch.tensor(stats.get("binary", [False] * len(q01)), device=tokens.device), 2.0 * (actions > 0) - 1, actions)
    return torch.where(q99 - q01 < 1e-6, q01, actions).float()


def blur_bins(bins: Tensor, deviation: float, n_bins: int, generator: torch.Generator) -> Tensor:
    """Bins (N, A) long, each moved by Gaussian noise of `deviation` bins: a soft target. Noise is reflected at the outermost bins; clamped there, half of
    such a label would lie in one bin, at deviation 4 five times the peak of any other label, and argmax would take the end where it is the less likely."""
    last, noise = n_bins - 1, deviation * torch.randn(bins.shape, generator=generator)
    return (last - (last - (bins + noise.round().long()).abs()).abs()).clamp(min=0)


def signed_gripper(stats: dict) -> dict:
    """Action statistics of OpenVLA's data for an env whose gripper command runs from -1 to 1: published ones leave the gripper unscaled (mask false),
    0 closed and 1 open. So token value x decodes to 1 above 0.5, else to -1, as RL4VLA and SimplerEnv take it. Its proprioception, of other robots, is
    left out."""
    action = stats["action"]
    mask = action.get("mask", [True] * len(action["q01"]))
    rows = [(low, high, True) if scaled else (-3.0, 1.0, True) for low, high, scaled in zip(action["q01"], action["q99"], mask)]
    return {"action": {**dict(zip(("q01", "q99", "mask"), map(list, zip(*rows)))), "binary": action.get("binary", [not scaled for scaled in mask])}}


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------
class OpenVLAConfig(PreTrainedConfig):
    """openvla-7b's `config.json`, plus what the tiny model needs. `timm_model_ids` names the published towers; `vision_widths`, when
    given, replaces them by a convolutional tower of these widths. `vit_overrides` shrinks the ViTs for tests (width, blocks, heads, MLP)."""

    model_type = "openvla"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self, text_config=None, timm_model_ids=(), image_sizes=(224, 224), n_action_bins=256, norm_stats=None, pad_to_multiple_of=64,
        vision_widths=None, vit_overrides=None, proprio_dim=0, **kwargs,
    ):  # fmt: skip
        text_config = dict(text_config.to_dict() if isinstance(text_config, LlamaConfig) else text_config or {})
        text_config.pop("model_type", None)
        self.text_config = LlamaConfig(**text_config)
        self.timm_model_ids, self.image_sizes, self.n_action_bins = list(timm_model_ids), list(image_sizes), n_action_bins
        self.norm_stats, self.pad_to_multiple_of = norm_stats or {}, pad_to_multiple_of
        self.vision_widths, self.vit_overrides, self.proprio_dim = vision_widths, vit_overrides, proprio_dim
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def action_id_end(self) -> int:
        """Bin b is token id `action_id_end - 1 - b`: the last ids of the vocabulary without its padding."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


def tiny_config(vocab_size: int = 768, image_size: int = 128, width: int = 128, layers: int = 3) -> OpenVLAConfig:
    """The default, trained from scratch. 16 image tokens keep a training sample near 3 ms on two CPU cores; a stem of small
    convolutions localises a cube three times better than one patch projection of equal cost."""
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=352 * width // 128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return OpenVLAConfig(text.to_dict(), image_sizes=[image_size] * 2, pad_to_multiple_of=0, vision_widths=[32, 64, 128, 128], proprio_dim=8)


# ---------------------------------------------------------------------------------------------------------------------
# Vision
# ---------------------------------------------------------------------------------------------------------------------
class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, P, width / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    def __init__(self, width: int, heads: int, hidden: int, scale: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width, hidden)
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if scale else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """One published tower under timm's parameter names. Returns what OpenVLA uses: the patches after the second-to-last block;
    the last block and norm exist for their names only. (B, 3, H, W) -> (B, P, width)."""

    def __init__(self, timm_id: str, image_size: int, overrides: dict | None):
        super().__init__()
        width, blocks, heads, hidden, patch, self.prefix, scale = TOWERS[timm_id]
        if overrides:
            width, blocks, heads, hidden = (overrides[name] for name in ("width", "blocks", "heads", "mlp"))
        self.width, self.patch_embed = width, PatchEmbed(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, width))
        if self.prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, self.prefix - 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, scale) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        if self.prefix:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, self.prefix :]


class TwoTowers(nn.Module):
    """DINOv2 and SigLIP side by side. (B, 6, H, W), the first three channels normalised for DINOv2 -> (B, P, sum of widths)."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        dino, siglip = config.timm_model_ids
        self.featurizer = ViT(dino, config.image_sizes[0], config.vit_overrides)
        self.fused_featurizer = ViT(siglip, config.image_sizes[1], config.vit_overrides)
        self.width = self.featurizer.width + self.fused_featurizer.width

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])], -1)


class ConvTower(nn.Module):
    """The tiny tower: an 8x8 convolution of stride 4, then 3x3 ones of stride 2. (B, 3, 128, 128) -> (B, 16, width)."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        widths = config.vision_widths
        convs = [nn.Conv2d(3, widths[0], 8, 4, padding=2), nn.GELU()]
        for before, after in zip(widths, widths[1:], strict=False):
            convs += [nn.Conv2d(before, after, 3, 2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.stem, self.width = nn.Sequential(*convs), widths[-1]
        side = config.image_sizes[0] // (4 * 2 ** (len(widths) - 1))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, self.width))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.stem(pixels).flatten(2).transpose(1, 2) + self.pos_embed


class Projector(nn.Module):
    """Patches into the language model's width: three layers behind the fused towers, two behind the tiny one."""

    def __init__(self, vision: int, text: int, fused: bool):
        super().__init__()
        hidden = 4 * vision if fused else text
        self.fc1, self.fc2 = nn.Linear(vision, hidden), nn.Linear(hidden, text)
        self.fc3 = nn.Linear(text, text) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return self.fc3(F.gelu(x)) if self.fc3 else x


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class OpenVLAOutput(ModelOutput):
    logits: Tensor | None = None
    """(B, kept positions, V)"""
    last_hidden_state: Tensor | None = None
    """(B, kept positions, D)"""
    past_key_values: object | None = None


class OpenVLAForActionPrediction(PreTrainedModel):
    config_class = OpenVLAConfig
    base_model_prefix = ""
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"\.attn_pool\."]

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        fused = not config.vision_widths
        self.vision_backbone = TwoTowers(config) if fused else ConvTower(config)
        self.projector = Projector(self.vision_backbone.width, config.text_config.hidden_size, fused)
        self.language_model = LlamaForCausalLM(config.text_config)
        if config.proprio_dim:
            self.proprio_projector = Projector(config.proprio_dim, config.text_config.hidden_size, False)
        self.post_init()

    def _init_weights(self, module):
        """PyTorch's own initialisation for all but the language model, which initialises itself (normal(0.02)). Only for models made from a configuration."""

    def init_action_rows(self) -> None:
        """Makes neighbouring bins alike from the start: the 256 action rows of embedding and head become smooth functions of the bin,
        row_k = 0.1 cos(pi t k) / (1 + k / 8), t in [0, 1]. Cross-entropy does not know that bin 130 is next to 131; this tells it."""
        n, end = self.config.n_action_bins, self.config.action_id_end
        k = torch.arange(self.config.text_config.hidden_size)
        rows = 0.1 * torch.cos(math.pi * torch.linspace(0, 1, n)[:, None] * k) / (1 + k / 8)
        for table in (self.language_model.get_input_embeddings(), self.language_model.get_output_embeddings()):
            table.weight.data[end - n : end] = rows.flip(0)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None, proprio: Tensor | None = None,
        past_key_values=None, use_cache: bool = False, logits_to_keep: int = 0,
    ) -> OpenVLAOutput:  # fmt: skip
        """One pass over `<s>`, patches, text (and action tokens, where they stand in `input_ids`).

        input_ids, attention_mask: (B, L), `<s>` first, padding between `<s>` and the text; pixel_values: (B, C, H, W); proprio: (B, proprio_dim).
        Returns logits (B, L + P, V) at every position, or at the last `logits_to_keep`. With past_key_values: input_ids (B, n) are the next
        tokens, attention_mask covers the whole sequence so far (see `sample_action` in the scripts).
        """
        embeds = self.language_model.get_input_embeddings()(input_ids)
        mask = attention_mask
        if past_key_values is None:
            middle = [self.projector(self.vision_backbone(pixel_values.to(embeds.dtype)))]
            if self.config.proprio_dim:
                middle.append(self.proprio_projector(proprio.to(embeds.dtype))[:, None])
            middle = torch.cat(middle, 1)
            embeds = torch.cat([embeds[:, :1], middle, embeds[:, 1:]], 1)
            mask = torch.cat([mask[:, :1], mask.new_ones(middle.shape[:2]), mask[:, 1:]], 1)
        positions = (mask.cumsum(-1) - 1)[:, -embeds.shape[1] :]
        hidden = self.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=past_key_values, use_cache=use_cache
        )
        kept = hidden.last_hidden_state[:, -logits_to_keep:]  # -0: all of them
        return OpenVLAOutput(logits=self.language_model.lm_head(kept), last_hidden_state=kept, past_key_values=hidden.past_key_values)

    @classmethod
    def from_pretrained(cls, folder, *inputs, output_loading_info: bool = False, **kwargs):
        """As ever, but ValueError unless each weight of the model is in the folder's files and is what they hold: transformers 5.0.0 loads other
        values where it initialises what it has loaded, and a missing one is only logged."""
        transformers_logging.disable_progress_bar()
        model, info = super().from_pretrained(folder, *inputs, output_loading_info=True, **kwargs)
        wrong, weights = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}, model.state_dict()
        for file in Path(folder).glob("model*.safetensors"):
            with safe_open(file, "pt") as tensors:
                held = {name: weights[name] for name in tensors.keys() if name in weights}
                wrong |= {name for name, weight in held.items() if not torch.equal(weight.cpu(), tensors.get_tensor(name).to(weight.dtype))}
        if wrong:
            raise ValueError(f"{len(wrong)} weights are not those of its files, {min(wrong)} for example: a part is missing, or transformers has changed them")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, folder, **kwargs) -> None:
        """As ever, but LoRA matrices (`add_lora`) are merged into what is written: a checkpoint is always a whole model."""
        transformers_logging.disable_progress_bar()
        state = {name.replace(".base_layer.", "."): value for name, value in self.state_dict().items() if ".lora_" not in name}
        for name, module in self.named_modules():
            if isinstance(module, LoraLayer):
                weight = state[f"{name}.weight"]  # of bfloat16 the sum is rounded once
                state[f"{name}.weight"] = (weight.float() + module.get_delta_weight("default")).to(weight.dtype).cpu()  # a GPU has no room for a second model
        super().save_pretrained(folder, state_dict=state, **kwargs)

    def num_prefix(self) -> int:
        """Positions that `forward` inserts after `<s>`: patches and, in the tiny model, proprioception."""
        patches = self.vision_backbone.pos_embed if self.config.vision_widths else self.vision_backbone.featurizer.pos_embed
        return patches.shape[1] + bool(self.config.proprio_dim)

    def text_room(self) -> int:
        """How many tokens an instruction may have: the context without `<s>`, the inserted positions and the seven action tokens."""
        return self.config.text_config.max_position_embeddings - 1 - self.num_prefix() - 7


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers to which `add_lora` has added matrices."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class LowRank(nn.Linear):
    """A LoRA matrix: float32 weights, multiplied in the precision of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(model: OpenVLAForActionPrediction, rank: int) -> None:
    """Freezes the model and adds trainable low-rank matrices (Hu et al. 2021; scale 1, B = 0 at the start) to every linear layer but the vocabulary's head.
    They are float32 whatever the model is: a step of 1e-4 is lost in bfloat16. What they compute is not: float32 products cost half a pass more."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.endswith("lm_head")]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), model)
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            matrix.__class__ = LowRank
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data


def prepare_training(model: OpenVLAForActionPrediction, lora_rank: int, gradient_checkpointing: bool) -> list[nn.Parameter]:
    """The parameters to train: all of them, or LoRA's where its rank is not 0. With gradient checkpointing a layer's activations are computed anew in
    the backward pass of a model in training mode, which differs from evaluation mode in nothing else."""
    if lora_rank:
        add_lora(model, lora_rank)
    elif model.dtype.itemsize < 4:
        model.float()  # a step of 5e-5 is lost in bfloat16
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def lora_off(model: OpenVLAForActionPrediction):
    """Inside, the model is the one that `add_lora` was called on. Without LoRA nothing changes."""
    layers = lora_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------
class PrismaticImageProcessor(BaseImageProcessor):
    """Reads openvla-7b's `preprocessor_config.json`: one resize, then one normalisation per tower, stacked on the channel axis. This class and the
    next have the names of the published ones, so that the Auto classes take them for a published folder instead of its remote code."""

    model_input_names = ["pixel_values"]

    def __init__(self, input_sizes=((3, 128, 128),), means=((0.5, 0.5, 0.5),), stds=((0.5, 0.5, 0.5),), **kwargs):
        super().__init__(**kwargs)
        self.input_sizes, self.means, self.stds = input_sizes, means, stds

    def preprocess(self, images: Tensor, **kwargs) -> BatchFeature:
        """images: (B, H, W, 3) uint8 -> pixel_values (B, 3 * towers, h, w) float."""
        x = torch.as_tensor(images).movedim(-1, 1).float()
        size = tuple(self.input_sizes[0][1:])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255).round()
        mean, std = (torch.tensor(values, device=x.device).view(-1, 3, 1, 1) for values in (self.means, self.stds))
        return BatchFeature({"pixel_values": ((x[:, None] / 255 - mean) / std).flatten(1, 2)})


class PrismaticProcessor(ProcessorMixin):
    """Prompt, image and proprioception -> the model's inputs."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, prompt="In: What action should the robot take to {instruction}?\nOut: ", **kwargs):
        self.prompt, self.text_cache = prompt, {}
        super().__init__(image_processor, tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels."""
        return self.image_processor.input_sizes[0][-1]

    def prompt_ids(self, instruction: str) -> list[int]:
        """The prompt's ids without `<s>`. Llama's published prompt ends in token 29871, the space before the first action token."""
        if instruction not in self.text_cache:
            ids = self.tokenizer(self.prompt.format(instruction=instruction.lower()), add_special_tokens=False)["input_ids"]
            space = self.tokenizer.convert_tokens_to_ids("▁")
            if space == 29871 and ids[-1] != space:
                ids = [*ids, space]
            self.text_cache[instruction] = ids
        return self.text_cache[instruction]

    def __call__(self, images: Tensor, text: list[str], proprio: Tensor | None = None, proprio_stats: dict | None = None, device=None) -> BatchFeature:
        """images (B, H, W, 3) uint8, B instructions, proprio (B, P) raw with its `mean` and `std` -> input_ids, attention_mask (B, L) with
        the padding between `<s>` and the text, pixel_values, and proprio normalised and clipped to [-5, 5]."""
        rows = [self.prompt_ids(t) for t in text]
        longest = max(map(len, rows))
        ids = [[self.tokenizer.bos_token_id] + [self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[1] + [0] * (longest - len(row)) + [1] * len(row) for row in rows]
        inputs = BatchFeature({"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)})
        inputs.update(self.image_processor.preprocess(images.to(device)))
        if proprio_stats is not None:
            mean, std = (torch.tensor(proprio_stats[name], device=device) for name in ("mean", "std"))
            inputs["proprio"] = ((proprio.to(device) - mean) / std).clamp(-5, 5)
        return inputs


def tiny_processor(texts: list[str], vocab_size: int = 512, image_size: int = 128) -> PrismaticProcessor:
    """Processor of the tiny model: byte-level BPE trained on `texts` (the instructions), so that each of their words is about one token
    and any other text is still readable. Ids from `vocab_size` on are the action bins."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    prompt = "{instruction}: "
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([prompt.format(instruction=text) for text in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=128)
    return PrismaticProcessor(PrismaticImageProcessor(input_sizes=[[3, image_size, image_size]]), fast, prompt)


def model_folder(name: str) -> Path:
    """The folder that holds a model: a folder, the checkpoint/ in a run's folder, or, where no folder `owner` is here, the hub's model `owner/name`,
    downloaded once. What the hub does not have, or is out of reach, stays a folder that does not exist."""
    folder = Path(name)
    if not folder.parent.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", name):
        with contextlib.suppress(Exception):  # of the hub, or of any layer of the network below it
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    return folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder


def check_folder(folder: Path, origin: str = "") -> None:
    """Raises ValueError where a folder holds no model, one of another kind, one whose files have changed since they were written, or another one than
    that whose fingerprint is `origin`."""
    if not (folder / "config.json").is_file():
        raise ValueError("no checkpoint at that place: give the folder that a script here wrote, an OpenVLA's, or its hub id (merge a LoRA adapter first)")
    if damaged := damage(folder):
        raise ValueError(f"damaged: {damaged}; a run keeps the checkpoint before this one beside it, as checkpoint.old")
    if origin and origin != fingerprint(folder):
        raise ValueError("another policy is there now than the one that this run began from: put that back, or choose another --output-dir")
    config = dict(json.loads((folder / "config.json").read_text()))
    if config.get("model_type") != "openvla":
        raise ValueError(f"a {config.get('model_type')!r} model; these scripts train model_type 'openvla' (see vla.py)")
    for name, stats in (config.get("norm_stats") or {}).items():
        rows = [stats["action"]["q01"], stats["action"]["q99"], stats["action"].get("mask", stats["action"]["q01"])]
        width = config.get("proprio_dim")
        if width and "proprio" in stats:
            rows += [stats["proprio"]["mean"], stats["proprio"]["std"]]
        if len({len(row) for row in rows[:3]}) > 1 or any(len(row) != width for row in rows[3:]) or not torch.tensor(sum(rows, [])).isfinite().all():
            raise ValueError(f"norm_stats of {name} in config.json: lists of different lengths, or numbers that are none")


def load_separator(folder: Path, env_id: str, device: torch.device) -> tuple[Path, nn.Linear] | None:
    """The learned separator of a policy: the folder of the SFT checkpoint that it came from, and the linear map from that model's hidden state (B, D)
    to the stages' logits (B, most stages of its tasks). Follows the chain of checkpoints back to sft.py's. None where there is none for this task."""
    try:
        for _ in range(9):  # policies before this one; no chain is longer
            if not (folder / "separator.safetensors").exists():
                folder = model_folder(json.loads((folder / "args.json").read_text())["checkpoint"])
        weights = load_file(folder / "separator.safetensors", device=str(device))
        separator = nn.Linear(*reversed(weights["weight"].shape)).to(device).requires_grad_(False)
        separator.load_state_dict(weights)
        return (folder, separator) if env_id in json.loads((folder / "args.json").read_text())["env_id"].split(",") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError):
        return None


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in a folder."""
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "checksums.json":
            with open(file, "rb") as content:
                sums[file.name] = functools.reduce(lambda crc, block: zlib.crc32(block, crc), iter(lambda: content.read(2**24), b""), 0)
    return sums


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from others that were at the same place; "" where it has no checksums, as published models."""
    file = folder / "checksums.json"
    return f"{zlib.crc32(file.read_bytes()):08x}" if file.exists() else ""


def damage(folder: Path) -> str:
    """Names the files of a checkpoint that are not as they were written, by its checksums.json; "" where all are, or there is none."""
    try:
        written = dict(json.loads((folder / "checksums.json").read_text()))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError):
        return "checksums.json"
    now = checksums(folder)
    return ", ".join(name for name in written if now.get(name) != written[name])


def recover(run: Path) -> None:
    """Puts a run's checkpoint.old back in the place of its checkpoint where that is missing or damaged."""
    if (run / "checkpoint.old").exists() and (not (run / "checkpoint").exists() or damage(run / "checkpoint")):
        print(f"{run / 'checkpoint'} is missing or damaged: going on from the one before")
        shutil.rmtree(run / "checkpoint", ignore_errors=True)
        (run / "checkpoint.old").rename(run / "checkpoint")


def write_state(folder: Path, state: dict, moments: dict[int, dict[str, Tensor]], adapted: nn.Module | None) -> None:
    """What a run needs beside its model to go on, as training_state.safetensors: `state` as JSON, an optimiser's moments by the parameter's number, and
    the LoRA matrices of `adapted`. Then checksums.json of the whole folder. Nothing in it has to be unpickled."""
    tensors = {f"moments/{i}/{name}": x.contiguous() for i, row in moments.items() for name, x in row.items()}
    tensors |= {f"adapter//{name}": p.detach().contiguous() for name, p in (adapted.named_parameters() if adapted else ()) if p.requires_grad}
    save_file(tensors, folder / "training_state.safetensors", {"state": json.dumps(state)})
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))


def read_state(folder: Path) -> dict:
    """What write_state has written: the entries of `state`, `moments` and `adapter`; {"damaged": why} where that cannot be read."""
    try:
        if damaged := damage(folder):
            return {"damaged": f"damaged ({damaged})"}
        with safe_open(folder / "training_state.safetensors", "pt") as file:
            state = {**json.loads(file.metadata()["state"]), "moments": {}, "adapter": {}}
            for key in file.keys():  # noqa: SIM118
                kind, i, name = key.split("/")
                (state["moments"].setdefault(int(i), {}) if kind == "moments" else state["adapter"])[name] = file.get_tensor(key)
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return {"damaged": f"without a training state ({error})"}


AutoConfig.register("openvla", OpenVLAConfig)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction)
AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
