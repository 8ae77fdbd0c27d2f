"""Tables and figures of README.md and docs/, made from the rows in docs/results.jsonl.

    python benchmark/paper_table.py                       # writes tables and figures again
    python benchmark/paper_table.py runs/*__paper         # first adds the rows of these runs
    python benchmark/paper_table.py RUN=IPI-sum@ipi       # a run under the name METHOD@BUDGET

Of two rows with the same task, method, budget and seed, the newer one counts.
benchmark/table.sh and paper_table.sh make the runs. Other runs need a name, as in the third line.

A row is the result row of eval.py. `successes` replaces its episodes: one 0 or 1 per evaluation
seed. A PPO run adds `curve`, one list per update:
[env steps, seconds of roll-outs and updates, success of the last 100 training episodes,
explained variance, deviation of the advantages, share that completed each stage ...].
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from funnel import read_scalars
from scipy import stats

from plumbing.checkpoint import model_folder
from world.tasks import TASKS, get_task

DOCS = Path(__file__).parent.parent / "docs"
# A fixed salt makes the same rows give the same file.
plt.rcParams["svg.hashsalt"] = "stare"
plt.rcParams["axes.titlesize"] = 9

# method -> its rows, one row per training seed
Methods = dict[str, list[dict]]
# "task" or "task, budget" -> its methods
Tasks = dict[str, Methods]

# Names of the rows. A TPO or an IPI without a suffix has the paper's mean cost.
METHODS = (
    "SFT",
    "TPO",
    "TPO-sum",
    "STA-TPO",
    "STA-TPO-completed",
    "STA-TPO-sum",
    "STA-TPO-sum-q",
    "STA-TPO-sum5",
    "PPO",
    "PPO-dense",
    "STA-PPO",
    "STA-PPO-gain",
    "SFT-TPO-PPO",
    "IPI",
    "IPI-sum",
    "IPI-sum5",
)
# STA-PPO with --silent-stages
SILENT = sorted({f"STA-PPO-no-{stage}" for task in TASKS.values() for stage in task.stages})
# the methods of the paper's table: tables.md says "not run" where one is missing
PAPER = ("SFT", "TPO", "STA-TPO", "PPO", "PPO-dense", "STA-PPO", "SFT-TPO-PPO", "IPI")
# the columns of the overview in tables.md
SHOWN = (*PAPER[:3], "TPO-sum", "STA-TPO-sum", *PAPER[3:], "IPI-sum")
# the columns of README's table, which has the default, summed cost: heading -> method
FRONT = {
    "SFT": "SFT",
    "STA-TPO": "STA-TPO-sum",
    "PPO": "PPO",
    "STA-PPO": "STA-PPO",
    "IPI": "IPI-sum",
}
COLOURS = {"PPO": "tab:orange", "STA-PPO": "tab:blue", "IPI-sum": "black"}
PREFERENCE = {method for method in METHODS if "TPO" in method and "PPO" not in method}

SIMPLER = [env_id for env_id in TASKS if TASKS[env_id].grid]
MANISKILL = [env_id for env_id in TASKS if env_id not in SIMPLER]
SIX = [env_id for env_id in MANISKILL if env_id != "PegInsertionSide-v1"]
THREE = [env_id for env_id in SIMPLER if "Eggplant" not in env_id]
MEANS = {
    "ManiSkill3 mean": MANISKILL,
    "ManiSkill3 mean without PegInsertionSide": SIX,
    "SimplerEnv mean": SIMPLER,
    "SimplerEnv mean without PutEggplant": THREE,
}
# README's rows: heading of the mean -> (its tasks, their budget)
FRONT_GROUPS = {"ManiSkill3, mean": (SIX, ""), "SimplerEnv, mean": (THREE, "clean-fast")}

# A budget here begins with the imitation, and often the preference steps, of another budget.
IMITATION = {
    "lambda-0.5": "",
    "lambda-1": "",
    "gentle": "",
    "wide": "",
    "slow": "long",
    "broad": "long",
    "clean": "turned",
    "clean-fast": "clean",
}
# differences inside a budget: method -> what it is compared with
COMPARED = {
    "TPO": ["SFT"],
    "STA-TPO": ["SFT", "TPO"],
    "STA-TPO-completed": ["STA-TPO"],
    "STA-TPO-sum": ["STA-TPO", "SFT", "TPO", "TPO-sum", "PPO"],
    "TPO-sum": ["SFT", "TPO"],
    "STA-TPO-sum-q": ["SFT", "TPO-sum", "STA-TPO-sum"],
    "STA-TPO-sum5": ["SFT", "STA-TPO"],
    "PPO": ["SFT"],
    "STA-PPO": ["SFT", "PPO", "PPO-dense"],
    "STA-PPO-gain": ["SFT", "PPO"],
    "SFT-TPO-PPO": ["TPO"],
    "IPI": ["SFT", "STA-TPO", "PPO", "STA-PPO", "SFT-TPO-PPO"],
    "IPI-sum": ["SFT", "STA-TPO-sum", "PPO", "STA-PPO", "IPI"],
    "IPI-sum5": ["SFT", "STA-TPO-sum5", "PPO", "STA-PPO", "IPI"],
    **{method: ["STA-PPO"] for method in SILENT},
}
# differences between two budgets of one imitation: (method, method of the other budget)
BETWEEN = (
    ("PPO", "PPO"),
    ("PPO-dense", "PPO-dense"),
    ("STA-PPO", "STA-PPO"),
    ("IPI", "IPI"),
    ("PPO", "STA-PPO"),
    ("PPO", "IPI"),
)
# the panels of docs/summary.svg: title -> pairs of methods, whose second minus first is drawn
PANELS = {
    "Stage reward: STA-PPO minus PPO": [("PPO", "STA-PPO")],
    "All three steps: IPI minus PPO": [("PPO", "IPI-sum"), ("PPO", "IPI-sum5"), ("PPO", "IPI")],
    "Preference step: STA-TPO minus SFT": [
        ("SFT", "STA-TPO-sum"),
        ("SFT", "STA-TPO-sum5"),
        ("SFT", "STA-TPO"),
    ],
    "Stages in the preferences: STA-TPO minus TPO": [
        ("TPO-sum", "STA-TPO-sum"),
        ("TPO", "STA-TPO"),
    ],
}
# what the figure says about a budget: its preference step, its PPO, and a method's cost
ROLLOUTS = {
    "wide": "512 roll-outs",
    "broad": "512 roll-outs, better imitation",
    "ipi": "512 roll-outs, ./ipi.sh",
}
SETTINGS = {
    "wide": "36,000 steps",
    "broad": "36,000 steps, better imitation",
    "ipi": "84,000 steps, ./ipi.sh",
    "long": "lambda 0.5, 38,400 steps, better imitation",
    "slow": "lambda 0.5, 24,000 steps, better imitation",
    "lambda-0.5": "lambda 0.5",
    "gentle": "lambda 0.5, small rate",
    "clean": "small rate",
}
COSTS = {
    "STA-TPO": "mean cost",
    "IPI": "mean cost",
    "STA-TPO-sum5": "five passes",
    "IPI-sum5": "five passes",
}
# one line of the figure: label, mean difference, half of its interval
Line = tuple[str, float, float]


# ---- rows ----


def env_steps(run: Path) -> int:
    """Env steps of a run and of all policies that it descends from."""
    total = 0
    folder = run / "checkpoint"
    while (folder / "args.json").exists():
        args = json.loads((folder / "args.json").read_text())
        total += args["env_steps"]
        folder = model_folder(args.get("checkpoint") or "none")
    return total


def read_curve(run: Path) -> list[list[float]] | None:
    """The curve of a PPO run, from its TensorBoard file. None: the run has no curve."""
    read = read_scalars(run)
    if "charts/success_once" not in read:
        return None
    columns = ["charts/success_once", "losses/explained_variance", "losses/advantage_std"]
    columns += sorted(tag for tag in read if tag.startswith("stage/") and tag.endswith("_reached"))
    seconds = {}
    elapsed = 0.0
    for step in sorted(read["time/rollout"]):
        elapsed += read["time/rollout"][step] + read["time/update"][step]
        seconds[step] = round(elapsed, 1)
    curve = []
    for step in sorted(read["charts/success_once"]):
        curve.append([step, seconds[step], *(round(read[tag][step], 4) for tag in columns)])
    return curve


def row_of(run: Path) -> dict:
    """The row of a run's folder."""
    row = json.loads((run / "results.json").read_text())
    row["env_steps"] = env_steps(run)
    episodes = sorted(row.pop("episodes"), key=lambda episode: episode["seed"])
    row["successes"] = "".join(str(int(episode["success_once"])) for episode in episodes)
    curve = read_curve(run)
    if curve is not None:
        row["curve"] = curve
    return row


