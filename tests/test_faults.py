"""Faults that a run of a night meets.

Processes are killed, files are damaged, losses are not finite, signals come, and two runs share a
folder.
"""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PPO, ROOT, call, differing, invent_rollouts, tiny_model, write_demos
from safetensors.torch import load_file

import sft
import sta_ppo
import sta_tpo
from plumbing.checkpoint import checksums, damage, load_policy, load_state, save_checkpoint
from plumbing.folders import lock_run
from plumbing.run import Run, Stop
from world.tasks import TRAIN_SEEDS, UserError
from world.vector import make_envs

MODULES = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo}


def begin(script, *args, cwd, **kwargs) -> subprocess.Popen:
    """Starts `python script args`, in a process group of its own as a shell does.

    It computes in one thread. With two, 2 of 5 killed runs on a busy machine ended 4e-5 away from
    the undisturbed one, and 0 of 11 on an idle machine.
    """
    command = [sys.executable, ROOT / f"{script}.py", *args]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def command(script, checkpoint, folder: Path) -> list:
    """Flags of a run of some updates with a save at each, in simulators where it needs them."""
    if script == "sft":
        demos = folder / "demos.h5"
        if not demos.exists():
            write_demos(demos)
        flags = "--num-updates 40 --save-freq 1 --batch-size 4 --num-eval-episodes 0 --no-cuda"
        return ["--demo-path", demos, *flags.split()]
    if script == "sta_tpo":
        flags = (
            "--num-initial-states 2 --rollouts-per-state 4 --num-envs 2 --batch-size 2 "
            "--num-epochs 12 --save-freq 1 --num-eval-episodes 0 --no-cuda"
        )
        return ["--checkpoint", checkpoint, *flags.split()]
    flags = "--num-steps 50 --total-timesteps 500 --save-freq 1 --num-eval-episodes 0"
    return [*PPO, "--checkpoint", checkpoint, *flags.split()]


def put_rollouts(run: Path, num_states: int = 2) -> None:
    """Invented roll-outs of the run's initial states.

    The last one of each state is missing, so the run has to sample it itself.
    """
    states = np.random.default_rng(1).choice(TRAIN_SEEDS, num_states, replace=False)
    (run / "rollouts").mkdir(parents=True)
    for i, rollout in enumerate(invent_rollouts(states)):
        if i % 4 < 3:
            arrays = {name: np.asarray(value) for name, value in rollout.items()}
            np.savez(run / f"rollouts/{states[i // 4]}_{i % 4}.npz", **arrays)


def start_run(run: Path, script: str) -> list:
    """Flags that begin a run in a folder, or go on with the one there."""
    if script == "sta_tpo" and not run.exists():
        put_rollouts(run)
    return ["--output-dir", run, "--resume"]


# ---- killed processes ----
@pytest.mark.slow
@pytest.mark.parametrize(("script", "kills"), [("sft", 7), ("sta_tpo", 6), ("sta_ppo", 7)])
def test_a_run_killed_again_and_again_ends_like_one_that_never_was(
    script, kills, checkpoint, tmp_path
):
    flags = command(script, checkpoint, tmp_path)
    rng = np.random.default_rng(0)
    landed = 0
    began = time.time()
    start = start_run(tmp_path / "straight", script)
    undisturbed = begin(script, *flags, *start, cwd=tmp_path)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    whole = time.time() - began
    if script == "sta_tpo":
        # The sampled roll-outs depend on where a collection was stopped. So the run gets the same
        # ones and is killed in its training.
        shutil.copytree(tmp_path / "straight/rollouts", tmp_path / "killed/rollouts")
    for _ in range(kills):
        run = begin(script, *flags, *start_run(tmp_path / "killed", script), cwd=tmp_path)
        try:
            run.wait(rng.uniform(0.1, 1) * whole)
        except subprocess.TimeoutExpired:
            landed += 1
        run.kill()
        run.communicate()
    # The last kills may come when nothing is left to do.
    assert landed >= kills // 3
    last = begin(script, *flags, *start_run(tmp_path / "killed", script), cwd=tmp_path)
    assert last.wait() == 0, last.stderr.read()
    assert differing(tmp_path / "straight/checkpoint", tmp_path / "killed/checkpoint") == []


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    found = children(pid)
    for child in children(pid):
        found += descendants(child)
    return found


