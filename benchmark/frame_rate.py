"""Env steps per second with random actions, images included.

    python benchmark/frame_rate.py --num-envs 1 8

It compares light and original meshes, in one process and in several.
"""

import os
import sys
import time
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import tyro

from world.vector import make_envs


def steps_per_second(env_id: str, num_envs: int, num_steps: int, full_meshes: bool) -> float:
    """Env steps per second of `num_envs` processes together, over about `num_steps` steps."""
    envs = make_envs(env_id, num_envs, 0, full_meshes=full_meshes)
    width = envs.single_action_space.shape[0]
    rounds = num_steps // num_envs
    envs.reset(seed=0)
    start = time.time()
    for _ in range(rounds):
        envs.step(2 * torch.rand(num_envs, width) - 1)
    seconds = time.time() - start
    envs.close()
    return rounds * num_envs / seconds


def main(
    env_id: str = "PickCube-v1", num_envs: tuple[int, ...] = (1, 8), num_steps: int = 800
) -> None:
    """Prints a line for each kind of mesh and number of processes."""
    for full_meshes in (False, True):
        meshes = "original" if full_meshes else "light"
        for n in num_envs:
            rate = steps_per_second(env_id, n, num_steps, full_meshes)
            print(f"{meshes:8s} meshes, {n} processes: {rate:.0f} env steps/s", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
