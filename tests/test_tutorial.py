"""docs/tutorial.md, run as it stands."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, scalars


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("sft.py", "sta_tpo.py", "sta_ppo.py", "eval.py", "stare_utils.py", "vla.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "checkpoints", copy / "checkpoints")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.S)
    assert len(blocks) == 3
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    for block in blocks:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=copy, env=environ, check=True)
    before, after = ({line.split()[0]: float(line.split()[-1]) for line in (copy / f"{name}.txt").read_text().splitlines()} for name in ("before", "after"))
    assert after["reach"] > before["reach"] + 0.05 and all(after[name] == before[name] for name in ("grasp", "transport", "place"))
    single, double = (scalars(copy / f"runs/{name}") for name in ("tutorial", "tutorial_double"))
    assert single["charts/shaped_return"][0] != double["charts/shaped_return"][0] and single["losses/advantage_std"][0] != double["losses/advantage_std"][0]
