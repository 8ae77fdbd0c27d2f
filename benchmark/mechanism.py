"""Do the stage signals say what they should? Three tables of docs/tables.md.

    python benchmark/mechanism.py
        writes the tables again, from docs/mechanism.jsonl and docs/results.jsonl
    python benchmark/mechanism.py runs/*__sta-tpo__*__paper
        first adds these runs' rows: give all training seeds of a task at once

A row is a stage of a task (and budget), over all of STA-TPO's roll-outs that entered it:
- the correlation (Pearson) of the stage's cost with the roll-out's success. The cost is the
  paper's mean over the segment, or its sum;
- how often Phi falls at the entry into the stage, and its mean change there. Phi is bare (phi_k),
  or as here (k + phi_k);
- the pairs as sta_tpo.py builds them with the run's own settings, by reason;
- the steps of the winner's and of the loser's segment, in the pairs won by cost.
Per task, from PPO's curves: the deviation of the advantages while the critic is new, and the
explained variance at the end.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from paper_table import DOCS, between, merge, order, task_name

from sta_tpo import build_stage_pairs, read_rollouts
from stare_utils import segment_stages, segment_steps, stage_potential
from world.tasks import get_task

# The roll-outs of a run, and the pairs between them.
Sample = tuple[list[dict], list[dict]]
# Places in an update of a curve, see paper_table.py.
EXPLAINED = 3
DEVIATION = 4

STAGE_HEADER = (
    "| task | stage | training seeds | roll-outs in it | corr(mean cost, success) | "
    "corr(sum, success) | phi_k at its entry: falls, mean change | k + phi_k: the same |"
)
PAIR_HEADER = (
    "| task | stage | pairs won by completion | by cost | "
    "of these: steps of the winner, of the loser | winner slower |"
)
CURVE_HEADER = (
    "| task | method | seeds | deviation of the advantages, updates 1, 2 | last 3 | "
    "explained variance, last 3 |"
)


# ---- rows ----
def mean(values: list) -> float | None:
    """The mean, None where there is nothing."""
    return round(float(np.mean(values)), 3) if values else None


def correlation(a: list[float], b: list[float]) -> float | None:
    """Pearson's, None where it has no meaning."""
    if len(a) < 3 or not np.std(a) or not np.std(b):
        return None
    return round(float(np.corrcoef(a, b)[0, 1]), 3)


def entry_change(rollout: dict, first: int, k: int, K: int) -> tuple[float, float]:
    """How Phi changes at the entry into stage k in step `first`: bare, and with the offset."""
    phi = stage_potential(rollout["distance"][first - 1 : first + 1], torch.tensor(1.0))
    left = segment_stages(rollout["stage"], K)[first - 1]
    change = phi[1] - phi[0]
    return float(change), float(change + k - left)


def stage_row(k: int, K: int, runs: list[Sample]) -> dict:
    """A stage's row."""
    means = []
    sums = []
    success = []
    changes = []
    for rollout in [rollout for rollouts, _ in runs for rollout in rollouts]:
        steps = segment_steps(rollout["stage"], K)[k]
        if not len(steps):
            continue
        costs = rollout["distance"][steps]
        means.append(float(costs.mean()))
        sums.append(float(costs.sum()))
        success.append(float(rollout["success"]))
        # A roll-out that begins in the stage has no entry into it.
        if steps[0] > 0:
            changes.append(entry_change(rollout, int(steps[0]), k, K))
    bare = [change for change, _ in changes]
    offset = [change for _, change in changes]
    return {
        "rollouts": len(means),
        "corr_mean": correlation(means, success),
        "corr_sum": correlation(sums, success),
        "bare": [mean([change < 0 for change in bare]), mean(bare)],
        "offset": [mean([change < 0 for change in offset]), mean(offset)],
        **pair_columns(k, K, runs),
    }


def pair_columns(k: int, K: int, runs: list[Sample]) -> dict:
    """The columns of a stage's row that are about its pairs."""
    completed = 0
    won = []
    lost = []
    for rollouts, pairs in runs:
        for pair in [pair for pair in pairs if pair["stage"] == k]:
            if pair["reason"] != "cost":
                completed += 1
                continue
            won.append(len(segment_steps(rollouts[pair["chosen"]]["stage"], K)[k]))
            lost.append(len(segment_steps(rollouts[pair["rejected"]]["stage"], K)[k]))
    return {
        "completed": completed,
        "cost": len(won),
        "won": mean(won),
        "lost": mean(lost),
        "slower": mean([a > b for a, b in zip(won, lost)]),
    }


