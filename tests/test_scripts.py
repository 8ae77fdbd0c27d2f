"""The scripts as the README calls them: sft.py -> sta_tpo.py -> sta_ppo.py -> eval.py.

Each finds the run before it. ipi.sh runs all of them.
"""

import json
import math
import os
import subprocess

import imageio.v3
import pytest
import torch
from conftest import PPO_UPDATE, ROOT, TASK, differing, output_of, scalars, tensors

from plumbing.checkpoint import read_state
from world.tasks import EVAL_SEED, TRAIN_SEEDS

K = len(TASK.stages)


def written(run) -> dict:
    """args.json of a run's checkpoint, after a look at its other files."""
    files = {file.name for file in (run / "checkpoint").iterdir()}
    expected = {"config.json", "model.safetensors", "args.json", "training_state.safetensors"}
    assert expected <= files
    assert list(run.glob("events.out.tfevents.*"))
    return json.loads((run / "checkpoint/args.json").read_text())


def test_sft_makes_demonstrations_and_a_checkpoint_with_statistics(sft_run):
    assert written(sft_run)["method"] == "SFT"
    config = json.loads((sft_run / "checkpoint/config.json").read_text())
    stats = config["norm_stats"]["PickCube-v1"]
    assert len(stats["action"]["q01"]) == len(stats["action"]["q99"]) == 7
    assert len(stats["proprio"]["mean"]) == 8
    episodes = json.loads((sft_run / "demos_PickCube-v1.json").read_text())["episodes"]
    assert len(episodes) == 3
    assert all(episode["success"] for episode in episodes)
    assert all(episode["episode_seed"] < TRAIN_SEEDS for episode in episodes)


