"""Do the stage signals say what they should? Two tables of docs/results.md, from roll-outs of the SFT policies and from PPO's curves.

    python benchmark/mechanism.py runs/*__sta-tpo__*__paper      # run folders of sta_tpo.py with their roll-outs

Per task and stage over all roll-outs that entered it: the correlation (Pearson) of the stage's cost with the roll-out's success, of the cost as the
paper's mean over the segment and as its sum; at the entry into the stage: how often Phi falls, and by how much on average, bare (phi_k) and as here
(k + phi_k). Per task: the deviation of the advantages while the critic is new, from docs/results.jsonl, and the explained variance at the end."""
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from paper_table import DOCS, between

from stare_utils import get_task, segment_stages, stage_potential


def read(runs: list[Path]) -> dict[str, list[dict]]:
    """Stage, distance and success of all roll-outs, by task."""
    found = defaultdict(list)
    for run in runs:
        for file in sorted((run / "rollouts").glob("[!t]*.npz")):
            rollout = np.load(file)
            found[run.name.split("__")[0]].append({name: torch.from_numpy(rollout[name]) for name in ("stage", "distance", "success")})
    return found


def correlation(a: list[float], b: list[float]) -> str:
    return f"{np.corrcoef(a, b)[0, 1]:+.2f}" if len(a) > 2 and np.std(a) and np.std(b) else "-"


def stage_rows(env_id: str, rollouts: list[dict]) -> list[str]:
    names, rows = get_task(env_id).stages, []
    for k, name in enumerate(names):
        means, sums, success, steps = [], [], [], []  # steps: (bare, offset) changes of Phi at the entry
        for rollout in rollouts:
            segment = segment_stages(rollout["stage"], len(names))
            if (mine := segment == k).any():
                costs = rollout["distance"][mine]
                means.append(float(costs.mean()))
                sums.append(float(costs.sum()))
                success.append(float(rollout["success"]))
                if t := int(mine.float().argmax()):
                    phi = stage_potential(rollout["distance"][t - 1 : t + 1], torch.tensor(1.0))
                    steps.append((float(phi[1] - phi[0]), float(phi[1] - phi[0] + segment[t] - segment[t - 1])))
        falls = [f"{100 * np.mean(np.array(x) < 0):.0f} %, {np.mean(x):+.2f}" for x in zip(*steps)] or ["-", "-"]
        rows.append(f"| {env_id} | {name} | {len(means)} | {correlation(means, success)} | {correlation(sums, success)} | {' | '.join(falls)} |")
    return rows


def curve_rows() -> list[str]:
    rows = [json.loads(line) for line in (DOCS / "results.jsonl").read_text().splitlines()]
    out = []
    for env_id in sorted({row["env_id"] for row in rows}):
        for method in ("PPO", "PPO-dense", "STA-PPO"):
            if curves := [row["curve"] for row in rows if (row["env_id"], row["method"]) == (env_id, method) and "curve" in row]:
                early = np.mean([[update[4] for update in curve[:2]] for curve in curves])
                late, explained = (np.mean([[update[i] for update in curve[-3:]] for curve in curves]) for i in (4, 3))
                out.append(f"| {env_id} | {method} | {len(curves)} | {early:.3f} | {late:.3f} | {explained:.2f} |")
    return out


def main(runs: list[str]) -> None:
    head = "| task | stage | roll-outs in it | corr(mean cost, success) | corr(sum, success) | phi_k at its entry: falls, mean change | k + phi_k: the same |"
    lines = [head, "|---" * 7 + "|"]
    for env_id, rollouts in read([Path(run) for run in runs]).items():
        lines += stage_rows(env_id, rollouts)
    lines += ["", "| task | method | seeds | deviation of the advantages, updates 1, 2 | last 3 | explained variance, last 3 |", "|---" * 6 + "|"]
    between(DOCS / "results.md", "mechanism", "\n".join([*lines, *curve_rows()]))


if __name__ == "__main__":
    main(sys.argv[1:])
