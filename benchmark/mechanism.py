"""Do the stage signals say what they should? Three tables of docs/tables.md, from the roll-outs that STA-TPO samples and from PPO's curves.

    python benchmark/mechanism.py                                # writes the tables anew from docs/mechanism.jsonl and docs/results.jsonl
    python benchmark/mechanism.py runs/*__sta-tpo__*__paper      # first adds these runs' rows: give all training seeds of a task at once

A row is a stage of a task (and budget), over all roll-outs that entered it: the correlation (Pearson) of the stage's cost with the roll-out's success, of
the cost as the paper's mean over the segment and as its sum; at the entry into the stage how often Phi falls, and by how much on average, bare (phi_k) and
as here (k + phi_k); the pairs as sta_tpo.py builds them with the run's own settings, by reason, and of those won by cost the steps of the winner's and
of the loser's segment. Per task: the deviation of the advantages while the critic is new, and the explained variance at the end."""
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from paper_table import DOCS, between, merge, order, task_name

from sta_tpo import build_stage_pairs, read_rollouts, segment_rows
from stare_utils import get_task, segment_stages, stage_potential


def correlation(a: list[float], b: list[float]) -> float | None:
    return round(float(np.corrcoef(a, b)[0, 1]), 3) if len(a) > 2 and np.std(a) and np.std(b) else None


def stage_row(k: int, K: int, runs: list[tuple[list[dict], list[dict]]]) -> dict:
    """A stage's row from (roll-outs, pairs) of each run."""
    means, sums, success, falls = [], [], [], []  # falls: (bare, offset) changes of Phi at the entry
    for rollout in (rollout for rollouts, _ in runs for rollout in rollouts):
        segment = segment_stages(rollout["stage"], K)
        if (mine := segment == k).any():
            costs = rollout["distance"][mine]
            means.append(float(costs.mean()))
            sums.append(float(costs.sum()))
            success.append(float(rollout["success"]))
            if t := int(mine.float().argmax()):
                phi = stage_potential(rollout["distance"][t - 1 : t + 1], torch.tensor(1.0))
                falls.append((float(phi[1] - phi[0]), float(phi[1] - phi[0] + k - segment[t - 1])))
    pairs = [(pair, rollouts) for rollouts, built in runs for pair in built if pair["stage"] == k]
    by_cost = [[len(segment_rows(rollouts[pair[side]], k, K, stage_aware=True)) for side in ("chosen", "rejected")]
               for pair, rollouts in pairs if pair["reason"] == "cost"]  # fmt: skip
    mean = lambda values: round(float(np.mean(values)), 3) if len(values) else None  # noqa: E731
    return {"rollouts": len(means), "corr_mean": correlation(means, success), "corr_sum": correlation(sums, success),
            "bare": [mean([bare < 0 for bare, _ in falls]), mean([bare for bare, _ in falls])],
            "offset": [mean([offset < 0 for _, offset in falls]), mean([offset for _, offset in falls])],
            "completed": len(pairs) - len(by_cost), "cost": len(by_cost), "won": mean([won for won, _ in by_cost]),
            "lost": mean([lost for _, lost in by_cost]), "slower": mean([won > lost for won, lost in by_cost])}  # fmt: skip


def rows_of(runs: list[str]) -> list[dict]:
    found, out = defaultdict(list), []
    for run in map(Path, runs):
        args = json.loads((run / "checkpoint/args.json").read_text())
        rollouts, K = read_rollouts(sorted((run / "rollouts").glob("[!t]*.npz"))), len(get_task(args["env_id"]).stages)
        pairs = build_stage_pairs(rollouts, K, args["cost_margin"], args["max_pairs_per_stage"], cost_sum=args["cost_sum"])
        found[args["env_id"], run.name.split("__")[3]].append((rollouts, pairs))
    for (env_id, budget), seeds in found.items():
        task, names = env_id + f", {budget}" * (budget != "paper"), get_task(env_id).stages
        out += [{"task": task, "k": k, "stage": name, "seeds": len(seeds), **stage_row(k, len(names), seeds)} for k, name in enumerate(names)]
    return out


def curve_rows() -> list[str]:
    rows, curves, out = [json.loads(line) for line in (DOCS / "results.jsonl").read_text().splitlines()], defaultdict(list), []
    for row in rows:
        method, _, budget = row["method"].partition("@")
        if method in ("PPO", "PPO-dense", "STA-PPO") and "curve" in row:
            curves[task_name(row["env_id"], budget), method].append(row["curve"])
    for task, method in sorted(curves, key=lambda key: (order(key[0]), key[1])):
        seeds = curves[task, method]
        early = np.mean([[update[4] for update in curve[:2]] for curve in seeds])
        late, explained = (np.mean([[update[i] for update in curve[-3:]] for curve in seeds]) for i in (4, 3))
        out.append(f"| {task} | {method} | {len(seeds)} | {early:.3f} | {late:.3f} | {explained:.2f} |")
    return out


def text(form: str, *values: float | None) -> str:
    return "-" if None in values else form.format(*values).replace("%", " %")


def cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def main(runs: list[str]) -> None:
    rows = sorted(merge(DOCS / "mechanism.jsonl", rows_of(runs), "task", "k"), key=lambda row: (order(row["task"]), row["k"]))
    entry = "phi_k at its entry: falls, mean change | k + phi_k: the same"
    lines = [f"| task | stage | training seeds | roll-outs in it | corr(mean cost, success) | corr(sum, success) | {entry} |", "|---" * 8 + "|"]
    lines += [cells(row["task"], row["stage"], row["seeds"], row["rollouts"], text("{:+.2f}", row["corr_mean"]), text("{:+.2f}", row["corr_sum"]),
                    text("{:.0%}, {:+.2f}", *row["bare"]), text("{:.0%}, {:+.2f}", *row["offset"])) for row in rows]  # fmt: skip
    lines += ["", "| task | stage | pairs won by completion | by cost | of these: steps of the winner, of the loser | winner slower |", "|---" * 6 + "|"]
    lines += [cells(row["task"], row["stage"], row["completed"], row["cost"], text("{:.1f}, {:.1f}", row["won"], row["lost"]), text("{:.0%}", row["slower"]))
              for row in rows if row["completed"] is not None]  # fmt: skip
    lines += ["", "| task | method | seeds | deviation of the advantages, updates 1, 2 | last 3 | explained variance, last 3 |", "|---" * 6 + "|"]
    between(DOCS / "tables.md", "mechanism", "\n".join([*lines, *curve_rows()]))


if __name__ == "__main__":
    main(sys.argv[1:])