def merge(file: Path, rows: list[dict], *key: str) -> list[dict]:
    """Adds rows to a file and returns all of its rows.

    Of two rows with the same key, the newer one stays.
    """
    old = []
    if file.exists():
        old = [json.loads(line) for line in file.read_text().splitlines()]
    newest = {tuple(row[name] for name in key): row for row in old + rows}
    merged = [newest[found] for found in sorted(newest)]
    file.write_text("".join(json.dumps(row) + "\n" for row in merged))
    return merged


def order(task: str) -> tuple[int, str]:
    """Sorts "task, budget" by the order of TASKS, then by the budget."""
    return list(TASKS).index(task.partition(",")[0]), task


def task_name(env_id: str, budget: str) -> str:
    """The name of a task with a budget. The budget without a name adds nothing."""
    return f"{env_id}, {budget}" if budget else env_id


def budget_of(task: str) -> str:
    """The budget in such a name."""
    return task.partition(", ")[2]


def read_tasks(runs: list[str]) -> Tasks:
    """All rows by task, budget and method, after those of `runs` were added."""
    new = []
    for run in runs:
        folder, _, method = run.partition("=")
        if (Path(folder) / "results.json").exists():
            row = row_of(Path(folder))
            if method:
                row["method"] = method
            budget = row["method"].partition("@")[2]
            if budget in ("flagship", "deciding"):
                row["table"] = budget
            new.append(row)
    tasks = defaultdict(lambda: defaultdict(list))
    for row in merge(DOCS / "results.jsonl", new, "env_id", "method", "seed"):
        method, _, budget = row["method"].partition("@")
        tasks[task_name(row["env_id"], budget)][method].append(row)
    return dict(sorted(tasks.items(), key=lambda item: order(item[0])))


