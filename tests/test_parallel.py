"""Data-parallel training: `torchrun` starts two processes that talk over gloo.

Together they take the step that one process takes on the doubled batch. A process that dies ends
the job.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, cli, invent_rollouts, write_demos

from plumbing import parallel
from plumbing.checkpoint import read_state
from plumbing.run import one_line_errors
from world.tasks import TRAIN_SEEDS, UserError


def torchrun(script, *args, cwd):
    """Runs a script in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", 2, script, *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


# ---- one step of two processes ----
def gradients(run) -> torch.Tensor:
    """All first moments of the optimiser: after one update a tenth of its clipped gradients."""
    state = read_state(run / "checkpoint")["moments"]
    return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])


def check_one_step(script, one, two, tmp_path, *args):
    """One process takes one update with the arguments `one`, then two of them with `two`."""
    done = cli(script, *args, *one, "--output-dir", tmp_path / "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = torchrun(ROOT / script, *args, *two, "--output-dir", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected, found = gradients(tmp_path / "one"), gradients(tmp_path / "two")
    assert expected.norm() > 1e-3 and (found - expected).norm() < 1e-5 * expected.norm()
    assert len(list((tmp_path / "two").glob("events.*"))) == 1, "one writer"
    assert done.stdout.count("wrote ") == 1


@pytest.mark.slow
def test_sft_steps_like_one_process_with_the_doubled_batch(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--num-updates 1 --chunk-size 2 --num-eval-episodes 0 --no-cuda"
    one, two = ("--batch-size", 10), ("--batch-size", 5)
    check_one_step("sft.py", one, two, tmp_path, "--demo-path", demos, *flags.split())


@pytest.mark.slow
def test_sta_tpo_steps_like_one_process_with_the_doubled_batch(checkpoint, tmp_path):
    init_seeds = np.random.default_rng(1).integers(TRAIN_SEEDS, size=2)
    for run in ("one", "two"):
        folder = tmp_path / run / "rollouts"
        folder.mkdir(parents=True)
        for i, rollout in enumerate(invent_rollouts(init_seeds)):
            arrays = {name: np.asarray(value) for name, value in rollout.items()}
            np.savez(folder / f"{init_seeds[i // 4]}_{i % 4}.npz", **arrays)
    flags = "--resume --num-initial-states 2 --rollouts-per-state 4 --num-eval-episodes 0 --no-cuda"
    args = ("--checkpoint", checkpoint, *flags.split())
    check_one_step("sta_tpo.py", ("--batch-size", 64), ("--batch-size", 32), tmp_path, *args)


GREEDY = """
import functools, sys, tyro
sys.path.insert(0, {root!r})
import sta_ppo
from plumbing.run import one_line_errors
sta_ppo.sample_action = functools.partial(sta_ppo.sample_action, greedy=True)
if __name__ == "__main__":
    with one_line_errors():
        sta_ppo.main(tyro.cli(sta_ppo.Args))
"""


@pytest.mark.slow
def test_sta_ppo_steps_like_one_process_with_the_doubled_envs(checkpoint, tmp_path):
    """The policy acts greedily, because two processes draw other random numbers than one."""
    script = tmp_path / "greedy.py"
    script.write_text(GREEDY.format(root=str(ROOT)))
    flags = (
        "--total-timesteps 40 --num-steps 10 --num-minibatches 1 --update-epochs 1 "
        "--critic-warmup 0 --stage-advantage --num-eval-episodes 0 --no-cuda"
    )
    args = ("--checkpoint", checkpoint, *flags.split())
    check_one_step(script, ("--num-envs", 4), ("--num-envs", 2), tmp_path, *args)


# ---- a process that ends ----
# Each update of sft.py sums twice over the processes: its gradients, then its metrics. So the
# seventh sum is that of the fourth update's gradients.
DYING = """
import os, sys, tyro
sys.path.insert(0, {root!r})
import sft
from plumbing import parallel
from plumbing.run import one_line_errors
calls, whole = [], parallel.sum_over_processes
def sum_and_die(tensors):
    calls.append(len(tensors))
    if len(calls) == 7 and os.environ["RANK"] == "1":
        assert calls[0] == calls[2] == calls[4] == calls[6] > 1 == calls[1] == calls[3] == calls[5]
        os.kill(os.getpid(), {number})
    whole(tensors)
parallel.sum_over_processes = sum_and_die
with one_line_errors():
    sft.main(tyro.cli(sft.Args))
"""


@pytest.mark.slow
def test_a_dead_process_ends_the_job_in_a_line_and_leaves_a_checkpoint(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--num-updates 5 --save-freq 1 --batch-size 4 --num-eval-episodes 0 --no-cuda"
    args = ("--demo-path", demos, *flags.split(), "--output-dir", tmp_path / "run")
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT), number=9))
    died = torchrun(tmp_path / "dying.py", *args, cwd=tmp_path)
    lines = [line for line in died.stderr.splitlines() if line.startswith("error: ")]
    assert died.returncode != 0
    assert 'sft.py", line' not in died.stderr, "a traceback of ours beside torchrun's"
    assert len(lines) == 1, died.stderr
    assert "another process of this job died" in lines[0] and "--resume" in lines[0], died.stderr
    assert read_state(tmp_path / "run/checkpoint")["step"] == 3
    resumed = torchrun(ROOT / "sft.py", *args, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0 and "wrote " in resumed.stdout, resumed.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_lets_all_save_and_leave(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--num-updates 100 --save-freq 100 --batch-size 4 --num-eval-episodes 0 --no-cuda"
    args = ("--demo-path", demos, *flags.split(), "--output-dir", tmp_path / "run")
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT), number=15))
    stopped = torchrun(tmp_path / "dying.py", *args, cwd=tmp_path)
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped; the last update is saved") == 2
    assert "another process" not in stopped.stderr
    assert read_state(tmp_path / "run/checkpoint")["step"] == 4


# ---- whose fault it is ----
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "--gradient-checkpointing",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "--chunk-size",
        ),
        (RuntimeError("CUDA error: invalid device ordinal"), "--nproc-per-node"),
        (
            PermissionError(13, "Permission denied", "/root/x"),
            "cannot use /root/x: Permission denied",
        ),
        (
            OSError(28, "No space left on device"),
            "cannot use the disk: No space left on device",
        ),
        (UserError("this line"), "error: this line\n"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line_too(error, words, capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), BrokenPipeError(32, "Broken pipe"), KeyError("x")]
)
def test_what_is_the_code_s_fault_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_gradients_are_summed_where_there_are_any(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda x: x.mul_(2))
    x = torch.ones(2)
    parallel.sum_over_processes([x, None])
    assert x.tolist() == [2, 2]
