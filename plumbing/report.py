"""What evaluation reports: intervals, tables, frames and videos. report.html is in page.py.

A *row* is a dict about one episode: `seed`, `success_once`, `success_at_end`, `return`,
`episode_len`, `furthest_stage` (0..K), `stage_steps` (K + 1 numbers; the last counts steps in
success), and what the task reports at success. A *result* is what results.json holds: the means of
the rows, the rows themselves as `episodes`, and the policy and command behind them.
docs/metrics.md and docs/data_format.md describe both.
Letters: T steps, K stages.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio
import numpy as np
import torch
from PIL import Image, ImageDraw

from world.tasks import Task, UserError, get_task

# The standard normal distribution holds 95 % between -Z and Z.
Z = 1.959964

# Keys of a row whose mean over the episodes is in the result, under the same name.
MEANS = ("success_once", "success_at_end", "return", "episode_len", "furthest_stage")

# Keys that `result_table` reads in a result, and in each of its rows.
RESULT_KEYS = {"method", "env_id", "success_once", "success_at_end", "stage_reach_rate", "episodes"}
ROW_KEYS = {"seed", "success_once"}

# How much `check_writable` writes. A result has a tenth of it.
PROBE_BYTES = 2**20


# ---- numbers ----
def wilson(successes: float, num_trials: int) -> tuple[float, float]:
    """The 95 % Wilson interval (low, high) of a share (Wilson 1927)."""
    share = successes / num_trials
    variance = share * (1 - share) / num_trials
    centre = share + Z * Z / (2 * num_trials)
    half_width = Z * math.sqrt(variance + Z * Z / (4 * num_trials * num_trials))
    scale = 1 + Z * Z / num_trials
    return (centre - half_width) / scale, (centre + half_width) / scale


def paired_difference(a: list[dict], b: list[dict]) -> dict:
    """How much more often b's episodes succeed than a's, over the seeds that both have.

    a, b: rows. Returns `difference`, the mean of success_once(b) - success_once(a), `low` and
    `high`, its 95 % interval, and `num_episodes`, the number of pairs.
    The interval adds two pairs first: half a pair won, half a pair lost, one without a difference.
    It is then the normal one (Agresti and Min 2005), and right for as few as 24 pairs.
    Raises UserError where a and b share fewer than two seeds.
    """
    before = {row["seed"]: row["success_once"] for row in a}
    pairs = [(before[row["seed"]], row["success_once"]) for row in b if row["seed"] in before]
    if len(pairs) < 2:
        raise UserError(
            "the two results share fewer than two seeds: "
            "evaluate both with the same --seed and --num-eval-episodes"
        )
    # Each entry is 1 (won), 0 or -1 (lost).
    diff = np.array([float(after) - float(first) for first, after in pairs])
    num_pairs = len(diff) + 2
    middle = diff.sum() / num_pairs
    # The added half pairs, one won and one lost, add 1 to the sum of squares.
    variance = np.abs(diff).sum() + 1 - diff.sum() ** 2 / num_pairs
    half_width = Z * math.sqrt(variance) / num_pairs
    return {
        "difference": diff.mean(),
        "low": middle - half_width,
        "high": middle + half_width,
        "num_episodes": len(diff),
    }


def mean_rows(rows: list[dict], num_stages: int) -> dict:
    """The means of an evaluation's rows, and the rows.

    Returns the means of `success_once`, `success_at_end`, `return`, `episode_len` (steps) and
    `furthest_stage`; `stage_reach_rate` (K,), the share of episodes that completed stage k, of
    which the last equals success_once; `stage_steps` (K,), the mean number of an episode's steps in
    stage k; and `episodes`, the rows.
    """
    # furthest_stage is K after success: stage k is completed where it is larger than k.
    furthest = np.array([row["furthest_stage"] for row in rows])
    steps = [row["stage_steps"][:num_stages] for row in rows]
    result = {name: float(np.mean([row[name] for row in rows])) for name in MEANS}
    result["stage_reach_rate"] = [float((furthest > k).mean()) for k in range(num_stages)]
    result["stage_steps"] = np.mean(steps, 0).tolist()
    result["episodes"] = rows
    return result


# ---- the learned separator ----
def separator_line(found: dict) -> str:
    """What `compare_separator` found, as a line of text."""
    return (
        f"learned separator against the rules: causal {found['causal_accuracy']:.3f}, "
        f"Viterbi {found['viterbi_accuracy']:.3f} of {found['num_steps']} steps right; "
        f"boundaries {found['boundary_error']:.2f} steps off, "
        f"{found['boundary_missed']:.3f} of them missed or made up"
    )


# ---- pictures ----
def draw(rgb: torch.Tensor, stage_name: str, potential: float, success: bool) -> np.ndarray:
    """A frame (H, W, 3) uint8 at twice its size, with the stage, Phi and success written on it."""
    height, width, _ = rgb.shape
    image = Image.fromarray(rgb.cpu().numpy()).resize((2 * width, 2 * height))
    text = f"{stage_name}  Phi {potential:.2f}"
    colour = (0, 0, 0)
    if success:
        text += "  success"
        colour = (0, 110, 0)
    # The bar behind the text keeps it readable on any frame.
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, 0, image.width, 14], fill=colour)
    pen.text((3, 1), text, fill=(255, 255, 255))
    return np.asarray(image)


def write_video(path: Path, episodes: list[list[np.ndarray]]) -> Path:
    """Writes an mp4 grid of episodes with 4 columns. Each episode is a list of T frames.

    Returns the path.
    """
    columns = min(4, len(episodes))
    # Black episodes fill the last row of the grid.
    black = [np.zeros_like(frame) for frame in episodes[0]]
    num_black = -len(episodes) % columns
    episodes = episodes + [black] * num_black
    starts = range(0, len(episodes), columns)
    grid = []
    for frames in zip(*episodes, strict=True):
        rows = [np.concatenate(frames[i : i + columns], 1) for i in starts]
        grid.append(np.concatenate(rows, 0))
    encode(path, grid)
    return path


def encode(path: Path, frames: list[np.ndarray]) -> None:
    """Writes an mp4 of frames (H, W, 3) uint8, ten a second. Raises an error of the encoder's."""
    with whole_file(path) as new:
        imageio.mimwrite(new, frames, fps=10, macro_block_size=None)
        # On a full disk the encoder stops early and raises nothing.
        with imageio.get_reader(new) as video:
            num_written = video.count_frames()
        if num_written != len(frames):
            raise RuntimeError(f"{num_written} of {len(frames)} frames were encoded")


