"""What OpenVLA-7B's shape costs in these scripts: random weights, LoRA, gradient checkpointing, one GPU. What docs/scale.md says was measured
by it is in docs/gpu_7b.jsonl.

    python benchmark/gpu_7b.py                               # a table and gpu_7b.json
    python benchmark/gpu_7b.py --size small --batch-sizes 2  # the same lines on a CPU, to see that they run
    python benchmark/gpu_7b.py --env-id PutCarrotOnPlateInScene-v1 --num-envs 16    # and what the env takes of a step

Per batch size: milliseconds per sample of a roll-out step (`sample_action`), of a pass without gradient (`action_logprob`: the reference, TPO's first pass),
of a training pass (forward, backward, share of AdamW's step) and of preparing images; peak memory; model FLOPs utilisation; the largest gap between the
log-probabilities of roll-out and update. From these per script: sft trains once per frame; tpo rolls out, takes two passes without gradient and one with; ppo
rolls out and trains `--update-epochs` times per env step. Shares are of ppo's env step, the env's only with --env-id; images are prepared for the roll-out
and for each epoch. Utilisation counts 2 FLOPs per weight and token forward and as many backward (LoRA's weights take no more); what gradient checkpointing
computes twice counts once."""
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
import stare_utils  # before torch  # isort: skip
import torch
import tyro

import vla
from sta_ppo import ValueHead, action_logprob, ppo_loss, sample_action

TEXT = {
    "7b": dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "small": dict(vocab_size=32064, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4),
}
TOKENS = 24  # of the prompt, <s> among them


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
    overrides = None if size == "7b" else {"width": 32, "blocks": 2, "heads": 2, "mlp": 64}
    config = vla.OpenVLAConfig({**TEXT[size], "pad_token_id": 32000}, list(vla.TOWERS), vit_overrides=overrides)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = vla.OpenVLAForActionPrediction(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def measure(function, device: torch.device, repeats: int) -> tuple[float, float]:
    """Mean seconds of a call, and the peak of allocated memory in GB."""
    for i in range(repeats + 1):
        if i == 1:  # the first call allocates and compiles
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def flops(model, tokens: int) -> float:
    """Of a forward pass of one sample: 2 per weight and position, the towers' on the patches, the language model's on all; attention is left out."""
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)  # noqa: E731
    patches = model.num_prefix()
    return 2 * ((count(model.vision_backbone) + count(model.projector)) * patches + count(model.language_model.model.layers) * (patches + tokens))


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model, active = build(args.size, device), torch.tensor([True] * 7)
    params, value_head = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing), ValueHead(TEXT[args.size]["hidden_size"]).to(device)
    optimizer = torch.optim.AdamW([*params, *value_head.parameters()], lr=1e-5, fused=True)
    forward, env_ms, rows, prepare = flops(model, TOKENS + 6), 0.0, [], vla.PrismaticImageProcessor([[3, 224, 224]] * 2, [[0.5] * 3] * 2, [[0.5] * 3] * 2)
    if args.env_id:
        envs = stare_utils.make_envs(args.env_id, args.num_envs, 0, image_size=224)
        envs.reset(seed=0)
        seconds, _ = measure(lambda: envs.step(torch.zeros(args.num_envs, envs.single_action_space.shape[0])), torch.device("cpu"), 30)
        envs.close()
        env_ms = 1000 * seconds / args.num_envs
    for n in args.batch_sizes:
        inputs = {"input_ids": torch.randint(300, 31000, (n, TOKENS), device=device), "attention_mask": torch.ones(n, TOKENS, dtype=torch.long, device=device),
                  "pixel_values": torch.randn(n, 6, 224, 224, device=device)}  # fmt: skip
        advantages = torch.randn(n, device=device)
        model.eval()
        rollout_s, rollout_gb = measure(lambda: sample_action(model, inputs, active), device, args.repeats)  # noqa: B023
        bins, old, _ = sample_action(model, inputs, active)
        with torch.no_grad():
            gap = (action_logprob(model, inputs, bins, active)[0] - old).abs().max().item()
            pass_s, _ = measure(lambda: action_logprob(model, inputs, bins, active), device, args.repeats)  # noqa: B023

        def update():
            logprob, _, hidden, _ = action_logprob(model, inputs, bins, active)  # noqa: B023
            (ppo_loss(logprob - old, advantages, 0.2) + value_head(hidden).square().mean()).backward()  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()

        model.train(args.gradient_checkpointing)
        update_s, update_gb = measure(update, device, args.repeats)
        rollout, passed, trained = (1000 * s / n for s in (rollout_s, pass_s, update_s))
        images = torch.randint(256, (n, 224, 224, 3), dtype=torch.uint8)
        rest = 1000 * measure(lambda: prepare(images.to(device)), device, args.repeats)[0] / n  # noqa: B023
        rest_ms, model_ms = (1 + args.update_epochs) * rest, rollout + args.update_epochs * trained
        ppo = env_ms + rest_ms + model_ms
        rows.append({
            "batch": n, "rollout_ms": rollout, "pass_ms": passed, "train_ms": trained, "rollout_gb": rollout_gb, "train_gb": update_gb, "logprob_gap": gap,
            "mfu": 2 * forward / (trained / 1000) / (1e12 * args.peak_tflops), "env_ms": env_ms, "images_ms": rest,
            "env_share": env_ms / ppo, "model_share": model_ms / ppo, "rest_share": rest_ms / ppo, "sft_frames_per_s": 1000 / (rest + trained),
            "tpo_steps_per_s": 1000 / (env_ms + 4 * rest + rollout + 2 * passed + trained), "ppo_steps_per_s": 1000 / ppo,
        })  # fmt: skip
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    out = Path(args.output)
    out.with_name(out.name + ".tmp").write_text(json.dumps({"args": asdict(args), "device": name, "torch": torch.__version__, "rows": rows}, indent=1))
    out.with_name(out.name + ".tmp").rename(out)
    print(f"{name}; wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