def share_imitations(tasks: Tasks) -> dict[str, Tasks]:
    """Gives each budget the rows of the imitation that it begins with.

    Returns, for each task of such an imitation, the other budgets that begin with it.
    """
    same = defaultdict(dict)
    for name, methods in tasks.items():
        budget = budget_of(name)
        if budget not in IMITATION:
            continue
        origin = task_name(name.partition(", ")[0], IMITATION[budget])
        same[origin][budget] = methods
        # A budget with more roll-outs has preference steps of its own.
        taken = {"SFT"} if methods.keys() & PREFERENCE else {"SFT", *PREFERENCE}
        for method, rows in tasks.get(origin, {}).items():
            if method in taken:
                methods[method] = rows
    return same


def together(tasks: Tasks, names: list[str]) -> Methods:
    """Several tasks taken as one, with the episodes of all.

    It has the methods, and of each the training seeds, that all tasks have.
    """
    parts = [tasks.get(name, {}) for name in names]
    methods = {}
    for method in set.intersection(*(set(part) for part in parts)):
        by_seed = [{row["seed"]: row["successes"] for row in part[method]} for part in parts]
        seeds = set.intersection(*(set(part) for part in by_seed))
        methods[method] = []
        for seed in sorted(seeds):
            successes = "".join(part[seed] for part in by_seed)
            methods[method].append({"seed": seed, "successes": successes})
    return methods


# ---- differences ----


def shared(first: list[dict], second: list[dict], method: str) -> list[list[dict]]:
    """The rows that can be compared: those of training seeds that both methods have.

    method: of the first rows. SFT is one run, which every other method starts from.
    """
    if method == "SFT":
        return [first, second]
    seeds = {row["seed"] for row in first} & {row["seed"] for row in second}
    return [[row for row in rows if row["seed"] in seeds] for rows in (first, second)]


