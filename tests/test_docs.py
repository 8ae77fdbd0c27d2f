"""The docs say what the scripts do.

Metrics are listed both ways, links point at the lines that they quote, every flag of a command
exists, and every file is described.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, scalars

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
from world.demos import read_demos
from world.tasks import TASKS

sys.path.insert(0, str(ROOT / "benchmark"))
import links

PAGES = sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}


def documented(column: int) -> set[str]:
    """Keys of docs/metrics.md that have an x in this column."""
    keys = set()
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = line.split("|")[1:-1]
            if cells[column].strip() == "x":
                keys |= set(re.findall("`(.*?)`", cells[0]))
    return keys


@pytest.mark.parametrize(("column", "script"), [(1, "sft_run"), (2, "tpo_run"), (3, "ppo_run")])
def test_logged_metrics_are_the_documented_ones(column, script, request):
    logged = set()
    for key in scalars(request.getfixturevalue(script)):
        logged.add(re.sub(r"^stage/\d_[a-z]+_", "stage/{k}_{name}_", key))
    # Only the last run of the chain is evaluated. An evaluation logs the same in all scripts.
    last_run = scalars(request.getfixturevalue("ppo_run"))
    evaluated = {key for key in last_run if key.startswith("eval/")} | {"time/eval"}
    assert logged | evaluated == documented(column)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_at_the_lines_that_they_quote(page):
    """Where it fails, `python benchmark/links.py` writes the line numbers again."""
    assert links.relinked(page.read_text()) == page.read_text()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_between_pages_have_a_target(page):
    for name, anchor in re.findall(r"\]\(([^)#:\s]*)#?([^)\s:]*)\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        if target.suffix == ".md" and anchor:
            assert anchor in anchors(target), f"{name}#{anchor}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_files_that_the_docs_name_exist(page):
    folders = "world|plumbing|tests|benchmark|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/-]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_flags_in_the_docs_exist(page):
    commands = re.findall(r"python (sft|sta_tpo|sta_ppo|eval)\.py([^`\n#]*)", page.read_text())
    for name, line in commands:
        for flag in re.findall(r"--([a-z-]+)", line):
            if flag == "help":
                continue
            field = flag.removeprefix("no-").replace("-", "_")
            assert field in SCRIPTS[name].Args.__dataclass_fields__, f"{name}.py --{flag}"


@pytest.mark.parametrize("env_id", TASKS)
def test_the_length_scales_of_the_page_are_those_of_the_task(env_id):
    page = (ROOT / "docs" / "tasks.md").read_text()
    section = page.split(f"### {env_id}\n")[1].split("\n##")[0]
    rows = re.findall(r"^\| (\w+) \|.*\| ([\d.]+) \|$", section, re.M)
    expected = [(stage.name, f"{stage.length:g}") for stage in TASKS[env_id].stage_table]
    assert rows == expected


def test_every_file_is_described(sft_run, tpo_run, ppo_run):
    page = (ROOT / "docs/data_format.md").read_text() + (ROOT / "docs/metrics.md").read_text()
    names = set()
    for run in (sft_run, tpo_run, ppo_run):
        for path in (run / "checkpoint").iterdir():
            # HuggingFace's own files have no line of their own.
            if path.name.split("_")[0].split(".")[0] not in ("tokenizer", "processor"):
                names.add(path.name)
    (demos,) = sft_run.glob("demos_*.h5")
    with h5py.File(demos) as file:

        def add(name: str, item) -> None:
            if isinstance(item, h5py.Dataset) and name != "success":
                names.add(name)

        file["traj_0"].visititems(add)
    names |= set(np.load(next((tpo_run / "rollouts").glob("*.npz"))))
    config = json.loads((sft_run / "checkpoint/config.json").read_text())
    names |= {"norm_stats", *config["norm_stats"]["PickCube-v1"]}
    assert len(names) > 20
    assert sorted(name for name in names if f"`{name}" not in page) == []


def test_demonstrations_recorded_as_the_page_says_can_be_read(tmp_path):
    page = (ROOT / "docs/data_format.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "record.py").write_text(block)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "record.py"]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True, timeout=300)
    demos = read_demos(tmp_path / "mine.h5", "PushCube-v1", 1)
    rgb, proprio, actions, geometry, stage = demos
    assert rgb.shape == (20, 128, 128, 3)
    assert proprio.shape == geometry.shape == (20, 8)
    assert actions.shape == (20, 7)
    assert (stage == -1).all()
    assert actions[:, :3].abs().max() > 0.5 and rgb.float().std() > 10
