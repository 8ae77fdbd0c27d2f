"""What OpenVLA-7B's shape costs in these scripts: random weights, LoRA, one GPU.

    python benchmark/gpu_7b.py
        a table and gpu_7b.json
    python benchmark/gpu_7b.py --size small --batch-sizes 2
        the same lines on a CPU, to see that they run
    python benchmark/gpu_7b.py --env-id PutCarrotOnPlateInScene-v1 --num-envs 16
        also what the env takes of a step

docs/scale.md gives its figures, whose rows are in docs/gpu_7b.jsonl. A row of batch size B has
`rollout_ms`, `pass_ms`, `train_ms`, `images_ms`: milliseconds per sample of a roll-out step, of a
    pass without gradient, of a training pass and of preparing an image;
`rollout_gb`, `train_gb`: the peak memory of roll-out and training;
`mfu`: the model FLOPs utilisation of a training pass;
`logprob_gap`: the largest gap between the log-probabilities of roll-out and update;
`env_ms`: milliseconds per env step, 0 without --env-id;
`..._share`: shares of an env step of sta_ppo.py;
`..._per_s`: frames or env steps per second of each script.

A training pass is forward, backward and a share of AdamW's step. sft.py trains once per frame.
sta_tpo.py rolls out, takes two passes without gradient, and one training pass. sta_ppo.py rolls
out and trains `--update-epochs` times per env step. It prepares images for the roll-out and for
each epoch. Utilisation counts 2 FLOPs per weight and token forward, and as many backward, because
LoRA's weights take no more. What gradient checkpointing computes twice counts once.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import tyro

import vla
from sta_ppo import ValueHead, action_logprob, ppo_loss, sample_action
from world.vector import make_envs

TEXT = {
    "7b": {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "small": {
        "vocab_size": 32064,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
# Tokens of the prompt, <s> among them.
TOKENS = 24


@dataclass
class Args:
    size: Literal["7b", "small"] = "7b"
    """OpenVLA-7B's shape, or a small one of the same parts"""
    batch_sizes: tuple[int, ...] = (1, 8, 16, 32)
    """samples of a roll-out step and of a training pass (--chunk-size)"""
    lora_rank: int = 32
    """0 trains all weights"""
    gradient_checkpointing: bool = True
    """as in the scripts"""
    update_epochs: int = 1
    """passes over a roll-out of ppo"""
    repeats: int = 3
    """of each measurement, after one that is not counted; the mean is reported"""
    peak_tflops: float = 989.0
    """of the device in bfloat16: 989 of an H100 or H200"""
    env_id: str = ""
    """also measure the env step of this task"""
    num_envs: int = 8
    """env processes for that"""
    output: str = "gpu_7b.json"
    """where the rows go"""


