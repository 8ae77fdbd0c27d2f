"""Tables and plots of docs/results.md, docs/tables.md and README.md from the runs of benchmark/paper_table.sh, nothing typed by hand.

    python benchmark/paper_table.py                       # writes the tables, docs/results.svg and docs/summary.svg anew from docs/results.jsonl
    python benchmark/paper_table.py runs/*__paper      # first adds these runs' rows (of the same method, budget, task and seed the newer one counts)
    python benchmark/paper_table.py runs/PickCube-v1__sta_ppo__1__ipi=IPI-sum@ipi    # a run that paper_table.sh did not make, as METHOD@BUDGET

A row is eval.py's result row, with `successes` (one 0 or 1 per evaluation seed) in place of the episodes and, for PPO, `curve`: [env steps, seconds of
roll-outs and updates, success of the last 100 sampled training episodes, explained variance, deviation of the advantages, share that completed each
stage ...] per update."""
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stare_utils import TASKS, get_task
from vla import model_folder

DOCS = Path(__file__).parent.parent / "docs"
plt.rcParams["svg.hashsalt"] = "stare"  # the same rows, the same file
plt.rcParams["axes.titlesize"] = 9
METHODS = {"SFT": "0.6", "TPO": "tab:orange", "TPO-sum": "gold", "STA-TPO": "tab:red", "STA-TPO-completed": "tab:pink", "STA-TPO-sum": "tab:brown",
           "STA-TPO-sum-q": "sienna", "STA-TPO-sum5": "chocolate", "PPO": "tab:cyan", "PPO-dense": "tab:green", "STA-PPO": "tab:blue",
           "SFT-TPO-PPO": "tab:olive", "IPI": "tab:purple", "IPI-sum": "black", "IPI-sum5": "indigo"}  # fmt: skip
SILENT = sorted({f"STA-PPO-no-{stage}" for task in TASKS.values() for stage in task.stages})  # --silent-stages
PAPER = ("SFT", "TPO", "STA-TPO", "PPO", "PPO-dense", "STA-PPO", "SFT-TPO-PPO", "IPI")  # the rows of the paper's table
SHOWN = ("SFT", "TPO", "STA-TPO", "TPO-sum", "STA-TPO-sum", "PPO", "PPO-dense", "STA-PPO", "SFT-TPO-PPO", "IPI", "IPI-sum")  # the columns of ours
SIMPLER = [env_id for env_id in TASKS if TASKS[env_id].grid]
MEANS = {"ManiSkill3 mean": [env_id for env_id in TASKS if env_id not in SIMPLER],
         "ManiSkill3 mean without PegInsertionSide": [env_id for env_id in TASKS if env_id not in [*SIMPLER, "PegInsertionSide-v1"]],
         "SimplerEnv mean": SIMPLER, "SimplerEnv mean without PutEggplant": [env_id for env_id in SIMPLER if "Eggplant" not in env_id]}  # fmt: skip
PREFERENCE = {method for method in METHODS if "TPO" in method and "PPO" not in method}
README = ("", "broad", "clean", "clean-fast", "ipi", "lambda-0.5", "wide")  # the budgets of README's table and plot
# budgets that begin with another's imitation (and its preference steps)
IMITATION = {"lambda-0.5": "", "lambda-1": "", "gentle": "", "wide": "", "slow": "long", "broad": "long", "clean": "turned", "clean-fast": "clean"}
COMPARED = (("SFT", "TPO"), ("SFT", "STA-TPO"), ("TPO", "STA-TPO"), ("STA-TPO", "STA-TPO-completed"), ("STA-TPO", "STA-TPO-sum"),
            ("SFT", "STA-TPO-sum"), ("TPO", "STA-TPO-sum"), ("PPO", "STA-TPO-sum"), ("SFT", "TPO-sum"), ("TPO", "TPO-sum"), ("TPO-sum", "STA-TPO-sum"),
            ("SFT", "STA-TPO-sum-q"), ("TPO-sum", "STA-TPO-sum-q"), ("STA-TPO-sum", "STA-TPO-sum-q"), ("SFT", "STA-TPO-sum5"), ("STA-TPO", "STA-TPO-sum5"),
            ("SFT", "PPO"), ("SFT", "STA-PPO"), ("PPO", "STA-PPO"), ("PPO-dense", "STA-PPO"),
            ("TPO", "SFT-TPO-PPO"), ("SFT", "IPI"), ("STA-TPO", "IPI"), ("PPO", "IPI"), ("STA-PPO", "IPI"), ("SFT-TPO-PPO", "IPI"),
            *((a, b) for b in ("IPI-sum", "IPI-sum5") for a in ("SFT", b.replace("IPI", "STA-TPO"), "PPO", "STA-PPO", "IPI")))  # fmt: skip
