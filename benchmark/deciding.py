"""The deciding table of docs/results.md and its figure: do stages help from a weak imitation?

    python benchmark/deciding.py        # from the rows of docs/results.jsonl

The rows are those with the table "deciding": benchmark/table.sh makes the runs, and paper_table.py
adds their rows. All methods of a task begin with the same imitation. Sampled: over the last third
of a run's training rows, each of which is about its latest 100 episodes.
"""

import json

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from paper_table import (
    DOCS,
    Methods,
    between,
    curve_of,
    difference,
    mean_and_spread,
    shared,
    short_name,
)

from world.tasks import get_task

# The methods in the order of the table, with their colours in the figure.
COLOURS = {
    "PPO": "tab:orange",
    "STA-PPO-gain": "tab:blue",
    "STA-PPO-shaping": "tab:green",
    "STA-PPO-paced": "tab:purple",
    "STA-PPO-progress": "tab:brown",
    "STA-PPO-resets": "tab:cyan",
    "TPO": "tab:red",
    "STA-TPO": "tab:pink",
    "STA-TPO-branch": "tab:olive",
}
# The stages' columns of a curve begin here, in alphabetical order: see paper_table.py.
FIRST_STAGE = 5


def read_rows() -> dict[str, Methods]:
    """The rows of the deciding table: task -> method -> its rows, one per training seed."""
    tasks = {}
    for line in (DOCS / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("table") == "deciding":
            method = row["method"].partition("@")[0]
            tasks.setdefault(row["env_id"], {}).setdefault(method, []).append(row)
    return tasks


def stage_curves(env_id: str, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Env steps (U,), and percent of sampled episodes that completed each stage, (seeds, U, K)."""
    curves = [curve_of(row) for row in rows]
    shortest = min(map(len, curves))
    curves = np.stack([curve[:shortest] for curve in curves])
    stages = get_task(env_id).stages
    columns = [FIRST_STAGE + sorted(stages).index(stage) for stage in stages]
    return curves[:, :, 0].mean(0), 100 * curves[:, :, columns]


def sampled(env_id: str, rows: list[dict]) -> list[str]:
    """Percent of sampled episodes that completed the first and the last stage, of each seed."""
    if "curve" not in rows[0]:
        return ["", ""]
    _, completed = stage_curves(env_id, rows)
    third = completed.shape[1] // 3
    late = completed[:, -third:].mean(1)  # (seeds, K)
    return [", ".join(f"{x:.1f}" for x in late[:, k]) for k in (0, -1)]


def table(tasks: dict[str, Methods]) -> str:
    """Markdown: one line per task and method."""
    heads = ["task", "method", "success, greedy, % [each seed]", "minus PPO, points [95 %]"]
    heads += ["first stage, greedy, %", "first stage, sampled, %", "success, sampled, %"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for env_id, methods in tasks.items():
        for method in ("SFT", *COLOURS):
            rows = sorted(methods.get(method, []), key=lambda row: row["seed"])
            if not rows:
                continue
            once = ", ".join(f"{100 * row['success_once']:.1f}" for row in rows)
            against = ""
            pair = shared(methods.get("PPO", []), rows, method)
            if method not in ("SFT", "PPO") and all(pair):
                against = difference(*pair)
            reach = 100 * np.mean([row["stage_reach_rate"][0] for row in rows])
            cells = [short_name(env_id), method, f"{mean_and_spread(rows)} [{once}]", against]
            cells += [f"{reach:.1f}", *sampled(env_id, rows)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(tasks: dict[str, Methods]) -> None:
    """docs/deciding.svg: one line of panels per task, one panel per stage."""
    columns = max(len(get_task(env_id).stages) for env_id in tasks)
    size = (2.5 * columns, 2.6 * len(tasks) + 0.4)
    figure, axes = plt.subplots(len(tasks), columns, figsize=size, squeeze=False)
    for line, (env_id, methods) in zip(axes, tasks.items()):
        stages = get_task(env_id).stages
        for axis in line[len(stages) :]:
            axis.remove()
        for k, stage in enumerate(stages):
            line[k].set_title(f"{short_name(env_id)}: {stage}")
            line[k].tick_params(labelsize=7)
        for method, colour in COLOURS.items():
            rows = methods.get(method, [])
            if not rows or "curve" not in rows[0]:
                continue
            steps, completed = stage_curves(env_id, rows)
            for k in range(len(stages)):
                share = completed[:, :, k]
                line[k].plot(steps, share.mean(0), color=colour, label=f"{method} ({len(rows)})")
                line[k].fill_between(
                    steps, share.min(0), share.max(0), color=colour, alpha=0.15, linewidth=0
                )
                line[k].set_ylim(bottom=0)
        line[0].legend(fontsize=7)
    figure.supxlabel("env steps", fontsize=9)
    figure.supylabel("% of sampled episodes", fontsize=9)
    figure.tight_layout()
    figure.savefig(DOCS / "deciding.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    rows = read_rows()
    between(DOCS / "results.md", "deciding", table(rows))
    draw(rows)
