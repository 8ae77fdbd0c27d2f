"""The first update of each script, and one evaluation, are what they were at a recorded commit.

    PYTHONPATH=. python tests/test_golden.py COMMIT    # records them again

They are recorded again after an intended change.

Numbers are compared to 1e-3, because other processors round differently, and physics amplifies it.
Later updates are not compared: where one sampled action differs, all that follows does. For the
same reason PPO's roll-out has five steps.
"""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call, scalars

import eval as evaluation
import sft
import sta_ppo
import sta_tpo

GOLDEN = Path(__file__).parent / "golden"
POLICY = ROOT / "checkpoints/PickCube-v1__sft"
SCRIPTS = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
COMMANDS = {
    "sft": (
        "--vla tiny --num-demos 3 --demo-speed 0.4 --demo-noise 0.1 --demo-slip 0.1 "
        "--demo-pause 0.1 --demo-twist 3 --num-updates 1 --batch-size 16 --num-envs 3 "
        "--num-eval-episodes 0"
    ),
    "sta_tpo": (
        f"--checkpoint {POLICY} --num-initial-states 2 --rollouts-per-state 4 --num-envs 3 "
        "--cost mean --num-eval-episodes 0"
    ),
    "sta_ppo": (
        f"--checkpoint {POLICY} --num-envs 3 --num-steps 5 --num-minibatches 1 "
        "--total-timesteps 15 --critic-warmup 0 --num-eval-episodes 0"
    ),
    "eval": f"--checkpoint {POLICY} --num-eval-episodes 3 --num-envs 3",
}


def first_update(name: str, output: Path) -> dict[str, float]:
    """What a script logs first, without times; of eval.py the means of its episodes."""
    call(SCRIPTS[name], *COMMANDS[name].split(), "--no-cuda", "--output-dir", output)
    if name == "eval":
        result = json.loads((output / "results.json").read_text())
        numbers = {k: value for k, value in result.items() if isinstance(value, float)}
        return {k: value for k, value in numbers.items() if not k.endswith("wall_s")}
    logged = {key: values[0] for key, values in scalars(output).items()}
    return {k: v for k, v in logged.items() if not k.startswith("time/") and k != "charts/SPS"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_update_is_the_recorded_one(name, tmp_path):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())["numbers"]
    found = first_update(name, tmp_path / "run")
    assert found == pytest.approx(golden, rel=1e-3, abs=1e-5, nan_ok=True)
    assert len(golden) >= 5 and any(golden.values())


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for script in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            numbers = first_update(script, Path(folder) / "run")
        record = {"commit": sys.argv[1], "command": COMMANDS[script], "numbers": numbers}
        record["command"] = record["command"].replace(f"{ROOT}/", "")
        (GOLDEN / f"{script}.json").write_text(json.dumps(record, indent=1) + "\n")