BETWEEN = (("PPO", "PPO"), ("PPO-dense", "PPO-dense"), ("STA-PPO", "STA-PPO"), ("IPI", "IPI"), ("PPO", "STA-PPO"), ("PPO", "IPI"))  # two budgets


def row_of(run: Path) -> dict:
    """The row of a run folder."""
    row = json.loads((run / "results.json").read_text())
    folder, row["env_steps"] = run / "checkpoint", 0
    while (folder / "args.json").exists():  # the env steps of all policies before it count too
        args = json.loads((folder / "args.json").read_text())
        row["env_steps"], folder = row["env_steps"] + args["env_steps"], model_folder(args.get("checkpoint") or "none")
    row["successes"] = "".join(str(int(episode["success_once"])) for episode in sorted(row.pop("episodes"), key=lambda episode: episode["seed"]))
    events = EventAccumulator(str(run)).Reload()
    if "charts/success_once" in events.Tags()["scalars"]:
        stages = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("stage/") and tag.endswith("_reached"))
        read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in
                ("charts/success_once", "losses/explained_variance", "losses/advantage_std", *stages, "time/rollout", "time/update")}  # fmt: skip
        seconds = np.cumsum([read["time/rollout"][step] + read["time/update"][step] for step in sorted(read["time/rollout"])])
        wall = dict(zip(sorted(read["time/rollout"]), seconds.tolist()))
        row["curve"] = [[step, round(wall[step], 1), *(round(read[tag][step], 4) for tag in list(read)[:-2])] for step in sorted(read["charts/success_once"])]
    return row


def difference(a: list[dict], b: list[dict]) -> str:
    """Mean of b - a over the same evaluation seeds, in points, with a 95 % interval: the variances of the training seeds' means and of the episodes'
    means add up, and Student's t has the degrees of freedom of such a sum (Welch-Satterthwaite): two where three seeds' spread is all of it. A method
    of one training seed (SFT) stands against each of the other's."""
    first, second = (np.array([[int(x) for x in row["successes"]] for row in sorted(rows, key=lambda row: row["seed"])]) for rows in (a, b))
    diff = second - first  # (seeds, episodes)
    if len(diff) < 2:
        return f"{100 * diff.mean():+.1f}, one training seed"
    variances, freedom = np.array([diff.mean(axis).var(ddof=1) / diff.shape[1 - axis] for axis in (1, 0)]), np.array(diff.shape) - 1
    if not variances.any():
        return f"{100 * diff.mean():+.1f}, all alike"
    half = stats.t.ppf(0.975, variances.sum() ** 2 / (variances**2 / freedom).sum()) * variances.sum() ** 0.5
    return f"{100 * diff.mean():+.1f} [{100 * (diff.mean() - half):+.1f}, {100 * (diff.mean() + half):+.1f}]"


