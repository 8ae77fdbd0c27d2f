"""The docs say what the scripts do: metrics are listed both ways, links point at the lines that they quote, every flag of a command exists."""
import json
import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, scalars

sys.path.insert(0, str(ROOT / "benchmark"))
import links

import eval as evaluation
import sft
import sta_ppo
import sta_tpo

PAGES = sorted((ROOT / "docs").glob("*.md"))


def documented(column: int) -> set[str]:
    """Keys of docs/metrics.md that have an x in this column."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {key for cells in rows if cells[column].strip() == "x" for key in re.findall("`(.*?)`", cells[0])}


@pytest.mark.parametrize(("column", "script"), [(1, "sft_run"), (2, "tpo_run"), (3, "ppo_run")])
def test_logged_metrics_are_the_documented_ones(column, script, request):
    logged = {re.sub(r"^stage/\d_[a-z]+_", "stage/{k}_{name}_", key) for key in scalars(request.getfixturevalue(script))}
    # only the last run of the chain is evaluated; what an evaluation logs is the same in all three scripts
    evaluated = {key for key in scalars(request.getfixturevalue("ppo_run")) if key.startswith("eval/")} | {"time/eval"}
    assert logged | evaluated == documented(column)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_at_the_lines_that_they_quote(page):
    """Else: python benchmark/links.py"""
    assert links.relinked(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_flags_in_the_docs_exist(page):
    scripts = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
    for name, line in re.findall(r"python (sft|sta_tpo|sta_ppo|eval)\.py([^`\n#]*)", page.read_text()):
        for flag in re.findall(r"--([a-z-]+)", line):
            if flag == "help":
                continue
            field = flag.removeprefix("no-").replace("-", "_")
            assert field in scripts[name].Args.__dataclass_fields__, f"{name}.py --{flag}"


def test_every_file_is_described(sft_run, tpo_run, ppo_run):
    page = (ROOT / "docs/data_format.md").read_text() + (ROOT / "docs/metrics.md").read_text()
    (demos,) = sft_run.glob("demos_*.h5")
    names = {path.name for run in (sft_run, tpo_run, ppo_run) for path in (run / "checkpoint").iterdir() if path.name.split("_")[0].split(".")[0] not in
             ("tokenizer", "processor")}  # fmt: skip
    with h5py.File(demos) as file:
        file["traj_0"].visititems(lambda name, item: names.add(name) if isinstance(item, h5py.Dataset) and name != "success" else None)
    names |= set(np.load(next((tpo_run / "rollouts").glob("*.npz"))))
    names |= {"norm_stats", *json.loads((sft_run / "checkpoint/config.json").read_text())["norm_stats"]["PickCube-v1"]}
    assert len(names) > 20 and sorted(name for name in names if f"`{name}" not in page) == []


def test_demonstrations_recorded_as_the_page_says_can_be_read(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data_format.md").read_text(), re.S)
    (tmp_path / "record.py").write_text(block)
    subprocess.run([sys.executable, "record.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    rgb, proprio, actions, geometry, stage = sft.read_demos(tmp_path / "mine.h5", "PushCube-v1", 1)
    assert rgb.shape == (20, 128, 128, 3) and proprio.shape == geometry.shape == (20, 8) and actions.shape == (20, 7) and (stage == -1).all()
    assert actions[:, :3].abs().max() > 0.5 and rgb.float().std() > 10
