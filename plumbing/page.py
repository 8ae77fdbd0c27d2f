"""The page report.html of an evaluation: one file, which needs no network.

What a person would look at first is on top: success, the stages in which episodes are lost, and
the episodes themselves, which can be filtered by that stage. plumbing/report.html is its form.
Letters: T steps, K stages.
"""

import base64
import html
import io
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np

from plumbing.report import (
    encode,
    funnel,
    if_possible,
    label_of,
    success_percent,
    write_text,
)
from world.tasks import get_task

FORM = Path(__file__).with_name("report.html")

# Another version may round or render differently.
PACKAGES = ("torch", "transformers", "mani_skill", "sapien", "numpy")

# The TensorBoard scalars that a page shows, where the run has them.
CURVES = (
    "charts/success_once",
    "charts/shaped_return",
    "losses/explained_variance",
    "losses/ce",
    "losses/action_l1",
    "rewards/margins",
    "logps/chosen",
)


def outcome_of(row: dict, stages: tuple[str, ...]) -> str:
    """How an episode ended, in words. row: see plumbing/report.py."""
    if row["success_once"]:
        return "solved"
    return f"lost in {stages[row['furthest_stage']]}"


def count_outcomes(rows: list[dict], stages: tuple[str, ...]) -> dict[str, int]:
    """The number of episodes of each outcome that there is, in the order of the stages."""
    counts = Counter(outcome_of(row, stages) for row in rows)
    order = ["solved", *[f"lost in {stage}" for stage in stages]]
    return {name: counts[name] for name in order if counts[name]}


def filter_buttons(rows: list[dict], stages: tuple[str, ...]) -> str:
    """A button for all episodes, and one for each outcome."""
    buttons = [f'<button value="all">all {len(rows)}</button>']
    for name, count in count_outcomes(rows, stages).items():
        buttons.append(f'<button value="{name}">{name} {count}</button>')
    return " ".join(buttons)


def funnel_rows(result: dict, stages: tuple[str, ...]) -> str:
    """A table row for each stage: who completed it, of all and of those that came so far."""
    rates = result["stage_reach_rate"]
    lines = []
    for stage, rate, share, steps in zip(stages, rates, funnel(rates), result["stage_steps"]):
        # Where no episode came so far, the share is NaN.
        of_those = "&ndash;" if np.isnan(share) else f"{100 * share:.1f} %"
        lines.append(
            f'<tr><th>{stage}</th><td class="number">{100 * rate:.1f} %</td>'
            f'<td class="bar"><div style="width:{100 * rate:.1f}%"></div></td>'
            f'<td class="number">{of_those}</td><td class="number">{steps:.1f}</td></tr>'
        )
    return "\n".join(lines)


def episode_rows(rows: list[dict], stages: tuple[str, ...]) -> str:
    """A table row for each episode."""
    lines = []
    for row in rows:
        name = outcome_of(row, stages)
        at_end = "yes" if row["success_at_end"] else "no"
        lines.append(
            f'<tr data-outcome="{name}"><td class="number">{row["seed"]}</td><td>{name}</td>'
            f'<td>{at_end}</td><td class="number">{row["episode_len"]}</td></tr>'
        )
    return "\n".join(lines)


def film_figure(film: list[np.ndarray], row: dict, stages: tuple[str, ...]) -> str:
    """An episode as a video inside the page. film: T frames (H, W, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        encode(path, film)
        data = base64.b64encode(path.read_bytes()).decode()
    name = outcome_of(row, stages)
    return (
        f'<figure data-outcome="{name}">'
        f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline controls>'
        f"</video><figcaption>{name}, seed {row['seed']}</figcaption></figure>"
    )


def curves_svg(run: Path) -> str:
    """The curves that a run's TensorBoard files hold, side by side. Empty where it has none."""
    # Matplotlib takes a second to load, and training scripts do not need it.
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run)).Reload()
    names = [name for name in CURVES if name in log.Tags()["scalars"]]
    if not names:
        return ""
    figure = Figure((3 * len(names), 2.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        points = log.Scalars(name)
        axis.plot([point.step for point in points], [point.value for point in points])
        axis.set_title(name, fontsize=9)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    # The lines before the picture belong to a file of its own.
    svg = drawn.getvalue()
    return f"<h2>Training</h2>\n{svg[svg.index('<svg') :]}"


def text(value: object) -> str:
    """A value as it is shown. A stranger's checkpoint may say anything."""
    return html.escape(str(value))


def origin_text(result: dict, trained: dict) -> str:
    """How the policy and the result were made. trained: the checkpoint's args.json."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"Trained by <code>{text(trained.get('command', 'unknown'))}</code> "
        f"({text(trained.get('env_steps'))} env steps, {text(trained.get('wall_s'))} s), "
        f"evaluated by <code>{text(result['command'])}</code> "
        f"at commit {text(result['commit'] or 'unknown')}. "
        f"Python {sys.version.split()[0]}, {versions}. Every flag: the checkpoint's args.json."
    )


def film_figures(path: Path, films: list, rows: list[dict], stages: tuple[str, ...]) -> str:
    """The films of the first episodes, and a sentence that says how many there are."""
    if not films:
        return "<p>Not filmed: eval.py films with --capture-video.</p>"
    figures = []
    for film, row in zip(films, rows):
        figure = if_possible(f"a film of {path}", film_figure, film, row, stages)
        # The encoder would fail again.
        if figure is None:
            return "<p>The films could not be encoded.</p>"
        figures.append(figure)
    count = f"<p>The first {len(figures)} of {len(rows)} episodes are filmed.</p>"
    return "\n".join([count, '<div class="films">', *figures, "</div>"])


def write_page(
    path: Path,
    result: dict,
    trained: dict,
    table: str,
    films: list[list[np.ndarray]],
    run: Path,
) -> None:
    """Writes the page of a result.

    trained: the checkpoint's args.json. table: what `result_table` returned. films: the frames of
    the first episodes. run: the policy's run folder, which has its training curves.
    What cannot be drawn is left out with a warning.
    """
    rows = result["episodes"]
    stages = get_task(result["env_id"]).stages
    success, low, high = success_percent(result)
    page = Template(FORM.read_text()).substitute(
        title=text(f"{label_of(result)} on {result['env_id']}"),
        success=f"{success:.1f} % of {len(rows)} greedy episodes solved "
        f"(95 % interval {low:.1f} to {high:.1f})",
        funnel=funnel_rows(result, stages),
        filters=filter_buttons(rows, stages),
        films=film_figures(path, films, rows, stages),
        count=len(rows),
        rows=episode_rows(rows, stages),
        curves=if_possible(f"a curve of {path}", curves_svg, run) or "",
        table=text(table),
        origin=origin_text(result, trained),
    )
    write_text(path, page)