def cost_of(settings: dict) -> str:
    """The cost of a run's pairs. settings: its args.json. Old runs have a flag for the sum."""
    if "cost" in settings:
        return settings["cost"]
    return "sum" if settings["cost_sum"] else "mean"


def sample_of(run: Path, settings: dict) -> Sample:
    """The roll-outs of a run, and the pairs that sta_tpo.py builds of them."""
    # Names that begin with tmp_ are of unfinished files.
    rollouts = read_rollouts(sorted((run / "rollouts").glob("[!t]*.npz")))
    pairs = build_stage_pairs(
        rollouts,
        len(get_task(settings["env_id"]).stages),
        settings["cost_margin"],
        settings["max_pairs_per_stage"],
        cost=cost_of(settings),
    )
    return rollouts, pairs


def rows_of(runs: list[str]) -> list[dict]:
    """The rows of runs, per task and budget."""
    found = defaultdict(list)
    for run in map(Path, runs):
        settings = json.loads((run / "checkpoint/args.json").read_text())
        budget = run.name.split("__")[3]
        # The paper's budget has no name in the tables.
        task = task_name(settings["env_id"], "" if budget == "paper" else budget)
        found[settings["env_id"], task].append(sample_of(run, settings))
    rows = []
    for (env_id, task), samples in found.items():
        names = get_task(env_id).stages
        for k, name in enumerate(names):
            row = {"task": task, "k": k, "stage": name, "seeds": len(samples)}
            rows.append({**row, **stage_row(k, len(names), samples)})
    return rows


# ---- tables ----
def text(form: str, *values: float | None) -> str:
    """The values in this form, "-" where one is missing."""
    return "-" if None in values else form.format(*values).replace("%", " %")


def cells(*values: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def rule(header: str) -> str:
    """The line below the header of a Markdown table."""
    return "|---" * (header.count("|") - 1) + "|"


def stage_line(row: dict) -> str:
    """A row's line of the first table."""
    return cells(
        row["task"],
        row["stage"],
        row["seeds"],
        row["rollouts"],
        text("{:+.2f}", row["corr_mean"]),
        text("{:+.2f}", row["corr_sum"]),
        text("{:.0%}, {:+.2f}", *row["bare"]),
        text("{:.0%}, {:+.2f}", *row["offset"]),
    )


def pair_line(row: dict) -> str:
    """A row's line of the second table."""
    return cells(
        row["task"],
        row["stage"],
        row["completed"],
        row["cost"],
        text("{:.1f}, {:.1f}", row["won"], row["lost"]),
        text("{:.0%}", row["slower"]),
    )


def mean_of(curves: list[list], part: slice, column: int) -> float:
    """The mean of a column over some updates of all curves."""
    return np.mean([[update[column] for update in curve[part]] for curve in curves])


def curve_lines() -> list[str]:
    """The lines of the third table: PPO's curves, per task and method."""
    curves = defaultdict(list)
    for line in (DOCS / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        method, _, budget = row["method"].partition("@")
        if method in ("PPO", "PPO-dense", "STA-PPO") and "curve" in row:
            curves[task_name(row["env_id"], budget), method].append(row["curve"])
    lines = []
    for task, method in sorted(curves, key=lambda key: (order(key[0]), key[1])):
        seeds = curves[task, method]
        early = mean_of(seeds, slice(0, 2), DEVIATION)
        late = mean_of(seeds, slice(-3, None), DEVIATION)
        explained = mean_of(seeds, slice(-3, None), EXPLAINED)
        numbers = (f"{early:.3f}", f"{late:.3f}", f"{explained:.2f}")
        lines.append(cells(task, method, len(seeds), *numbers))
    return lines


def main(runs: list[str]) -> None:
    rows = merge(DOCS / "mechanism.jsonl", rows_of(runs), "task", "k")
    rows = sorted(rows, key=lambda row: (order(row["task"]), row["k"]))
    lines = [STAGE_HEADER, rule(STAGE_HEADER)]
    lines += [stage_line(row) for row in rows]
    lines += ["", PAIR_HEADER, rule(PAIR_HEADER)]
    lines += [pair_line(row) for row in rows if row["completed"] is not None]
    lines += ["", CURVE_HEADER, rule(CURVE_HEADER)]
    lines += curve_lines()
    between(DOCS / "tables.md", "mechanism", "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
