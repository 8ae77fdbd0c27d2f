"""Env steps per second with random actions, images included: light and original meshes, one process and several.
   python benchmark/frame_rate.py --num-envs 1 8"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import stare_utils  # before torch  # isort: skip
import torch
import tyro


def main(env_id: str = "PickCube-v1", num_envs: tuple[int, ...] = (1, 8), num_steps: int = 800) -> None:
    for full_meshes in (False, True):
        for n in num_envs:
            envs = stare_utils.make_envs(env_id, n, 0, full_meshes=full_meshes)
            envs.reset(seed=0)
            start, rounds = time.time(), num_steps // n
            for _ in range(rounds):
                envs.step(2 * torch.rand(n, envs.single_action_space.shape[0]) - 1)
            print(f"{'original' if full_meshes else 'light':8s} meshes, {n} processes: {rounds * n / (time.time() - start):.0f} env steps/s", flush=True)
            envs.close()


if __name__ == "__main__":
    tyro.cli(main)