def interval(first: list[dict], second: list[dict]) -> tuple[float, float | None]:
    """Mean of second - first over the same evaluation seeds, and half of its 95 % interval.

    Both are in points. The variance of the training seeds' means and that of the episodes' means
    are added. Student's t gets the degrees of freedom of such a sum (Welch-Satterthwaite).
    Three seeds whose spread is all of the variance have two degrees of freedom.
    A method of one training seed (SFT) is compared with each seed of the other.
    None: there is one training seed only. 0: all episodes differ alike.
    """
    outcomes = []
    for rows in (first, second):
        rows = sorted(rows, key=lambda row: row["seed"])
        outcomes.append(np.array([[int(x) for x in row["successes"]] for row in rows]))
    # (training seeds, episodes)
    difference = outcomes[1] - outcomes[0]
    mean = 100 * difference.mean()
    if len(difference) < 2:
        return mean, None
    sizes = np.array(difference.shape)
    spread = np.array([difference.mean(1).var(ddof=1), difference.mean(0).var(ddof=1)])
    variances = spread / sizes
    if not variances.any():
        return mean, 0.0
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    return mean, 100 * stats.t.ppf(0.975, freedom) * variances.sum() ** 0.5


def difference(first: list[dict], second: list[dict]) -> str:
    """`interval` as the tables write it."""
    mean, half = interval(first, second)
    if half is None:
        return f"{mean:+.1f}, one training seed"
    if half == 0:
        return f"{mean:+.1f}, all alike"
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def gains(methods: Methods, budgets: Tasks) -> list[str]:
    """Lines of Markdown: the differences between methods, and those to other budgets."""
    compared = []
    for method, others in COMPARED.items():
        compared += [(other, method, method, methods) for other in others]
    for budget, rows in budgets.items():
        compared += [(first, second, f"{second}, {budget}", rows) for first, second in BETWEEN]
    lines = ["| difference, points [95 %] | |", "|---|---|"]
    for first, second, name, others in compared:
        all_rows = [methods.get(first, []), others.get(second, [])]
        pair = shared(*all_rows, first)
        if not all(pair):
            continue
        seeds = len(pair[1])
        fewer = ""
        if 1 < seeds < max(map(len, all_rows)):
            fewer = f", {seeds} seeds"
        lines.append(f"| {name} - {first} | {difference(*pair)}{fewer} |")
    return lines


# ---- tables ----


def mean_and_spread(rows: list[dict]) -> str:
    """Success in percent, with the deviation over the training seeds where there are several."""
    once = [100 * row["success_once"] for row in rows]
    if len(once) == 1:
        return f"{once[0]:.1f}"
    return f"{np.mean(once):.1f} ± {np.std(once, ddof=1):.1f}"