def wait_for(condition, run: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until a condition is true, while the run is at work."""
    deadline = time.time() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.time() < deadline, "too slow"
        time.sleep(0.05)


def has_logged(run: Path) -> bool:
    """Whether a run has logged some rows, which sft.py has after about fifty updates."""
    return any(file.stat().st_size > 1500 for file in run.glob("events*"))


@pytest.mark.slow
def test_an_env_process_that_dies_ends_the_run_in_one_line(checkpoint, tmp_path):
    """The run that goes on from its checkpoint ends like an undisturbed one."""
    flags = command("sta_ppo", checkpoint, tmp_path)
    run = begin("sta_ppo", *flags, "--output-dir", "out", cwd=tmp_path)
    wait_for((tmp_path / "out/checkpoint").exists, run)
    # The env processes are children of the fork server.
    envs = set(descendants(run.pid)) - set(children(run.pid))
    os.kill(max(envs), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    lines = [x for x in errors.splitlines() if x.startswith("error: an env process died")]
    assert run.returncode == 2 and lines, errors
    assert "Traceback" not in errors
    again = begin("sta_ppo", *flags, "--output-dir", "out", "--resume", cwd=tmp_path)
    assert again.wait() == 0, again.stderr.read()
    straight = begin("sta_ppo", *flags, "--output-dir", "straight", cwd=tmp_path)
    assert straight.wait() == 0
    assert differing(tmp_path / "straight/checkpoint", tmp_path / "out/checkpoint") == []


def test_envs_at_work_end_without_a_word_when_their_processes_are_gone(monkeypatch):
    """This happens where a signal stops a script while they compute.

    gymnasium's own `close` would wait for an answer and print a traceback.
    """
    envs = make_envs("PickCube-v1", 2, 0, render=False)
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    for part in envs.parts:
        part.step_async(np.zeros((1, 7), np.float32))
        for process in part.processes:
            process.kill()
            process.join()
    del envs, part, process
    gc.collect()
    assert complaints == []


def test_an_env_process_that_dies_is_one_line_in_every_method():
    envs = make_envs("PickCube-v1", 2, seed=0, render=False)
    envs.reset(seed=0)
    envs.parts[1].processes[0].kill()
    envs.parts[1].processes[0].join()
    with pytest.raises(UserError, match="an env process died"):
        # The first step may still be written into a pipe that nobody reads.
        for _ in range(3):
            envs.step(torch.zeros(2, 7))
    assert not envs.parts[1].processes[0].is_alive()
    envs.close()


# ---- signals ----
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_lets_the_update_end_and_saves_it(number, tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = ("--num-updates", 10**6, "--save-freq", 10**6, "--batch-size", 4, "--no-cuda")
    run = begin("sft", "--demo-path", demos, *flags, "--output-dir", "out", cwd=tmp_path)
    wait_for(lambda: has_logged(tmp_path / "out"), run)
    assert not (tmp_path / "out/checkpoint").exists()
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    line = "stopped; the last update is saved, a training run goes on"
    assert run.returncode == 128 + number, errors
    assert errors.splitlines()[-1].startswith(line), errors
    assert "Traceback" not in errors
    assert load_state(tmp_path / "out", "sft")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_harms_no_env_process(number, checkpoint, tmp_path):
    """A terminal sends Ctrl-C to the whole group, and torchrun sends its SIGTERM to it."""
    flags = (*command("sta_ppo", checkpoint, tmp_path), "--save-freq", 1000)
    more = ("--total-timesteps", 10**6, "--output-dir", "out")
    run = begin("sta_ppo", *flags, *more, cwd=tmp_path)
    wait_for(lambda: has_logged(tmp_path / "out"), run)
    os.killpg(run.pid, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in errors, errors
    assert load_state(tmp_path / "out", "sta_ppo")["iteration"] > 0, errors


@pytest.fixture
def no_signal(monkeypatch):
    """`Stop` as it is at a script's start."""
    for name, value in (("signals", []), ("held", False), ("leaving", False)):
        monkeypatch.setattr(Stop, name, value)


def test_a_second_signal_stops_an_update_but_not_its_save(no_signal):
    assert Stop.hold(True) and not Stop.asked()
    # The first one waits for the update to end.
    Stop.catch(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        Stop.catch(signal.SIGTERM, None)
    assert Stop.asked()
    # torchrun sends one to the process that saves when the others have left.
    Stop.catch(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        Stop.hold(True)


def test_a_signal_after_the_loop_acts_at_once(no_signal):
    assert Stop.hold(True) and not Stop.hold(False)
    with pytest.raises(KeyboardInterrupt):
        Stop.catch(signal.SIGTERM, None)


OUTSIDE = """
import time
from plumbing.run import one_line_errors
with one_line_errors():
    print('on', flush=True)
    time.sleep(60)
"""


def test_a_signal_outside_an_update_acts_at_once():
    run = subprocess.Popen(
        [sys.executable, "-c", OUTSIDE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run.stdout.readline()
    run.terminate()
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 143
    assert errors == "stopped; a training run goes on with --resume and its --output-dir\n"


# ---- disks and damaged files ----
def limit_files() -> None:
    """Files cannot grow beyond half a megabyte in this process, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


def test_a_disk_that_takes_no_checkpoint_is_one_line(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--num-updates 1 --batch-size 4 --num-eval-episodes 0 --no-cuda --output-dir out"
    args = ("--demo-path", demos, *flags.split())
    run = begin("sft", *args, cwd=tmp_path, preexec_fn=limit_files)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2, errors
    assert errors.splitlines()[-1].startswith("error: cannot use the disk: "), errors
    assert "Traceback" not in errors and not (tmp_path / "out/checkpoint").exists()


@pytest.fixture
def two_saves(tmp_path):
    """A run folder with a checkpoint of step 2 and, beside it, the one of step 1."""
    for step in (1, 2):
        state = {"step": step, "script": "sft", "wall_s": 0}
        save_checkpoint(tmp_path / "run", *tiny_model(), {"n": step}, state)
    return tmp_path / "run"


def resumed_step(run: Path) -> int:
    """The step at which a run of sft.py would go on."""
    return Run("sft", str(run), resume=True, rank=0).state["step"]


def spoil_length(file: Path) -> None:
    """Cuts a file short."""
    file.write_bytes(file.read_bytes()[:-7])


def spoil_byte(file: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "spoil", [spoil_length, spoil_byte, Path.unlink], ids=["short", "byte", "gone"]
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.safetensors", "config.json", "args.json"]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(name, spoil, two_saves, capsys):
    assert damage(two_saves / "checkpoint") == "" and resumed_step(two_saves) == 2
    spoil(two_saves / "checkpoint" / name)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(str(two_saves), torch.device("cpu"))
    capsys.readouterr()
    assert resumed_step(two_saves) == 1
    assert "going on from the one before" in capsys.readouterr().out
    assert load_policy(str(two_saves), torch.device("cpu"))
    # The second damage leaves no checkpoint before this one.
    spoil(two_saves / "checkpoint" / name)
    with pytest.raises(UserError, match="damaged|without a training state"):
        resumed_step(two_saves)


def test_a_damaged_checkpoint_is_kept_and_gives_way_to_a_whole_one_alone(two_saves, capsys):
    edited = two_saves / "checkpoint/args.json"
    edited.write_text(edited.read_text() + " ")
    content = edited.read_bytes()
    shutil.copytree(two_saves / "checkpoint.old", two_saves / "copy")
    spoil_byte(two_saves / "checkpoint.old/model.safetensors")
    # Neither is whole, so the newer one stays where it is.
    with pytest.raises(UserError, match="damaged"):
        resumed_step(two_saves)
    assert edited.read_bytes() == content
    shutil.rmtree(two_saves / "checkpoint.old")
    (two_saves / "copy").rename(two_saves / "checkpoint.old")
    assert resumed_step(two_saves) == 1
    assert (two_saves / "checkpoint.damaged/args.json").read_bytes() == content
    assert "checkpoint.damaged" in capsys.readouterr().out


def test_nothing_in_a_checkpoint_is_unpickled():
    files = [file for room in (".", "world", "plumbing") for file in (ROOT / room).glob("*.py")]
    names = {file.name for file in files}
    assert {"sft.py", "sta_tpo.py", "sta_ppo.py", "eval.py", "stare_utils.py", "vla.py"} < names
    assert {"checkpoint.py", "human_pairs.py", "run.py", "demos.py", "vector.py"} < names
    for file in files:
        text = file.read_text()
        for word in ("torch.load(", "torch.save(", "import pickle", "allow_pickle"):
            assert word not in text, file


def test_a_damaged_rollout_is_named(tmp_path):
    rollout = {name: np.asarray(value) for name, value in invent_rollouts([3])[0].items()}
    np.savez(tmp_path / "3_0.npz", **rollout)
    assert sta_tpo.read_rollouts([tmp_path / "3_0.npz"])[0]["init_seed"] == 3
    for spoil in (spoil_length, spoil_byte):
        np.savez(tmp_path / "3_0.npz", **rollout)
        spoil(tmp_path / "3_0.npz")
        with pytest.raises(UserError, match="3_0.npz is damaged .*: remove .*3_0.npz, --resume"):
            sta_tpo.read_rollouts([tmp_path / "3_0.npz"])


def test_checksums_are_of_whole_files(tmp_path):
    content = bytes(2**24) + b"end"
    (tmp_path / "x").write_bytes(content)
    assert checksums(tmp_path) == {"x": zlib.crc32(content)}


# ---- losses that are not finite ----
@pytest.mark.parametrize(
    "script", ["sft", "sta_tpo", pytest.param("sta_ppo", marks=pytest.mark.slow)]
)
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(
    script, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda files: invent_rollouts([11, 22]))
    demos = write_demos(tmp_path / "demos.h5")
    flags = {
        "sft": ("--demo-path", demos, "--num-updates", 3, "--batch-size", 4),
        "sta_tpo": ("--checkpoint", checkpoint, "--batch-size", 8),
        "sta_ppo": (*PPO, "--checkpoint", checkpoint, "--total-timesteps", 50),
    }
    module = MODULES[script]
    action_logprob = module.action_logprob

    def spoilt(*inputs):
        logprob, *others = action_logprob(*inputs)
        return logprob * torch.nan, *others

    monkeypatch.setattr(module, "action_logprob", spoilt)
    common = ("--output-dir", tmp_path / "run", "--no-cuda", "--num-eval-episodes", 0)
    with pytest.raises(UserError, match="not finite: .*The batch is in") as stopped:
        call(module, *flags[script], *common)
    assert "\n" not in str(stopped.value) and not (tmp_path / "run/checkpoint").exists()
    batch = load_file(tmp_path / "run/nan_batch.safetensors")
    assert batch["rgb"].dtype == torch.uint8 and len(batch["rgb"]) == len(batch["bins"]) > 0


# ---- two runs in one folder ----
HOLD = """
import fcntl, os, time
fcntl.flock(os.open({folder!r}, os.O_RDONLY), fcntl.LOCK_EX)
print('in', flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("script", MODULES)
def test_two_processes_in_one_folder(script, checkpoint, tmp_path):
    """While another process holds the folder, --resume and a fresh start are refused alike."""
    run = tmp_path / "run"
    run.mkdir()
    # The other process locks the folder as `lock_run` does.
    code = HOLD.format(folder=str(run))
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    start = [] if script == "sft" else ["--checkpoint", checkpoint]
    for resume in (["--resume"], []):
        with pytest.raises(UserError, match="another process is at work in"):
            call(MODULES[script], *start, "--output-dir", run, "--no-cuda", *resume)
    assert list(run.iterdir()) == []
    other.kill()
    other.wait()
    # The lock ended with the process.
    lock_run(run)
