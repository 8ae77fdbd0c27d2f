"""What a step costs: ManiSkill's own way, this repository at 1eeaf82, and today, in one run.

    python benchmark/speed.py
        about 20 minutes on two idle CPU cores
    python benchmark/speed.py --env-ids PickCube-v1
        one task instead of five

Each figure is the median of three measurements. Old and new code are measured in turn, because a
virtual machine's speed changes from minute to minute. The tables go to docs/speed.md, the figures
to docs/speed.jsonl. benchmark/speed_part.py makes the single figures.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
# Tasks with small and large scenes, of both robots.
TASKS = (
    "PickCube-v1",
    "StackCube-v1",
    "PegInsertionSide-v1",
    "PutCarrotOnPlateInScene-v1",
    "PutEggplantInBasketScene-v1",
)
# The code of each column.
COLUMNS = ("stock", "1eeaf82", "today")


@dataclass
class Args:
    before: str = ""
    """folder with the code of 1eeaf82; empty: git writes it into a temporary folder"""
    env_ids: tuple[str, ...] = TASKS
    """tasks whose env steps are measured"""
    repeats: int = 3
    """measurements of each figure, whose median is reported"""


def run(code: Path, *command: str) -> str:
    """The output of a Python script with the code in a folder."""
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if code == ROOT:
        # The scripts set it themselves. speed_part.py imports torch before it knows the code.
        environ["GOMP_SPINCOUNT"] = "10000"
    done = subprocess.run(
        [sys.executable, *command], cwd=code, env=environ, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {code} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def part(code: Path, name: str, env_id: str = "PickCube-v1", num: int = 1) -> float:
    """A figure of benchmark/speed_part.py. num: env processes, or observations of a batch."""
    script = str(ROOT / "benchmark/speed_part.py")
    options = ["--env-id", env_id, "--num-envs", str(num), "--code", str(code)]
    return float(run(code, script, name, *options).split()[-1])


def training_rate(code: Path) -> float:
    """Env steps per second of sta_ppo.py on PickCube-v1, roll-out and update, as it prints them."""
    with tempfile.TemporaryDirectory() as folder:
        output = run(
            code,
            "sta_ppo.py",
            *["--checkpoint", str(ROOT / "checkpoints/PickCube-v1__sft")],
            *["--total-timesteps", "2400", "--num-eval-episodes", "0"],
            *["--output-dir", str(Path(folder, "run"))],
        )
    rates = [float(found) for found in re.findall(r"SPS (\d+)", output)]
    # The first update allocates and is not counted.
    return statistics.median(rates[1:])


def evaluation_seconds(code: Path) -> float:
    """Seconds of `python eval.py` with 32 episodes of PickCube-v1, from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(
            code,
            "eval.py",
            *["--checkpoint", str(ROOT / "checkpoints/PickCube-v1__sft")],
            *["--env-id", "PickCube-v1", "--num-eval-episodes", "32", "--output-dir", folder],
        )
        return time.perf_counter() - start


# ---- the table of old and new ----
def measurements(args: Args, before: Path) -> list[tuple[str, bool, dict]]:
    """(label, whether more is better, column -> function that measures) of each row."""
    rows = []
    for env_id in args.env_ids:
        row = {
            "stock": lambda env_id=env_id: part(ROOT, "stock", env_id),
            "1eeaf82": lambda env_id=env_id: part(before, "env", env_id),
            "today": lambda env_id=env_id: part(ROOT, "env", env_id),
        }
        rows.append((f"{env_id}, one env process, env steps/s", True, row))
    for label, name, num in (
        ("8 env processes start, s", "start", 8),
        ("8 actions in one thread, ms", "sample", 8),
        ("32 actions in one thread, ms", "sample", 32),
        ("a minibatch of 128, ms", "update", 128),
    ):
        row = {
            "1eeaf82": lambda name=name, num=num: part(before, name, num=num),
            "today": lambda name=name, num=num: part(ROOT, name, num=num),
        }
        rows.append((label, False, row))
    row = {"1eeaf82": lambda: training_rate(before), "today": lambda: training_rate(ROOT)}
    rows.append(("`sta_ppo.py`, 8 envs, roll-out and update, env steps/s", True, row))
    row = {
        "1eeaf82": lambda: evaluation_seconds(before),
        "today": lambda: evaluation_seconds(ROOT),
    }
    rows.append(("`eval.py`, 32 episodes from start to end, s", False, row))
    return rows


def measure(args: Args, before: Path) -> dict[str, dict[str, float]]:
    """Label -> column -> median. Also `faster`, the factor between 1eeaf82 and today."""
    found = {}
    for label, more_is_better, row in measurements(args, before):
        values = {column: [] for column in row}
        for _ in range(args.repeats):
            for column, measure_one in row.items():
                values[column].append(measure_one())
        medians = {column: statistics.median(numbers) for column, numbers in values.items()}
        factor = medians["today"] / medians["1eeaf82"]
        medians["faster"] = factor if more_is_better else 1 / factor
        found[label] = medians
        print(label, medians, flush=True)
    return found


# ---- where the time goes ----
def shares(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds of one core per env step of sta_ppo.py on PickCube-v1, and the limit."""
    cores = os.cpu_count()
    floor = part(ROOT, "floor")
    without_pictures = 1000 / part(ROOT, "physics")
    env = 1000 / found["PickCube-v1, one env process, env steps/s"]["today"]
    sampling = found["8 actions in one thread, ms"]["today"] / 8
    # Two epochs, on all cores.
    updating = 2 * cores * found["a minibatch of 128, ms"]["today"] / 128
    arithmetic = part(ROOT, "arithmetic")
    drawing = env - without_pictures
    return {
        "physics and inverse kinematics": floor,
        "drawing": drawing,
        "Python around one env": without_pictures - floor,
        "policy": sampling,
        "update": updating,
        "sum": env + sampling + updating,
        "limit: physics, drawing, and the model's arithmetic": floor + drawing + arithmetic,
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures of old and new as a table of Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " | faster |", "|---|---|---|---|---|"]
    for label, medians in found.items():
        cells = [f"{medians[c]:.3g}" if c in medians else "" for c in COLUMNS]
        lines.append(f"| {label} | {' | '.join(cells)} | {medians['faster']:.1f} |")
    return "\n".join(lines)


def share_table(parts: dict[str, float]) -> str:
    """The parts of a step as a table of Markdown."""
    lines = ["| ms of one core per env step | ms | share, % |", "|---|---|---|"]
    for label, ms in parts.items():
        lines.append(f"| {label} | {ms:.1f} | {100 * ms / parts['sum']:.0f} |")
    return "\n".join(lines)


def write_page(tables: str) -> None:
    """Puts the tables into docs/speed.md."""
    page = ROOT / "docs/speed.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->")[2]
    page.write_text(f"{before}<!-- table -->\n{tables}\n<!-- /table -->{after}")


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = Path(args.before or folder)
        if not args.before:
            archive = subprocess.run(["git", "archive", "1eeaf82"], cwd=ROOT, capture_output=True)
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        found = measure(args, before)
    parts = shares(found)
    write_page(table(found) + "\n\n" + share_table(parts))
    rows = {"cores": os.cpu_count(), "rows": found, "ms_per_step": parts}
    (ROOT / "docs/speed.jsonl").write_text(json.dumps(rows) + "\n")
    print(share_table(parts))


if __name__ == "__main__":
    main(tyro.cli(Args))
