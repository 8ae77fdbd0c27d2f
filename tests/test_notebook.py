"""docs/stare_in_an_hour.ipynb, run from top to bottom as it stands."""

import os
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs/stare_in_an_hour.ipynb"
SCRIPTS = ("sft.py", "sta_tpo.py", "sta_ppo.py", "eval.py", "stare_utils.py", "vla.py")
FOLDERS = ("world", "plumbing", "benchmark", "checkpoints/PickCube-v1__sft")


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells of a notebook have printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def check_results(notebook: nbformat.NotebookNode) -> None:
    """Checks what the text of the notebook says of its results."""
    text = printed(notebook)
    # A steeper reach is paid more, and the other stages the same.
    after_edit = text.split("L = 0.05\n")[1]
    paid = re.findall(r"^(\w+) +([+-][\d.]+)  ([+-][\d.]+)$", after_edit, re.M)
    assert [stage for stage, *_ in paid] == ["reach", "grasp", "transport", "place"]
    assert float(paid[0][2]) > float(paid[0][1]) + 0.05
    assert all(old == new for _, old, new in paid[1:])
    # An invariant reward teaches nothing to a policy that never succeeds. The others do.
    largest = dict(re.findall(r"^(\w+) +largest advantage ([\d.]+)$", text, re.M))
    assert float(largest.pop("shaping")) < 1e-5
    assert sorted(largest) == ["gain", "paced", "progress"]
    assert all(float(advantage) > 0.01 for advantage in largest.values())
    # The policy is better after interaction.
    imitation, interaction = re.findall(r"^(SFT|STA-PPO) +([\d.]+) % \[", text, re.M)
    assert (imitation[0], interaction[0]) == ("SFT", "STA-PPO")
    assert float(interaction[1]) > float(imitation[1])


def test_the_outputs_that_are_shown_are_those_of_a_full_run():
    notebook = nbformat.read(NOTEBOOK, 4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check_results(notebook)
    text = NOTEBOOK.read_text()
    assert text.count("<video") == 2 and text.count("image/png") == 4
    assert NOTEBOOK.stat().st_size < 2_000_000
    # Nothing tells of the machine on which it was run.
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(NOTEBOOK, 4)
    monkeypatch.setitem(os.environ, "PYTHONPATH", "")
    resources = {"metadata": {"path": tmp_path / "docs"}}
    # A cell that fails raises an error here.
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    check_results(notebook)
