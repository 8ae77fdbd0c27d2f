"""The pictures of docs/tasks.md: of each task four frames of an expert episode, as the policy sees them, and one scene out of distribution.

    python benchmark/pictures.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from PIL import Image

from stare_utils import EVAL_SEED, TASKS, StageEnv, check_world, segment_stages

ROOT, RIGHT = Path(__file__).parent.parent, torch.zeros(1, dtype=torch.long)


def episode(env, seed: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """Frames (T) and segments (T,) of an expert episode up to its success."""
    obs, infos = env.reset(seed)
    frames, stages = [], []
    while not infos["success"]:
        frames.append(obs["rgb"][0].numpy())
        stages.append(int(infos["stage"]))
        obs, *_, infos = env.step(env.expert_action(RIGHT))
        assert len(frames) < env.task.max_episode_steps, "this seed fails: choose another"
    return frames, segment_stages(torch.tensor(stages), env.num_stages)


def save(path: Path, rows: list[list[np.ndarray]]) -> None:
    image = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC).save(path, quality=88)


def main() -> None:
    folder = ROOT / "docs/tasks"
    folder.mkdir(exist_ok=True)
    for env_id, task in TASKS.items():
        check_world(env_id)
        env = StageEnv(env_id, 1, "cpu", 0, terminate_on_success=False)
        for seed in range(EVAL_SEED + 5 if task.grid else 5, 2**31):
            frames, segment = episode(env, seed)
            if len(segment.unique()) == env.num_stages:  # no stage jumped over
                break
        env.close()
        shown, share = [], env.num_stages / 4
        for i in range(4):  # the middle of each stage; of a task with two stages two moments each
            steps = (segment == int(i * share)).nonzero()[:, 0]
            shown.append(frames[steps[int(len(steps) * ((i * share) % 1 + share / 2))]])
        save(folder / f"{env_id}.jpg", [shown])
    kinds, rows = ("none", "position", "camera", "lighting"), []
    for env_id in ("PickCube-v1", "StackCube-v1"):
        envs = [StageEnv(env_id, 1, "cpu", 0, ood=ood) for ood in kinds]
        rows.append([env.reset(EVAL_SEED)[0]["rgb"][0].numpy() for env in envs])
    save(folder / "ood.jpg", rows)


if __name__ == "__main__":
    main()
