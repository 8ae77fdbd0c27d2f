"""checkpoints/base: the tiny model after it has learned to see. `sft.py --vla base` starts from it.

    python benchmark/base.py        # about an hour on two CPU cores

Frames of finished tasks are kept in runs/base, 5.4 GB in all. After a stop the unfinished task and
the training begin again.

OpenVLA begins with towers that have seen millions of pictures. The tiny model from scratch has seen
none, and 100 demonstrations show it 100 places of a cube. Here it sees frames of all tasks in which
the scripted expert plays wildly: wrong stages, large noise, a turned tool. It learns where object
and goal are, by the auxiliary loss of sft.py. No action is recorded, and none is learned.
Letters: M frames of a task, B batch.
"""

import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sta_ppo.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from transformers import set_seed

import vla
from benchmark.ship import ship
from plumbing.checkpoint import read_settings, save_checkpoint
from plumbing.run import Progress, one_line_errors
from world.assets import IMAGE_SIZE, choose_renderer
from world.demos import ClumsyExpert
from world.tasks import TASKS, TRAIN_SEEDS, UserError, env_ids
from world.vector import ScriptedExpert, make_envs

# What is kept of a frame: its shape and its type.
FIELDS = {
    "rgb": ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
    "proprio": ((8,), np.float32),
    "geometry": ((8,), np.float32),
}


@dataclass
class Args:
    env_id: str = ""
    """tasks with commas between them; empty: all"""
    output: str = "checkpoints/base"
    """folder of the model"""
    frames: str = "runs/base"
    """folder of the frames. Those that are there are used again, whatever the seed"""
    num_frames: int = 10000
    """frames of each task. The last twentieth is held out"""
    num_updates: int = 8000
    """optimiser steps"""
    learning_rate: float = 1e-3
    """AdamW, peak of the schedule, as in sft.py"""
    batch_size: int = 64
    """frames per optimiser step"""
    image_shift: int = 4
    """as in sft.py"""
    seed: int = 11
    """seed of the frames and of the training. The demonstrations of sft.py have other seeds"""


# ---- frames ----
def play(folder: Path, env_id: str, args: Args) -> None:
    """Records the frames of one task into folder/env_id, one .npy file for each of FIELDS."""
    N = 8
    # Short episodes show many places of the objects.
    envs = make_envs(env_id, N, args.seed, max_episode_steps=16)
    rng = np.random.default_rng(args.seed)
    # Every other env plays wrong stages most of the time. The others reach the last stage.
    slip = np.where(np.arange(N) % 2, 0.02, 0.3)
    mistakes = {"speed": 1, "noise": 0.5, "slip": slip, "pause": 0, "twist": 6}
    expert = ClumsyExpert(ScriptedExpert(envs), rng, **mistakes)
    new = folder / f"{env_id}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    arrays = {}
    for name, (shape, dtype) in FIELDS.items():
        shape = (args.num_frames, *shape)
        arrays[name] = np.lib.format.open_memmap(new / f"{name}.npy", "w+", dtype, shape)
    progress = Progress(total=args.num_frames, desc=f"play {env_id}", unit="frame")
    obs, info = envs.reset(seed=[int(seed) for seed in rng.integers(TRAIN_SEEDS, size=N)])
    for first in range(0, args.num_frames, N):
        for name, array in arrays.items():
            rows = {**info, **obs}[name]
            array[first : first + N] = rows[: args.num_frames - first].cpu()
        action, _ = expert.act(info["elapsed_steps"].cpu())
        obs, _, _, _, info = envs.step(action)
        for i in info["_final_info"].nonzero()[:, 0].tolist():
            expert.begin_episode(i)
        progress.update(min(N, args.num_frames - first))
    progress.close()
    envs.close()
    # The folder gets its name last, so it is whole or not there.
    new.rename(folder / env_id)