# ---- tables ----
def label_of(result: dict) -> str:
    """A result's name in the table: its method, and what differs from the training conditions."""
    words = [result["method"]]
    ood = result.get("ood", "none")
    if ood != "none":
        words.append(ood)
    if result.get("instructions"):
        words.append("other words")
    return ", ".join(words)


def funnel(reach_rate: list[float]) -> list[float]:
    """P(stage k completed | stage k - 1 completed), NaN where no episode completed stage k - 1.

    reach_rate: (K,), the share of episodes that completed each stage.
    """
    shares = []
    before = 1
    for rate in reach_rate:
        shares.append(rate / before if before else math.nan)
        before = rate
    return shares


def success_percent(result: dict) -> tuple[float, float, float]:
    """A result's success, and the ends of its 95 % interval, in percent."""
    num_episodes = len(result["episodes"])
    success = result["success_once"]
    low, high = wilson(success * num_episodes, num_episodes)
    return 100 * success, 100 * low, 100 * high


def result_line(result: dict, width: int) -> str:
    """A result's line of the table: its label, success with its interval, and the stage funnel."""
    success, low, high = success_percent(result)
    line = f"{label_of(result):{width}s} {success:6.1f} % [{low:4.1f}, {high:5.1f}]"
    line += f" {100 * result['success_at_end']:5.1f} %   "
    line += " ".join(f"{100 * share:7.1f} %" for share in funnel(result["stage_reach_rate"]))
    return line


