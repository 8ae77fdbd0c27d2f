"""The scripted expert on unseen seeds: success within the registered horizon, mean length, and the median stage distance at each stage's first
entry, which is where L_k in TASKS comes from. No images are drawn. SimplerEnv's tasks: each initial configuration of the grid once.

    python benchmark/expert.py                                         # all tasks
    python benchmark/expert.py --env-id PickCube-v1 --ood position     # what of it can be solved at all out of distribution
"""
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import tyro

from stare_utils import EVAL_SEED, TASKS, ScriptedExpert, UserError, env_ids, make_envs

ROOT = Path(__file__).parent.parent


def measure(env_id: str, num_episodes: int, num_envs: int, seed: int, ood: str) -> dict:
    """The row of one task."""
    task, rows = TASKS[env_id], []
    num_episodes, seed = (task.grid, EVAL_SEED) if task.grid else (num_episodes, seed)
    envs = make_envs(env_id, num_envs, seed, terminate_on_success=False, render=False, ood=ood)
    expert = ScriptedExpert(envs)
    while len(rows) < num_episodes:
        _, info = envs.reset(seed=seed + len(rows))
        batch = [{"success": False, "length": task.max_episode_steps, "entry": {}} for _ in range(num_envs)]
        for t in range(1, task.max_episode_steps + 1):
            for row, stage, distance in zip(batch, info["stage"].tolist(), info["stage_distance"].tolist(), strict=True):
                row["entry"].setdefault(stage, distance)
            *_, info = envs.step(expert.act())
            info = info.get("final_info", info)  # the horizon's last step
            for row, success in zip(batch, info["success"].tolist(), strict=True):
                if success and not row["success"]:
                    row["success"], row["length"] = True, t
            if all(row["success"] for row in batch):
                break
        rows += batch[: num_episodes - len(rows)]
    envs.close()
    entry = {name: round(float(np.median([row["entry"][k] for row in rows if k in row["entry"]])), 3) for k, name in enumerate(task.stages)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {"method": "expert", "env_id": env_id, "ood": ood, "first_seed": seed, "num_episodes": num_episodes,
            "success_once": np.mean([row["success"] for row in rows]), "mean_length": round(np.mean([row["length"] for row in rows if row["success"]]), 1),
            "max_episode_steps": task.max_episode_steps, "entry_distance": entry, "commit": commit}  # fmt: skip


def main(env_id: str = ",".join(TASKS), num_episodes: int = 200, num_envs: int = 8, seed: int = 800_000_000, ood: str = "none", output: str = "") -> None:
    """output: a file to which each task's row is appended."""
    for name in env_ids(env_id):
        row = json.dumps(measure(name, num_episodes, num_envs, seed, ood))
        print(row, flush=True)
        if output:
            with open(output, "a") as file:
                file.write(row + "\n")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"error: {error}")
