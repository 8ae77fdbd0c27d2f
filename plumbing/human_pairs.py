"""Preferences by a person: pairs of segments go out as clips, verdicts come back as pairs.

A *pair* is a dict of sta_tpo.py: `stage`, `chosen` and `rejected` (roll-outs by number), `reason`,
`cost_chosen` and `cost_rejected`. `segments[i][k]` are the steps of roll-out i's segment k, a long
tensor. Where trajectories are not cut into stages, `segments[i]` is [all its steps].
"""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.report import encode, write_text
from world.tasks import UserError

# What pairs.jsonl calls the two roll-outs of a pair.
SIDES = ("left", "right")


# ---- clips go out ----
def side_by_side(films: list[np.ndarray]) -> np.ndarray:
    """Two films (T, H, W, 3) uint8 as one, with a white bar between them.

    The shorter film stands still at its end.
    """
    longest = max(len(film) for film in films)
    padded = []
    for film in films:
        missing = longest - len(film)
        padded.append(np.pad(film, ((0, missing), (0, 0), (0, 0), (0, 0)), "edge"))
    left, right = padded
    bar = np.full_like(left[:, :, :12], 255)
    return np.concatenate([left, bar, right], 2)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Writes an mp4 of frames (T, H, W, 3) uint8. Raises UserError where that fails."""
    try:
        encode(path, list(frames))
    # An encoder raises errors of its own.
    except Exception as error:
        raise UserError(
            f"cannot write {path} ({error}): mend that (imageio-ffmpeg, or the disk), then give "
            "this command again with --output-dir, --resume and an empty --export-pairs folder"
        ) from None


def film_of(rgb: torch.Tensor, first: int, last: int) -> np.ndarray:
    """The frames of a segment at three times their size.

    rgb: (T, H, W, 3) uint8, of the roll-out. first, last: steps. Returns (M, 3 H, 3 W, 3) uint8.
    """
    # The frame after the segment shows the event that ends it.
    frames = rgb[first : last + 2].numpy()
    # A clip of 128 pixels would be too small to judge.
    return np.repeat(np.repeat(frames, 3, 1), 3, 2)


def export_pairs(
    folder: Path,
    pairs: list[dict],
    rollouts: list[dict],
    segments: list[list[torch.Tensor]],
    names: list[str],
    stages: tuple[str, ...],
    instruction: str,
    seed: int,
    output: Path,
    progress=tqdm,
) -> None:
    """Writes a clip per pair, its two segments side by side in random order, and pairs.jsonl.

    rollouts: each with `rgb` (T, H, W, 3) uint8. names: of the roll-outs. stages: names of the
    segments. seed: of the order of sides. output: the run's folder, for the message at the end.
    A line of pairs.jsonl holds `clip`, `stage`, `stage_name`, `instruction`, `left` and `right`
    (names of roll-outs), `left_steps` and `right_steps` ([first, last]), and `preferred`, null.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, pair in enumerate(progress(pairs, desc="clips", unit="pair")):
        stage = pair["stage"]
        row = {
            "clip": f"pair_{number:04d}.mp4",
            "stage": stage,
            "stage_name": stages[stage],
            "instruction": instruction,
        }
        films = []
        # The side must not tell the person which segment the rules prefer.
        order = rng.permutation([pair["chosen"], pair["rejected"]])
        for side, i in zip(SIDES, order, strict=True):
            first, last = segments[i][stage][[0, -1]].tolist()
            row[side] = names[i]
            row[f"{side}_steps"] = [first, last]
            films.append(film_of(rollouts[i]["rgb"], first, last))
        path = folder / row["clip"]
        write_clip(path, side_by_side(films))
        # The person writes the verdict here.
        row["preferred"] = None
        lines.append(json.dumps(row))
    # pairs.jsonl comes last: where it is, all clips are.
    write_text(folder / "pairs.jsonl", "\n".join(lines) + "\n")
    print(
        f"wrote {len(pairs)} clips. Fill in {folder}/pairs.jsonl, then give this command again "
        f"with --output-dir {output} --resume --preferences {folder}/pairs.jsonl "
        "in place of --export-pairs"
    )


# ---- verdicts come back ----
def read_row(
    line: str, index: dict[str, int], segments: list[dict[int, torch.Tensor]]
) -> tuple[dict, int, int, bool]:
    """A line of pairs.jsonl, its left and right roll-out by number, and whether it is of this run.

    index: the number of each roll-out by name. segments: of each roll-out, by stage.
    Raises ValueError, LookupError, TypeError or RecursionError where the line cannot be read.
    """
    row = json.loads(line)
    found = []
    same_steps = []
    for side in SIDES:
        i = index[row[side]]
        steps = segments[i][row["stage"]].tolist()
        found.append(i)
        # Other flags cut the same roll-outs at other steps.
        same_steps.append([steps[0], steps[-1]] == row[f"{side}_steps"])
    return row, *found, all(same_steps)


def judged_pair(stage: int, left: int, right: int, verdict: str) -> dict:
    """The pair that a verdict makes of two roll-outs.

    A tie keeps its order; sta_tpo.py then takes the loss of both orders.
    """
    chosen = left
    rejected = right
    if verdict == "right":
        chosen = right
        rejected = left
    # Without costs, because the person's verdict alone counts.
    return {
        "stage": stage,
        "chosen": chosen,
        "rejected": rejected,
        "reason": "tie" if verdict == "tie" else "human",
        "cost_chosen": 0.0,
        "cost_rejected": 0.0,
    }


def read_preferences(
    path: Path, rollouts: list[dict], segments: list[list[torch.Tensor]], names: list[str]
) -> list[dict]:
    """The pairs that a person has judged in a pairs.jsonl, in its order.

    rollouts: each with `init_seed`. names: of the roll-outs. `reason` is "human", or "tie": a tie
    has no winner, so its loss must be the mean over both orders. The costs are 0.
    Raises UserError where there is no verdict, and names the line where one cannot be read, is not
    of this run, or has a verdict other than left, right, tie and null.
    """
    index = {name: i for i, name in enumerate(names)}
    # Stages are looked up in a dict, because -1 would be the last one of a list.
    by_stage = [dict(enumerate(steps)) for steps in segments]
    text = path.read_text(errors="replace")
    # Numbers of lines are those of the file, with its empty lines.
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    pairs = []
    for number, line in lines:
        place = f"{path} line {number}"
        try:
            row, left, right, same_steps = read_row(line, index, by_stage)
            verdict = row["preferred"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"{place} cannot be read: {type(error).__name__} {error}; "
                "it must name two roll-outs of this run and a stage"
            ) from None
        one_start = rollouts[left]["init_seed"] == rollouts[right]["init_seed"]
        if not same_steps or left == right or not one_start:
            raise UserError(
                f"{place} is not a pair of this run: "
                "train with the flags and the --output-dir of --export-pairs"
            )
        if verdict is None:
            continue
        if verdict not in ("left", "right", "tie"):
            raise UserError(
                f'{place}: "preferred" is {verdict!r}, not "left", "right", "tie" or null'
            )
        pairs.append(judged_pair(int(row["stage"]), left, right, verdict))
    if not pairs:
        raise UserError(
            f'{path} has no verdict yet: write "left", "right" or "tie" behind "preferred"'
        )
    print(f"{len(pairs)} of {len(lines)} lines of {path} are filled in")
    return pairs