def table(env_id: str, methods: dict[str, list[dict]], budgets: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: success of each method over its training seeds, and what it gains; `budgets`: others that begin with this one's imitation."""
    stages = ", ".join(get_task(env_id.partition(",")[0]).stages)
    lines = [f"| method | env steps | training seeds | success_once, mean ± std [each seed] | at the end | % that completed {stages} | training s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method in [*METHODS, *SILENT]:
        if rows := sorted(methods.get(method, []), key=lambda row: row["seed"]):
            once = [100 * row["success_once"] for row in rows]
            spread = f" ± {np.std(once, ddof=1):.1f}" if len(once) > 1 else ""
            reach = ", ".join(f"{100 * x:.0f}" for x in np.mean([row["stage_reach_rate"] for row in rows], 0))
            lines.append(f"| {method} | {np.mean([row['env_steps'] for row in rows]):.0f} | {len(rows)} | {np.mean(once):.1f}{spread} "
                         f"[{', '.join(f'{x:.1f}' for x in once)}] | {np.mean([100 * row['success_at_end'] for row in rows]):.1f} | {reach} | "
                         f"{np.mean([row['wall_s'] for row in rows]):.0f} |")  # fmt: skip
        elif method in PAPER:
            lines.append(f"| {method} | not run | | | | | |")
    return "\n".join([f"**{env_id}**", "", *lines, "", *gains(methods, budgets)])


def gains(methods: dict[str, list[dict]], budgets: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Lines of Markdown: the differences between methods, of a task or of several together."""
    lines = ["| difference, points [95 %] | |", "|---|---|"]
    compared = [(a, b, b, methods) for a, b in [*COMPARED, *(("STA-PPO", method) for method in SILENT)]]
    compared += [(a, b, f"{b}, {name}", others) for name, others in budgets.items() for a, b in BETWEEN]
    for a, b, name, others in compared:
        pair = [methods.get(a, []), others.get(b, [])]
        if a != "SFT":  # imitation is one run, the start of all others
            shared = set.intersection(*({row["seed"] for row in rows} for rows in pair))
            pair = [[row for row in rows if row["seed"] in shared] for rows in pair]
        if all(pair):
            fewer = f", {len(pair[1])} seeds" * (1 < len(pair[1]) < max(len(methods[a]), len(others[b])))
            lines.append(f"| {name} - {a} | {difference(*pair)}{fewer} |")
    return lines


def together(tasks: dict[str, dict[str, list[dict]]], names: list[str]) -> dict[str, list[dict]]:
    """Methods of several tasks as those of one that has the episodes of all, by the training seeds that all have."""
    parts, methods = [tasks.get(name, {}) for name in names], {}
    for method in set.intersection(*(set(part) for part in parts)):
        seeds = set.intersection(*({row["seed"] for row in part[method]} for part in parts))
        methods[method] = [{"seed": seed, "successes": "".join(row["successes"] for part in parts for row in part[method] if row["seed"] == seed)}
                           for seed in sorted(seeds)]  # fmt: skip
    return methods


def overview(tasks: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: the paper's table, tasks by methods, success in percent (mean ± deviation over the training seeds), a task's other budgets below it, and
    the means over each simulator's tasks, only where all of them have been run."""

    def cell(names: list[str], method: str) -> str:
        seeds = [[100 * row["success_once"] for row in tasks.get(name, {}).get(method, [])] for name in names]
        if not all(seeds):
            return "not run"
        n = min(map(len, seeds))
        spread = f" ± {np.std(seeds[0], ddof=1):.1f}" if n > 1 and len(names) == 1 else ""
        return f"{np.mean([np.mean(once) for once in seeds]):.1f}{spread}" + f" ({n} seed{'s' * (n > 1)})" * (n != 3)

    lines, budgets = [["", *SHOWN], ["---"] * (len(SHOWN) + 1)], sorted({budget_of(name) for name in tasks})
    for group, members in {**{env_id: [env_id] for env_id in TASKS}, **MEANS}.items():
        for budget in budgets:
            cells = [cell([task_name(env_id, budget) for env_id in members], method) for method in SHOWN]
            if not budget or set(cells) != {"not run"}:
                lines.append([task_name(group, budget), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curve_of(run: dict) -> np.ndarray:
    """A row's curve, with the env steps of the policies before it counted."""
    curve = np.array(run["curve"])
    curve[:, 0] += run["env_steps"] - curve[-1, 0]
    return curve


def plot(tasks: dict[str, dict[str, list[dict]]]) -> None:
    """docs/results.svg, of the same rows as `summarise`: sampled success of the PPOs while they train, by env steps and by wall time; greedy success at
    the end as points; the share of greedy episodes that complete each stage."""
    tasks = {env_id: methods for env_id, methods in tasks.items() if any("curve" in row for rows in methods.values() for row in rows)}
    figure, axes = plt.subplots(len(tasks), 3, figsize=(13, 2.6 * len(tasks)), squeeze=False, sharey="row", layout="constrained")
    for row, (env_id, methods) in zip(axes, tasks.items()):
        for axis, x, label in ((row[0], 0, "env steps"), (row[1], 1, "seconds of roll-outs and updates")):
            for method, colour in METHODS.items():
                runs = methods.get(method, [])
                if curves := [curve_of(run) for run in runs if "curve" in run]:
                    short = min(map(len, curves))
                    curves = np.stack([curve[-short:] for curve in curves])
                    axis.plot(curves[:, :, x].mean(0), 100 * curves[:, :, 2].mean(0), color=colour)
                    axis.fill_between(curves[:, :, x].mean(0), 100 * curves[:, :, 2].min(0), 100 * curves[:, :, 2].max(0), color=colour, alpha=0.15, lw=0)
                if runs:
                    at = [run["env_steps"] if x == 0 else run["curve"][-1][1] if "curve" in run else run["wall_s"] * (run["env_steps"] > 0) for run in runs]
                    axis.plot(at, [100 * run["success_once"] for run in runs], "o", color=colour, ms=5)
            axis.set(xlabel=label, ylabel="success, %", title=env_id, ylim=(0, 100))
        for method in [method for method in METHODS if method in methods]:
            funnel = 100 * np.mean([run["stage_reach_rate"] for run in methods[method]], 0)
            style = "." + ("--" if method in ("SFT", "TPO", "STA-TPO") else "-")
            row[2].plot(get_task(env_id.partition(",")[0]).stages, funnel, style, color=METHODS[method])
        row[2].set(ylabel="completed, greedily, %", title=env_id)
    seen = [method for method in METHODS if any(method in methods for methods in tasks.values())]
    figure.legend([plt.Line2D([], [], color=METHODS[method]) for method in seen], seen, ncol=(len(seen) + 1) // 2, loc="outside upper center")
    figure.savefig(DOCS / "results.svg", metadata={"Date": None})


def summarise(tasks: dict[str, dict[str, list[dict]]]) -> None:
    """docs/summary.svg, README's: greedy success of each method, a dot per training seed, of each task and budget of README's table."""
    shown = [method for method in SHOWN if any(method in methods for methods in tasks.values())]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.4 * len(tasks)), layout="constrained")
    for y, methods in enumerate(tasks.values()):
        axis.axhline(y + 0.5, color="0.85", lw=0.8)
        for i, method in enumerate(shown):
            if once := [100 * row["success_once"] for row in methods.get(method, [])]:  # a line without points would take room in the layout
                axis.plot(once, [y + (i - len(shown) / 2) / (1.3 * len(shown))] * len(once), "o", color=METHODS[method], ms=4, clip_on=False)
    axis.set(xlabel="success, %", xlim=(0, 100), ylim=(len(tasks) - 0.5, -0.5), yticks=range(len(tasks)), yticklabels=list(tasks))
    dots = [plt.Line2D([], [], color=METHODS[method], ls="", marker="o") for method in shown]
    figure.legend(dots, shown, ncol=(len(shown) + 1) // 2, loc="outside upper center", columnspacing=1, handletextpad=0)
    figure.savefig(DOCS / "summary.svg", metadata={"Date": None})


def between(page: Path, mark: str, text: str) -> None:
    """Puts a text between a page's two marks."""
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{rest.partition(f'<!-- /{mark} -->')[2]}")


def merge(file: Path, rows: list[dict], *key: str) -> list[dict]:
    """The file's rows, a line each, and these, which it holds from now on: of the same key the newer one."""
    old = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    newest = {tuple(row[name] for name in key): row for row in old + rows}
    merged = [newest[key] for key in sorted(newest)]
    file.write_text("".join(json.dumps(row) + "\n" for row in merged))
    return merged


def order(task: str) -> tuple[int, str]:
    """Tables are in the order of TASKS, a task's other budgets ("task, budget") behind it."""
    return list(TASKS).index(task.partition(",")[0]), task


def task_name(env_id: str, budget: str) -> str:
    """How tables call a task and its budget: "task, budget", the budget without a name by the task alone."""
    return env_id + f", {budget}" * bool(budget)


def budget_of(task: str) -> str:
    """The budget in a task's name in the tables."""
    return task.partition(", ")[2]


def main(runs: list[str]) -> None:
    named = [run.partition("=") for run in runs]
    new = [row_of(Path(run)) | ({"method": method} if method else {}) for run, _, method in named if (Path(run) / "results.json").exists()]
    tasks = defaultdict(lambda: defaultdict(list))
    for row in merge(DOCS / "results.jsonl", new, "env_id", "method", "seed"):
        method, _, budget = row["method"].partition("@")
        tasks[task_name(row["env_id"], budget)][method].append(row)
    tasks, same = dict(sorted(tasks.items(), key=lambda item: order(item[0]))), defaultdict(dict)
    for name, methods in tasks.items():
        env_id, budget = name.partition(", ")[0], budget_of(name)
        if budget in IMITATION:
            origin = task_name(env_id, IMITATION[budget])
            same[origin][budget] = methods
            taken = {"SFT"} if methods.keys() & PREFERENCE else {"SFT", *PREFERENCE}  # a budget with more roll-outs has preference steps of its own
            methods |= {method: rows for method, rows in tasks.get(origin, {}).items() if method in taken}
    whole = overview(tasks)
    cells = {line: [cell.strip() for cell in line.split("|")[1:-1]] for line in whole.splitlines()}
    ppo = 1 + SHOWN.index("PPO")
    front = [line for line in cells if budget_of(cells[line][0]) in README and cells[line][ppo:].count("not run") <= 4]  # of two methods with PPO at least
    between(DOCS.parent / "README.md", "table", "\n".join(front))
    between(DOCS / "results.md", "table", whole)
    pages = [table(env_id, methods, same[env_id]) for env_id, methods in tasks.items() if len(methods) > 1]
    for group, members in MEANS.items():  # a mean's tasks as one: more episodes than each has, SimplerEnv's grids above all
        for budget in sorted({budget_of(name) for name in tasks}):
            if len(methods := together(tasks, [task_name(env_id, budget) for env_id in members])) > 1:
                pages.append("\n".join([f"**{task_name(group, budget)}: its tasks as one**", "", *gains(methods, {})]))
    between(DOCS / "tables.md", "tables", "\n\n".join(pages))
    names = {cells[line][0] for line in front}
    drawn = {name: methods for name, methods in tasks.items() if name in names}
    plot(drawn)
    summarise(drawn)


if __name__ == "__main__":
    main(sys.argv[1:])