def difference_cell(before: dict, result: dict) -> str:
    """The paired difference of a result to the one before, with its interval."""
    found = paired_difference(before["episodes"], result["episodes"])
    line = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{line}, {found['num_episodes']} pairs"


def success_line(result: dict) -> str:
    """A result's success in words."""
    success, low, high = success_percent(result)
    return (
        f"{success:.1f} % [{low:.1f}, {high:.1f}] of {len(result['episodes'])} greedy episodes "
        f"of {result['env_id']} (95 % interval; `{result['command']}`)"
    )


def report_lines(result: dict, task: Task, width: int) -> list[str]:
    """A line for each quantity that the task reports at success."""
    lines = []
    for name in task.report:
        values = [row[name] for row in result["episodes"] if row["success_once"]]
        median = np.median(values) if values else math.nan
        largest = np.max(values, initial=0)
        lines.append(f"{'':{width}s} {name} at success: median {median:.3f}, largest {largest:.3f}")
    return lines


def result_table(results: list[dict]) -> str:
    """Text with a row per result: success, where episodes are lost, difference to the row before.

    Raises UserError where the results are of different tasks.
    """
    env_ids = [result["env_id"] for result in results]
    if len(set(env_ids)) > 1:
        raise UserError(f"these results are of different tasks: {', '.join(env_ids)}")
    task = get_task(env_ids[0])
    # The first column is as wide as its longest label.
    width = max(10, *[len(label_of(result)) for result in results])
    header = f"{'method':{width}s} {'success_once [95 %]':>22s} {'at_end':>7s}   "
    header += " ".join(f"{name:>9s}" for name in task.stages)
    lines = [f"{header}   difference to the row above [95 %]"]
    for i, result in enumerate(results):
        line = result_line(result, width)
        # The first result has none to compare with.
        if i > 0:
            line += f"   {difference_cell(results[i - 1], result)}"
        lines.append(line)
        lines += report_lines(result, task, width)
    counts = ", ".join(str(len(result["episodes"])) for result in results)
    lines.append(
        f"{task.instruction!r}: {counts} greedy episodes; "
        "a stage's column is P(stage completed | stage before completed)"
    )
    return "\n".join(lines)


def check_same_episodes(results: list[dict]) -> None:
    """Raises UserError where the same seed may stand for different episodes.

    GPU simulation draws a whole batch of episodes from its first seed.
    """
    kinds = set()
    for result in results:
        # Older results are of a CPU, where a seed decides its episode.
        on_gpu = result.get("backend") == "cuda"
        kinds.add(("cuda", result["num_envs"]) if on_gpu else ("cpu", 0))
    if len(kinds) > 1:
        raise UserError(
            "a seed stands for other episodes in GPU simulation: evaluate all policies with the "
            "same --backend and --num-envs"
        )


# ---- files ----
def read_results(path: str) -> dict:
    """A results.json of eval.py. Raises UserError on anything else."""
    try:
        result = json.loads(Path(path).read_text())
        complete = RESULT_KEYS <= result.keys()
        complete &= all(ROW_KEYS <= row.keys() for row in result["episodes"])
        if complete:
            # It raises an error where numbers are missing.
            result_table([result])
    # A file may hold anything.
    except Exception:
        complete = False
    if not complete:
        raise UserError(
            f"cannot read {path}: --compare takes results.json files written by eval.py"
        )
    return result


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write to, and renames that file to `path` at the end.

    So no reader sees half a file. Where the writing fails, nothing is left.
    """
    # Libraries read the format from the suffix, so it stays.
    new = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    with whole_file(path) as new:
        new.write_text(text)


def check_writable(folder: Path) -> None:
    """Makes a folder and writes a file there, because hours of work may end in writing to it.

    Raises UserError where that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A full disk still takes an empty file.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): give another --output-dir"
        ) from None


def if_possible(what: str, make: Callable, *args) -> object:
    """Returns make(*args). Where that fails, it prints a warning and returns None.

    what: the name in the warning. It is for pictures and videos: the numbers are written already.
    """
    try:
        return make(*args)
    # An encoder and a plotting library raise errors of their own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"warning: {what} is not written: {reason[-1]}")
        return None
