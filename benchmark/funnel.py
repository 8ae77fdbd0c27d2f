"""Stage completion over env steps, from the logs of PPO runs.

    python benchmark/funnel.py runs/*__forms

Prints a table per run: the share of the latest training episodes (sampled actions) that completed
each stage, their success, and the stage reward paid per stage.
"""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    """The scalars of a run: tag -> step -> value."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def print_run(run: Path, rows: int = 12) -> None:
    """One table, with about as many rows."""
    scalars = read_scalars(run)
    success = scalars.get("charts/success_once", {})
    stages = sorted(
        tag.split("/")[1].removesuffix("_reached") for tag in scalars if "_reached" in tag
    )
    print(f"\n{run}\n{'env steps':>9s} {'success':>8s}", *(f"{stage:>18s}" for stage in stages))
    steps = sorted(success)
    for step in steps[:: max(1, len(steps) // rows)]:
        cells = []
        for stage in stages:
            reached = scalars[f"stage/{stage}_reached"][step]
            paid = scalars[f"stage/{stage}_paid"].get(step, float("nan"))
            cells.append(f"{100 * reached:7.1f} % ({paid:+.3f})")
        print(f"{step:9d} {100 * success[step]:6.1f} %", *cells)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print_run(Path(name))
