"""How often the scripted expert succeeds on unseen seeds, within the registered horizon.

    python benchmark/expert.py
        all tasks
    python benchmark/expert.py --env-id PickCube-v1 --ood position
        what can be solved at all out of distribution

A row also has the mean length of a success, and two medians per stage: the distance at its first
entry, and the steps of a success in it. L_k and Tbar_k in TASKS come from them. No images are
drawn. SimplerEnv's tasks play each initial configuration of their grid once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import tyro

from stare_utils import segment_steps
from world.tasks import EVAL_SEED, TASKS, UserError, env_ids
from world.vector import ScriptedExpert, make_envs

ROOT = Path(__file__).parent.parent


def play_round(envs, expert: ScriptedExpert, seed: int) -> list[dict]:
    """One episode in each env: whether it succeeds, when, and the distances at stage entries."""
    horizon = envs.task.max_episode_steps
    episodes = []
    for _ in range(envs.num_envs):
        episodes.append({"success": False, "length": horizon, "entry": {}, "stages": []})
    _, info = envs.reset(seed=seed)
    for t in range(1, horizon + 1):
        for i, episode in enumerate(episodes):
            stage = int(info["stage"][i])
            episode["entry"].setdefault(stage, float(info["stage_distance"][i]))
            episode["stages"].append(stage)
        *_, info = envs.step(expert.act())
        # After the horizon's last step the infos are those of the next episode.
        info = info.get("final_info", info)
        for episode, success in zip(episodes, info["success"].tolist(), strict=True):
            if success and not episode["success"]:
                episode["success"] = True
                episode["length"] = t
        if all(episode["success"] for episode in episodes):
            break
    return episodes


def entry_distances(stages: tuple[str, ...], episodes: list[dict]) -> dict[str, float]:
    """Per stage the median distance at its first entry, in metres or radians."""
    medians = {}
    for k, name in enumerate(stages):
        found = [episode["entry"][k] for episode in episodes if k in episode["entry"]]
        medians[name] = round(float(np.median(found)), 3)
    return medians


def stage_steps(stages: tuple[str, ...], episodes: list[dict]) -> dict[str, float]:
    """Per stage the median number of steps of a success in it: its segment's length."""
    lengths = []
    for episode in episodes:
        if episode["success"]:
            labels = torch.tensor(episode["stages"][: episode["length"]])
            lengths.append([len(steps) for steps in segment_steps(labels, len(stages))])
    medians = np.median(lengths, axis=0)
    return {name: float(steps) for name, steps in zip(stages, medians, strict=True)}


def git_commit() -> str:
    """The commit of this repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def measure(env_id: str, num_episodes: int, num_envs: int, seed: int, ood: str) -> dict:
    """The row of one task."""
    task = TASKS[env_id]
    if task.grid:
        num_episodes = task.grid
        seed = EVAL_SEED
    envs = make_envs(env_id, num_envs, seed, terminate_on_success=False, render=False, ood=ood)
    expert = ScriptedExpert(envs)
    episodes = []
    while len(episodes) < num_episodes:
        episodes += play_round(envs, expert, seed + len(episodes))
    envs.close()
    # The last round may play more episodes than are left.
    episodes = episodes[:num_episodes]
    solved = [episode["length"] for episode in episodes if episode["success"]]
    return {
        "method": "expert",
        "env_id": env_id,
        "ood": ood,
        "first_seed": seed,
        "num_episodes": num_episodes,
        "success_once": np.mean([episode["success"] for episode in episodes]),
        "mean_length": round(np.mean(solved), 1),
        "max_episode_steps": task.max_episode_steps,
        "entry_distance": entry_distances(task.stages, episodes),
        "stage_steps": stage_steps(task.stages, episodes),
        "commit": git_commit(),
    }


def main(
    env_id: str = ",".join(TASKS),
    num_episodes: int = 200,
    num_envs: int = 8,
    seed: int = 800_000_000,
    ood: str = "none",
    output: str = "",
) -> None:
    """Prints a row per task. output: a file to which each row is appended."""
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
