"""docs/ipi.webp, the picture of README: the same episodes after imitation and after IPI.

    python benchmark/ipi_picture.py --before checkpoints/PickCube-v1__sft --after runs/...

The episodes are the first ones of the evaluation seed, not chosen. Each frame shows what the policy
sees, with the stage, the potential Phi and success written on it by eval.py.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sta_ppo.py
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

from eval import play_episodes
from plumbing.checkpoint import load_policy, task_stats
from plumbing.run import Progress, one_line_errors
from world.tasks import get_task
from world.vector import make_envs

STRIP = 22  # pixels: height of a row's label


@dataclass
class Args:
    before: str = "checkpoints/PickCube-v1__sft"
    """the policy after imitation"""
    after: str = ""
    """the policy after imitation, preference and interaction"""
    env_id: str = "PickCube-v1"
    """task"""
    num_episodes: int = 5
    """episodes, side by side"""
    seed: int = 0
    """as of eval.py: which evaluation episodes"""
    output: str = "docs/ipi.webp"
    """where the picture goes"""


def films(checkpoint: str, args: Args) -> list[list[np.ndarray]]:
    """The frames (H, W, 3) of each episode that a policy plays."""
    model, processor, _ = load_policy(checkpoint, torch.device("cpu"))
    task = get_task(args.env_id)
    stats = task_stats(model, args.env_id)
    envs = make_envs(args.env_id, args.num_episodes, 0, terminate_on_success=False)
    episodes = play_episodes(
        model,
        processor,
        stats,
        envs,
        args.num_episodes,
        args.seed,
        texts=(task.instruction,),
        separator=None,
        film=True,
        progress=Progress(total=args.num_episodes, desc=checkpoint, unit="episode"),
    )
    envs.close()
    solved = sum(episode.row["success_once"] for episode in episodes)
    print(f"{checkpoint}: {solved} of {len(episodes)} solved")
    return [episode.film for episode in episodes]


def labelled(row: np.ndarray, label: str) -> np.ndarray:
    """A row of frames (H, W, 3) with a strip above it that says which policy plays."""
    strip = Image.new("RGB", (row.shape[1], STRIP), "white")
    ImageDraw.Draw(strip).text((6, 4), label, fill="black", font_size=14)
    return np.concatenate([np.asarray(strip), row])


def main(args: Args) -> None:
    rows = {
        "after imitation": films(args.before, args),
        "after imitation, preference and interaction (IPI)": films(args.after, args),
    }
    frames = []
    for t in range(len(rows["after imitation"][0])):
        parts = []
        for label, episodes in rows.items():
            row = np.concatenate([film[t] for film in episodes], 1)
            parts.append(labelled(row, label))
        frames.append(Image.fromarray(np.concatenate(parts)))
    durations = [100] * len(frames)
    # The last frame stays for a while before the film starts again.
    durations[-1] = 2000
    first, *others = frames
    first.save(
        args.output, save_all=True, append_images=others, duration=durations, loop=0, quality=50
    )
    megabytes = Path(args.output).stat().st_size / 2**20
    print(f"wrote {args.output}, {megabytes:.1f} MB")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
