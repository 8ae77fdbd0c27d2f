"""The pictures of docs/tasks.md, as the policy sees the scenes: python benchmark/pictures.py.

Of each task there are four frames of an expert episode. One picture shows two tasks out of
distribution.
"""

import os
import sys
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from PIL import Image

from stare_utils import segment_stages
from world.assets import check_world
from world.envs import StageEnv
from world.tasks import EVAL_SEED, TASKS

# The expert of a single env plays the present stage.
RIGHT = torch.zeros(1, dtype=torch.long)
FOLDER = Path(__file__).parent.parent / "docs/tasks"
# How many frames a task has.
NUM_FRAMES = 4


def play_episode(env: StageEnv, seed: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """Frames (T) and segments (T,) of an expert episode up to its success."""
    obs, info = env.reset(seed)
    frames = []
    stages = []
    while not info["success"]:
        frames.append(obs["rgb"][0].numpy())
        stages.append(int(info["stage"]))
        obs, *_, info = env.step(env.expert_action(RIGHT))
        assert len(frames) < env.task.max_episode_steps, "this seed fails: choose another"
    return frames, segment_stages(torch.tensor(stages), env.num_stages)


def find_episode(env: StageEnv) -> tuple[list[np.ndarray], torch.Tensor]:
    """The first episode that jumps over no stage."""
    first = EVAL_SEED + 5 if env.task.grid else 5
    for seed in range(first, 2**31):
        frames, segment = play_episode(env, seed)
        if len(segment.unique()) == env.num_stages:
            return frames, segment
    raise RuntimeError("every episode jumps over a stage")


def choose_frames(frames: list[np.ndarray], segment: torch.Tensor, K: int) -> list[np.ndarray]:
    """The middle of each stage. A task with two stages has two moments of each."""
    chosen = []
    # How many stages a frame stands for.
    share = K / NUM_FRAMES
    for i in range(NUM_FRAMES):
        steps = (segment == int(i * share)).nonzero()[:, 0]
        middle = (i * share) % 1 + share / 2
        chosen.append(frames[steps[int(len(steps) * middle)]])
    return chosen


def save(path: Path, rows: list[list[np.ndarray]]) -> None:
    """Writes rows of pictures as one picture of twice their size."""
    lines = [np.concatenate(row, 1) for row in rows]
    image = Image.fromarray(np.concatenate(lines))
    size = (2 * image.width, 2 * image.height)
    image.resize(size, Image.Resampling.BICUBIC).save(path, quality=88)


def out_of_distribution(env_id: str) -> list[np.ndarray]:
    """The first frame of one episode, as trained and with each change."""
    pictures = []
    for ood in ("none", "position", "camera", "lighting"):
        env = StageEnv(env_id, 1, "cpu", 0, ood=ood)
        obs, _ = env.reset(EVAL_SEED)
        pictures.append(obs["rgb"][0].numpy())
        env.close()
    return pictures


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for env_id in TASKS:
        check_world(env_id)
        env = StageEnv(env_id, 1, "cpu", 0, terminate_on_success=False)
        frames, segment = find_episode(env)
        env.close()
        save(FOLDER / f"{env_id}.jpg", [choose_frames(frames, segment, env.num_stages)])
    shown = [out_of_distribution(env_id) for env_id in ("PickCube-v1", "StackCube-v1")]
    save(FOLDER / "ood.jpg", shown)


if __name__ == "__main__":
    main()
