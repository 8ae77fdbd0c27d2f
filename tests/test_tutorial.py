"""docs/tutorial.md, run as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, scalars

SCRIPTS = ("sft.py", "sta_tpo.py", "sta_ppo.py", "eval.py", "stare_utils.py", "vla.py")
FOLDERS = ("world", "plumbing", "checkpoints")


def paid(printed: Path) -> dict[str, float]:
    """What look.py printed that each stage is paid."""
    words = [line.split() for line in printed.read_text().splitlines()]
    return {stage: float(reward) for stage, *_, reward in words}


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name)
    page = (ROOT / "docs/tutorial.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": "",
    }
    for block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block]
        subprocess.run(command, cwd=copy, env=environ, check=True)
    before = paid(copy / "before.txt")
    after = paid(copy / "after.txt")
    assert after["reach"] > before["reach"] + 0.05
    assert all(after[name] == before[name] for name in ("grasp", "transport", "place"))
    single = scalars(copy / "runs/tutorial")
    double = scalars(copy / "runs/tutorial_double")
    for name in ("charts/shaped_return", "losses/advantage_std"):
        assert single[name][0] != double[name][0]
