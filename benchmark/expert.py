"""The scripted expert on unseen seeds: success within the registered horizon, mean length, and the median stage distance at each stage's
first entry, which is where L_k in TASKS comes from.   python benchmark/expert.py --env-id PickCube-v1 --num-episodes 200"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import tyro

from stare_utils import ScriptedExpert, make_envs


def main(env_id: str = "PickCube-v1", num_episodes: int = 200, num_envs: int = 8, seed: int = 700_000_000) -> None:
    envs = make_envs(env_id, num_envs, seed, terminate_on_success=False)
    expert, rows, K = ScriptedExpert(envs), [], envs.num_stages
    while len(rows) < num_episodes:
        _, info = envs.reset(seed=seed + len(rows))
        batch = [{"success": False, "length": envs.task.max_episode_steps, "entry": {}} for _ in range(num_envs)]
        for t in range(envs.task.max_episode_steps - 1):
            for row, stage, distance in zip(batch, info["stage"].tolist(), info["stage_distance"].tolist(), strict=True):
                row["entry"].setdefault(stage, distance)
                if t and stage == K and not row["success"]:  # the reset state is nobody's success
                    row["success"], row["length"] = True, t
            if all(row["success"] for row in batch):
                break
            _, _, _, _, info = envs.step(expert.act())
        rows += batch[: num_episodes - len(rows)]
    envs.close()
    lengths = {name: float(np.median([row["entry"][k] for row in rows if k in row["entry"]])) for k, name in enumerate(envs.task.stages[:K])}
    print(json.dumps({"env_id": env_id, "num_episodes": num_episodes, "success": np.mean([row["success"] for row in rows]),
                      "mean_length": np.mean([row["length"] for row in rows]), "median_entry_distance": lengths}, indent=1))  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