class Frames:
    """The frames of all tasks, on disk. Frame i of task k is row k M + i."""

    def __init__(self, folder: Path, ids: list[str], M: int):
        """M: frames of each task. Raises UserError where a task has another number."""
        self.M = M
        self.arrays = []
        for env_id in ids:
            files = {name: folder / env_id / f"{name}.npy" for name in FIELDS}
            arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
            if len(arrays["rgb"]) != M:
                raise UserError(
                    f"{folder / env_id} has {len(arrays['rgb'])} frames, not {M}: "
                    "give another --frames"
                )
            self.arrays.append(arrays)
        proprio = np.concatenate([arrays["proprio"] for arrays in self.arrays])
        self.stats = {
            "mean": proprio.mean(0).tolist(),
            "std": proprio.std(0).clip(min=1e-3).tolist(),
        }

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Rows (B, ...) of one of FIELDS."""
        found = [self.arrays[i // self.M][name][i % self.M] for i in index.tolist()]
        return torch.from_numpy(np.stack(found))


# ---- training ----
class Reader:
    """The model with its linear read-out of the geometry."""

    def __init__(self, args: Args, frames: Frames, ids: list[str]):
        self.frames = frames
        self.words = [TASKS[env_id].instruction for env_id in ids]
        self.model = vla.OpenVLAForActionPrediction(vla.tiny_config())
        self.model.init_action_rows()
        # The same tokenizer as in sft.py.
        self.processor = vla.tiny_processor([task.instruction for task in TASKS.values()])
        self.head = torch.nn.Linear(self.model.config.text_config.hidden_size, 8)
        weights = vla.prepare_training(self.model, lora_rank=0, gradient_checkpointing=False)
        self.params = [*weights, *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )

    def loss(self, index: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Smooth L1 distances (B, 8) of the read-out, in units of 10 cm. shift: (B, 2) pixels."""
        rgb = vla.shift_images(self.frames.rows("rgb", index), shift)
        words = [self.words[i // self.frames.M] for i in index.tolist()]
        proprio = self.frames.rows("proprio", index)
        inputs = self.processor(rgb, words, proprio, self.frames.stats, torch.device("cpu"))
        hidden = self.model(**inputs, logits_to_keep=1).last_hidden_state[:, 0]
        geometry = self.frames.rows("geometry", index) / 0.1
        return F.smooth_l1_loss(self.head(hidden.float()), geometry, reduction="none")

    @torch.no_grad()
    def held_out(self, index: torch.Tensor) -> list[float]:
        """The mean loss of each task on frames that were not trained on."""
        losses = []
        for part in index.split(256):
            still = torch.zeros(len(part), 2, dtype=torch.long)
            losses.append(self.loss(part, still).mean(1))
        task = index // self.frames.M
        losses = torch.cat(losses)
        return [losses[task == k].mean().item() for k in range(len(self.words))]

    def save(self, args: Args, seconds: float) -> None:
        """Writes the model. It knows no task's actions, only what proprioception looks like."""
        # One number that never moves: nobody can act with it.
        nothing = {"q01": [0.0], "q99": [0.0], "mask": [True]}
        self.model.config.norm_stats = {"base": {"action": nothing, "proprio": self.frames.stats}}
        output = Path(args.output)
        work = output.with_name(f"{output.name}.run")
        settings = {**asdict(args), "method": "base", "wall_s": round(seconds, 1)}
        # Without env_id, save_checkpoint writes no model card.
        del settings["env_id"]
        save_checkpoint(work, self.model, self.processor, settings, {"script": "base"})
        ship(work / "checkpoint", output)
        shutil.rmtree(work)


def main(args: Args) -> None:
    choose_renderer("auto")
    ids = env_ids(args.env_id or ",".join(TASKS))
    output = Path(args.output)
    if output.exists() and read_settings(output).get("script") != "base":
        raise UserError(f"{output} is no base model: give another --output")
    folder = Path(args.frames)
    for env_id in ids:
        if not (folder / env_id).exists():
            play(folder, env_id, args)
    M = args.num_frames
    frames = Frames(folder, ids, M)
    # Neighbouring frames are of one episode, so the held-out ones are the last.
    rows = torch.arange(len(ids) * M)
    train = rows[rows % M < 0.95 * M]
    test = rows[rows % M >= 0.95 * M]

    set_seed(args.seed)
    reader = Reader(args, frames, ids)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.time()
    losses = []
    progress = Progress(total=args.num_updates, desc="base", unit="update")
    for step in range(args.num_updates):
        warmup = (step + 1) / 100
        cosine = 0.5 * (1 + np.cos(np.pi * step / args.num_updates))
        reader.optimizer.param_groups[0]["lr"] = args.learning_rate * min(warmup, cosine)
        drawn = torch.randint(len(train), (args.batch_size,), generator=generator)
        most = args.image_shift
        shift = torch.randint(-most, most + 1, (args.batch_size, 2), generator=generator)
        loss = reader.loss(train[drawn], shift).mean()
        reader.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.params, 1.0)
        reader.optimizer.step()
        losses.append(loss.item())
        progress.update()
        if (step + 1) % 1000 == 0 or step + 1 == args.num_updates:
            found = reader.held_out(test)
            tasks = ", ".join(f"{env_id} {x:.4f}" for env_id, x in zip(ids, found))
            print(f"update {step + 1}: loss {np.mean(losses):.4f}, held out: {tasks}", flush=True)
            losses = []
    progress.close()
    reader.save(args, time.time() - start)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