def build(size: str, device: torch.device) -> vla.OpenVLAForActionPrediction:
    """The model in bfloat16 with PyTorch's own initialisation."""
    overrides = None
    if size == "small":
        overrides = {"width": 32, "blocks": 2, "heads": 2, "mlp": 64}
    text = {**TEXT[size], "pad_token_id": 32000}
    config = vla.OpenVLAConfig(text, list(vla.TOWERS), vit_overrides=overrides)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = vla.OpenVLAForActionPrediction(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def measure(function: Callable, device: torch.device, repeats: int) -> tuple[float, float]:
    """Mean seconds of a call, and the peak of allocated memory in GB."""
    on_gpu = device.type == "cuda"
    # The first call allocates and compiles, so it is not counted.
    function()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return seconds, peak


def num_weights(module: torch.nn.Module) -> int:
    """How many weights a module has, without LoRA's."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)


def flops(model: vla.OpenVLAForActionPrediction, tokens: int) -> float:
    """FLOPs of a forward pass of one sample: 2 per weight and position, without attention.

    The towers' positions are the patches. The language model's are patches and tokens.
    """
    patches = model.num_prefix()
    vision = num_weights(model.vision_backbone) + num_weights(model.projector)
    language = num_weights(model.language_model.model.layers)
    return 2 * (vision * patches + language * (patches + tokens))


def env_step_ms(args: Args) -> float:
    """Milliseconds per env step, images included. 0 without --env-id."""
    if not args.env_id:
        return 0.0
    envs = make_envs(args.env_id, args.num_envs, 0, image_size=224)
    envs.reset(seed=0)
    action = torch.zeros(args.num_envs, envs.single_action_space.shape[0])
    seconds, _ = measure(lambda: envs.step(action), torch.device("cpu"), 30)
    envs.close()
    return 1000 * seconds / args.num_envs


class Trainer:
    """The model with what its update needs: the value head and the optimiser."""

    def __init__(self, args: Args, device: torch.device):
        self.checkpointing = args.gradient_checkpointing
        self.repeats = args.repeats
        self.device = device
        self.model = build(args.size, device)
        self.active = torch.tensor([True] * 7)
        params = vla.prepare_training(self.model, args.lora_rank, args.gradient_checkpointing)
        self.value_head = ValueHead(TEXT[args.size]["hidden_size"]).to(device)
        trained = [*params, *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        means = [[0.5] * 3] * 2
        self.prepare = vla.PrismaticImageProcessor([[3, 224, 224]] * 2, means, means)

    def update(self, inputs: dict, bins, old_logprob, advantages) -> None:
        """One optimiser step of PPO over a batch."""
        logprob, _, hidden, _ = action_logprob(self.model, inputs, bins, self.active)
        pg_loss = ppo_loss(logprob - old_logprob, advantages, 0.2)
        clock = torch.zeros(len(hidden), device=hidden.device)
        (pg_loss + self.value_head(hidden, clock).square().mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, B: int) -> dict:
        """The measured entries of the row of batch size B."""
        model = self.model
        device = self.device
        repeats = self.repeats
        inputs = {
            "input_ids": torch.randint(300, 31000, (B, TOKENS), device=device),
            "attention_mask": torch.ones(B, TOKENS, dtype=torch.long, device=device),
            "pixel_values": torch.randn(B, 6, 224, 224, device=device),
        }
        advantages = torch.randn(B, device=device)
        model.eval()
        rollout_s, rollout_gb = measure(
            lambda: sample_action(model, inputs, self.active), device, repeats
        )
        bins, old, _ = sample_action(model, inputs, self.active)
        with torch.no_grad():
            logprob, *_ = action_logprob(model, inputs, bins, self.active)
            pass_s, _ = measure(
                lambda: action_logprob(model, inputs, bins, self.active), device, repeats
            )
        model.train(self.checkpointing)
        train_s, train_gb = measure(
            lambda: self.update(inputs, bins, old, advantages), device, repeats
        )
        images = torch.randint(256, (B, 224, 224, 3), dtype=torch.uint8)
        images_s, _ = measure(lambda: self.prepare(images.to(device)), device, repeats)
        return {
            "batch": B,
            "rollout_ms": 1000 * rollout_s / B,
            "pass_ms": 1000 * pass_s / B,
            "train_ms": 1000 * train_s / B,
            "rollout_gb": rollout_gb,
            "train_gb": train_gb,
            "logprob_gap": (logprob - old).abs().max().item(),
            "images_ms": 1000 * images_s / B,
        }


def complete(row: dict, args: Args, env_ms: float, forward: float) -> dict:
    """A measured row with what follows from it. forward: FLOPs of a sample's forward pass."""
    rollout = row["rollout_ms"]
    train = row["train_ms"]
    images = row.pop("images_ms")
    images_ms = (1 + args.update_epochs) * images
    model_ms = rollout + args.update_epochs * train
    ppo_ms = env_ms + images_ms + model_ms
    tpo_ms = env_ms + 4 * images + rollout + 2 * row["pass_ms"] + train
    return {
        **row,
        "mfu": 2 * forward / (train / 1000) / (1e12 * args.peak_tflops),
        "env_ms": env_ms,
        "images_ms": images,
        "env_share": env_ms / ppo_ms,
        "model_share": model_ms / ppo_ms,
        "rest_share": images_ms / ppo_ms,
        "sft_frames_per_s": 1000 / (images + train),
        "tpo_steps_per_s": 1000 / tpo_ms,
        "ppo_steps_per_s": 1000 / ppo_ms,
    }


def print_table(rows: list[dict]) -> None:
    """Prints the rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    trainer = Trainer(args, device)
    # The last action token is fed to no one.
    forward = flops(trainer.model, TOKENS + 6)
    env_ms = env_step_ms(args)
    rows = []
    for B in args.batch_sizes:
        rows.append(complete(trainer.measure(B), args, env_ms, forward))
    print_table(rows)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {"args": asdict(args), "device": name, "torch": torch.__version__, "rows": rows}
    output = Path(args.output)
    # The file is renamed when it is complete.
    new = output.with_name(output.name + ".tmp")
    new.write_text(json.dumps(result, indent=1))
    new.rename(output)
    print(f"{name}; wrote {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