def test_sta_tpo_starts_from_sft_at_ln_2_and_keeps_finished_rollouts(sft_run, tpo_run):
    args, curves = written(tpo_run), scalars(tpo_run)
    assert args["method"] == "STA-TPO" and sft_run.name in args["checkpoint"]
    assert curves["losses/tpo_loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert curves["rewards/margins"][0] == pytest.approx(0, abs=1e-5)
    # The four invented roll-outs have 37 steps.
    assert len(list((tpo_run / "rollouts").iterdir())) == 6 and args["env_steps"] > 37
    before, after = (tensors(run / "checkpoint") for run in (sft_run, tpo_run))
    # The heads are those of sft.py alone.
    dropped = {name.split("/")[0] for name in before.keys() - after.keys()}
    assert dropped == {"separator.safetensors", "heads.safetensors"}
    assert any(not torch.equal(before[name], value) for name, value in after.items())


def test_sta_ppo_starts_from_sta_tpo_with_ratio_1_and_kl_0(tpo_run, ppo_run):
    args, curves = written(ppo_run), scalars(ppo_run)
    assert args["method"] == "STA-PPO" and tpo_run.name in args["checkpoint"]
    assert args["env_steps"] == 4 * PPO_UPDATE
    ratios = curves["losses/first_ratio"]
    assert all(abs(ratio - 1) < 1e-4 for ratio in ratios) and len(ratios) == 4
    assert all(gap < 1e-3 for gap in curves["losses/rollout_update_logprob_gap"])
    # The policy stands still while the critic warms up.
    assert all(abs(kl) < 1e-6 for kl in curves["losses/approx_kl"][:2])
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    assert 0 <= curves["eval/success_once"][0] <= 1


@pytest.fixture(scope="module")
def resumed_run(workspace, tpo_run, ppo_run):
    """The same as ppo_run, but stopped after two updates and resumed.

    A copy of the checkpoint at which it stopped is left in stopped/.
    """
    args = json.loads((ppo_run / "checkpoint/args.json").read_text())
    names = ("num_envs", "num_steps", "num_minibatches", "critic_warmup", "checkpoint")
    same = [f"--{name.replace('_', '-')}={args[name]}" for name in names]
    run = workspace / "runs/resumed"
    flags = "--env-id PickCube-v1 --num-eval-episodes 0 --resume --no-anneal-lr --no-cuda"
    for total in (2 * PPO_UPDATE, 4 * PPO_UPDATE):
        more = ("--total-timesteps", total, "--output-dir", run)
        output_of("sta_ppo.py", *flags.split(), *same, *more, cwd=workspace)
        if total == 2 * PPO_UPDATE:
            copy = ["cp", "-r", run / "checkpoint", workspace / "runs/stopped"]
            subprocess.run(copy, check=True)
    return run


def test_ppo_stopped_and_resumed_equals_straight_bit_for_bit(ppo_run, resumed_run):
    assert "value_head.safetensors/first.1.weight" in tensors(ppo_run / "checkpoint")
    assert differing(ppo_run / "checkpoint", resumed_run / "checkpoint") == []
    straight, resumed = (read_state(run / "checkpoint") for run in (ppo_run, resumed_run))
    # They are compared as text, because NaN does not equal NaN.
    assert str(straight["recent"]) == str(resumed["recent"]) and straight["recent"]
    assert straight["first"]["losses/entropy"] == resumed["first"]["losses/entropy"]


def test_critic_warmup_trains_the_value_head_alone_and_then_everything_moves(
    workspace, tpo_run, ppo_run, resumed_run
):
    before = tensors(tpo_run / "checkpoint")
    warm = tensors(workspace / "runs/stopped")
    after = tensors(ppo_run / "checkpoint")
    assert [name for name in before if not torch.equal(before[name], warm[name])] == []
    # The value head's last layer begins at zero.
    assert warm["value_head.safetensors/last.weight"].any()
    # The critic sees no time where the horizon does not end the task.
    stays = [name for name in warm if torch.equal(warm[name], after[name])]
    assert stays == ["value_head.safetensors/clock_weight"]
    assert scalars(ppo_run)["charts/learning_rate"] == pytest.approx([0, 0, 5e-5, 5e-5])
    # Adam's first moments are forgotten.
    moments = read_state(workspace / "runs/stopped")["moments"].values()
    assert not any(row["exp_avg"].any() for row in moments)
    # All but the weight of the clock have second moments.
    assert sum(bool(row["exp_avg_sq"].any()) for row in moments) == len(moments) - 1 > 0


@pytest.fixture(scope="module")
def evaluated(workspace, ppo_run):
    """What eval.py prints about the end of the chain."""
    flags = "--num-eval-episodes 2 --num-envs 2 --capture-video --no-cuda"
    return output_of("eval.py", "--checkpoint", ppo_run, *flags.split(), cwd=workspace)


def test_eval_writes_a_result_row_and_a_video(evaluated, ppo_run):
    assert "success_once" in evaluated and all(name in evaluated for name in TASK.stages)
    row = json.loads((ppo_run / "results.json").read_text())
    contract = (
        "method env_id seed num_episodes success_once success_at_end stage_reach_rate env_steps "
        "wall_s commit command"
    )
    assert set(contract.split()) <= row.keys()
    found = [row[name] for name in ("method", "env_id", "seed", "num_episodes", "env_steps")]
    assert found == ["STA-PPO", "PickCube-v1", 1, 2, 4 * PPO_UPDATE]
    rates = row["stage_reach_rate"]
    assert len(rates) == K and rates[-1] == row["success_once"]
    assert len(row["episodes"]) == 2
    for episode in row["episodes"]:
        assert episode["seed"] >= EVAL_SEED and episode["episode_len"] == 50
    frames = imageio.v3.imread(ppo_run / "video.mp4")
    assert frames.shape == (50, 256, 512, 3) and frames.std() > 10
    page = (ppo_run / "report.html").read_text()
    assert evaluated.splitlines()[1] in page
    assert "Trained by <code>python " in page and "torch 2" in page
    # Training curves, and a film of each of the two episodes.
    assert page.count("<svg") == 1 and page.count("<video") == 2


@pytest.mark.slow
def test_eval_compares_results_on_their_common_seeds(evaluated, ppo_run, workspace):
    results = ppo_run / "results.json"
    table = output_of("eval.py", "--compare", results, results, cwd=workspace)
    # The interval is that of two equal pairs and the two that it adds.
    assert table.count("STA-PPO") == 2 and "+0.000 [-0.490, +0.490]" in table


def test_ipi_takes_no_flag_of_a_script():
    command = ["./ipi.sh", "PickCube-v1", "--vla", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("ipi.sh takes a task alone") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_smoke_run_of_the_whole_pipeline_prints_a_table():
    command = ["./ipi.sh", "PickCube-v1"]
    environ = {**os.environ, "SMOKE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("here; ") == 6
    for script in ("sft", "sta_tpo", "sta_ppo"):
        assert f"  {script}.py, then eval.py" in done.stdout
    # The last table compares all stages.
    table = done.stdout.split("success_once")[-1]
    methods = [line.split()[0] for line in table.splitlines()[1:4]]
    assert methods == ["SFT", "STA-TPO", "STA-PPO"]