def table(env_id: str, methods: Methods, budgets: Tasks) -> str:
    """Markdown: a task's methods, and their differences.

    budgets: others that begin with the same imitation.
    """
    stages = ", ".join(get_task(env_id.partition(",")[0]).stages)
    heads = ["method", "env steps", "training seeds", "success_once, mean ± std [each seed]"]
    heads += ["at the end", f"% that completed {stages}", "training s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in (*METHODS, *SILENT):
        rows = sorted(methods.get(method, []), key=lambda row: row["seed"])
        if rows:
            once = ", ".join(f"{100 * row['success_once']:.1f}" for row in rows)
            completed = 100 * np.mean([row["stage_reach_rate"] for row in rows], 0)
            cells = [
                method,
                f"{np.mean([row['env_steps'] for row in rows]):.0f}",
                str(len(rows)),
                f"{mean_and_spread(rows)} [{once}]",
                f"{np.mean([100 * row['success_at_end'] for row in rows]):.1f}",
                ", ".join(f"{x:.0f}" for x in completed),
                f"{np.mean([row['wall_s'] for row in rows]):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        elif method in PAPER:
            lines.append(f"| {method} | not run | | | | | |")
    return "\n".join([f"**{env_id}**", "", *lines, "", *gains(methods, budgets)])


def overview(tasks: Tasks) -> str:
    """Markdown: tasks by methods, then a task's other budgets, then the means over tasks.

    A mean is over the tasks' means. It stands only where all of its tasks have been run.
    """

    def cell(names: list[str], method: str) -> str:
        runs = [tasks.get(name, {}).get(method, []) for name in names]
        if not all(runs):
            return "not run"
        text = mean_and_spread(runs[0])
        if len(names) > 1:
            means = [np.mean([100 * row["success_once"] for row in rows]) for rows in runs]
            text = f"{np.mean(means):.1f}"
        seeds = min(map(len, runs))
        if seeds == 1:
            return f"{text} (1 seed)"
        return text if seeds == 3 else f"{text} ({seeds} seeds)"

    budgets = sorted({budget_of(name) for name in tasks})
    groups = {env_id: [env_id] for env_id in TASKS} | MEANS
    lines = [["", *SHOWN], ["---"] * (len(SHOWN) + 1)]
    for group, members in groups.items():
        for budget in budgets:
            names = [task_name(env_id, budget) for env_id in members]
            cells = [cell(names, method) for method in SHOWN]
            if not budget or set(cells) != {"not run"}:
                lines.append([task_name(group, budget), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_rows(tasks: Tasks) -> dict[str, Methods]:
    """The tasks of README's table: those that have a row of every method in it."""
    rows = {}
    for members, budget in FRONT_GROUPS.values():
        for env_id in members:
            methods = tasks.get(task_name(env_id, budget), {})
            if all(methods.get(method) for method in FRONT.values()):
                rows[env_id] = methods
    return rows


def front(tasks: Tasks, spread: bool) -> str:
    """Markdown: README's table. A mean stands only where all of its tasks have a row.

    spread: with the deviation over the training seeds. (n): their number.
    """
    rows = front_rows(tasks)
    lines = [["task", *FRONT], ["---"] * (len(FRONT) + 1)]
    for heading, (members, _) in FRONT_GROUPS.items():
        present = [env_id for env_id in members if env_id in rows]
        for env_id in present:
            cells = []
            for method in FRONT.values():
                runs = rows[env_id][method]
                text = mean_and_spread(runs)
                if not spread:
                    text = text.partition(" ")[0]
                cells.append(f"{text} ({len(runs)})")
            lines.append([env_id, *cells])
        if present == members:
            cells = []
            for method in FRONT.values():
                runs = [rows[env_id][method] for env_id in members]
                means = [np.mean([100 * row["success_once"] for row in one]) for one in runs]
                cells.append(f"{np.mean(means):.1f} ({min(map(len, runs))})")
            lines.append([f"**{heading}**", *cells])
    # No spaces beside the bars: `wc -w` counts the words of README.md without them.
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def appendix(tasks: Tasks, same: dict[str, Tasks]) -> str:
    """Markdown: every task and budget, then the tasks of a mean taken as one."""
    pages = []
    for name, methods in tasks.items():
        if len(methods) > 1:
            pages.append(table(name, methods, same[name]))
    for group, members in MEANS.items():
        for budget in sorted({budget_of(name) for name in tasks}):
            methods = together(tasks, [task_name(env_id, budget) for env_id in members])
            if len(methods) > 1:
                title = f"**{task_name(group, budget)}: its tasks as one**"
                pages.append("\n".join([title, "", *gains(methods, {})]))
    return "\n\n".join(pages)


def between(page: Path, mark: str, text: str) -> None:
    """Puts a text between a page's two marks."""
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- /{mark} -->")[2]
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{after}")


# ---- figures ----


def curve_of(run: dict) -> np.ndarray:
    """A row's curve. Its env steps include those of the policies before it."""
    curve = np.array(run["curve"])
    curve[:, 0] += run["env_steps"] - curve[-1, 0]
    return curve


def draw_curves(axis: plt.Axes, methods: Methods) -> None:
    """One task: sampled success during training, and greedy success at the end as dots."""
    imitation = 100 * methods["SFT"][0]["success_once"]
    axis.axhline(imitation, color="0.6", linestyle=":")
    for method, colour in COLOURS.items():
        curves = [curve_of(run) for run in methods[method]]
        shortest = min(map(len, curves))
        curves = np.stack([curve[-shortest:] for curve in curves])
        steps = curves[:, :, 0].mean(0)
        success = 100 * curves[:, :, 2]
        axis.plot(steps, success.mean(0), color=colour)
        axis.fill_between(
            steps, success.min(0), success.max(0), color=colour, alpha=0.15, linewidth=0
        )
        ends = [run["env_steps"] for run in methods[method]]
        greedy = [100 * run["success_once"] for run in methods[method]]
        axis.plot(ends, greedy, "o", color=colour, markersize=4, clip_on=False)


def draw_learning(tasks: dict[str, Methods]) -> None:
    """docs/results.svg: the learning curves of README's rows."""
    columns = 3
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(10, 2.5 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, (env_id, methods) in zip(axes.flat, tasks.items()):
        draw_curves(axis, methods)
        axis.set(title=short_name(env_id), ylim=(0, 105))
        axis.tick_params(axis="x", labelsize=7)
    figure.supxlabel("env steps", fontsize=9)
    figure.supylabel("success, %", fontsize=9)
    names = {method: heading for heading, method in FRONT.items()}
    handles = [plt.Line2D([], [], color="0.6", linestyle=":")]
    handles += [plt.Line2D([], [], color=colour) for colour in COLOURS.values()]
    labels = ["SFT", *(names[method] for method in COLOURS)]
    figure.legend(handles, labels, ncol=len(labels), loc="outside upper center")
    figure.savefig(DOCS / "results.svg", metadata={"Date": None})
    plt.close(figure)


def short_name(env_id: str) -> str:
    """What the figures call a task."""
    return env_id.removesuffix("-v1").replace("BakedTexInScene", "").replace("InScene", "")


def label_of(name: str, method: str) -> str:
    """What the figure calls a task with its budget, and the cost of a method."""
    env_id, _, budget = name.partition(", ")
    task = short_name(env_id)
    phrases = ROLLOUTS if method in PREFERENCE else SETTINGS
    parts = [task, phrases.get(budget, ""), COSTS.get(method, "")]
    return ", ".join(part for part in parts if part)


def differences(tasks: Tasks, pairs: list[tuple[str, str]]) -> list[Line]:
    """The lines of one panel: every task and budget that has an interval."""
    named = dict(tasks)
    for budget in sorted({budget_of(name) for name in tasks}):
        names = [task_name(env_id, budget) for env_id in THREE]
        named[task_name("SimplerEnv's three tasks", budget)] = together(tasks, names)
    lines = []
    for first, second in pairs:
        seen = []
        for name, methods in named.items():
            pair = shared(methods.get(first, []), methods.get(second, []), first)
            successes = [[row["successes"] for row in rows] for rows in pair]
            # A budget may have both rows from its imitation's budget. They are drawn once.
            if not all(pair) or successes in seen:
                continue
            seen.append(successes)
            mean, half = interval(*pair)
            if half:
                lines.append((f"{label_of(name, second)} ({len(pair[1])})", mean, half))
    return lines


def draw_panel(axis: plt.Axes, title: str, lines: list[Line]) -> None:
    """One question: a dot and an interval per comparison, dark where it leaves out 0."""
    for y, (_, mean, half) in enumerate(lines):
        colour = "black" if abs(mean) > half else "0.6"
        axis.plot([mean - half, mean + half], [y, y], color=colour, linewidth=1.5)
        axis.plot([mean], [y], "o", color=colour, markersize=4)
    axis.axvline(0, color="tab:red", linewidth=0.8)
    axis.set(title=title, xlim=(-60, 80), ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)


def draw_differences(tasks: Tasks) -> None:
    """docs/summary.svg: all differences of the four questions, one panel each."""
    panels = {title: differences(tasks, pairs) for title, pairs in PANELS.items()}
    titles = list(panels)
    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    for column, half in zip(figure.subfigures(1, 2), (titles[:2], titles[2:])):
        heights = [len(panels[title]) + 1 for title in half]
        axes = column.subplots(2, 1, height_ratios=heights)
        for axis, title in zip(axes, half):
            draw_panel(axis, title, panels[title])
        column.supxlabel("difference in success, points", fontsize=8)
    figure.savefig(DOCS / "summary.svg", metadata={"Date": None})
    plt.close(figure)


def main(runs: list[str]) -> None:
    tasks = read_tasks(runs)
    same = share_imitations(tasks)
    between(DOCS.parent / "README.md", "table", front(tasks, spread=False))
    between(DOCS / "results.md", "table", front(tasks, spread=True))
    between(DOCS / "tables.md", "overview", overview(tasks))
    between(DOCS / "tables.md", "tables", appendix(tasks, same))
    draw_learning(front_rows(tasks))
    draw_differences(tasks)


if __name__ == "__main__":
    main(sys.argv[1:])
