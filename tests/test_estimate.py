"""What ./ipi.sh says at its start: how long it will take on this machine."""

import re
import sys

import pytest
from conftest import ROOT, output_of

sys.path.insert(0, str(ROOT / "benchmark"))
import estimate

from world.tasks import TASKS, UserError


def test_env_steps_of_the_defaults_by_hand():
    # 100 demonstrations of 18 steps at 0.7 of the speed, 512 roll-outs, three evaluations.
    assert sum(TASKS["PickCube-v1"].pace) == 18
    expected = 100 * 18 / 0.7 + 512 * 50 + 65536 + 3 * 300 * 50
    assert estimate.count_steps("PickCube-v1", 300) == pytest.approx(expected, abs=1)
    # SimplerEnv's 24 configurations are played once.
    task = TASKS["PutCarrotOnPlateInScene-v1"]
    fewer = estimate.count_steps("PutCarrotOnPlateInScene-v1", 300)
    assert fewer == estimate.count_steps("PutCarrotOnPlateInScene-v1", 24) and task.grid == 24


def test_samples_of_the_defaults_by_hand():
    assert estimate.count_samples("PickCube-v1") == 2500 * 64 + 512 * 50 + 2 * 65536


def test_several_tasks_have_no_chain():
    with pytest.raises(UserError, match="takes one task"):
        estimate.main("PickCube-v1,PushCube-v1")


@pytest.mark.slow
def test_it_prints_minutes(tmp_path):
    printed = output_of("benchmark/estimate.py", "PickCube-v1", cwd=tmp_path)
    minutes = re.fullmatch(r"about (\d+) minutes in all on this machine\n", printed)
    assert minutes and 3 < int(minutes[1]) < 1000
