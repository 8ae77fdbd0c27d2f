"""Faults that a night's run meets: killed processes, damaged files, numbers that are none, signals, two runs in one folder."""
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
import stare_utils
import vla
from stare_utils import Stop, UserError, make_envs

MODULES = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo}


def begin(script, *args, cwd, **kwargs) -> subprocess.Popen:
    """Starts `python script args`, in a process group of its own as a shell does."""
    command = [sys.executable, ROOT / f"{script}.py", *args]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs)  # fmt: skip


def command(script, checkpoint, folder: Path) -> list:
    """Flags of a run of some updates with a save at each, on the simulator where the script needs it."""
    if script == "sft":
        demos = folder / "demos.h5"
        return ["--demo-path", demos if demos.exists() else write_demos(demos), "--num-updates", 40, "--save-freq", 1, "--batch-size", 4,
                "--num-eval-episodes", 0, "--no-cuda"]  # fmt: skip
    if script == "sta_tpo":
        return ["--checkpoint", checkpoint, "--num-initial-states", 2, "--rollouts-per-state", 4, "--num-envs", 2, "--batch-size", 2, "--num-epochs", 12,
                "--save-freq", 1, "--num-eval-episodes", 0, "--no-cuda"]  # fmt: skip
    return [*PPO, "--checkpoint", checkpoint, "--num-steps", 50, "--total-timesteps", 500, "--save-freq", 1, "--num-eval-episodes", 0]


def put_rollouts(run: Path, num_states: int = 2) -> None:
    """Invented roll-outs of the run's initial states, but for the last of each, which the run has to sample itself."""
    states = np.random.default_rng(1).choice(stare_utils.TRAIN_SEEDS, num_states, replace=False)
    (run / "rollouts").mkdir(parents=True)
    for i, rollout in enumerate(invent_rollouts(states)):
        if i % 4 < 3:
            arrays = {name: np.asarray(value) for name, value in rollout.items()}
            np.savez(run / f"rollouts/{states[i // 4]}_{i % 4}.npz", **arrays)


def start_run(run: Path, script: str) -> list:
    if script == "sta_tpo" and not run.exists():
        put_rollouts(run)
    return ["--output-dir", run, "--resume"]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kills"), [("sft", 7), ("sta_tpo", 6), ("sta_ppo", 7)])
def test_a_run_killed_again_and_again_ends_like_one_that_never_was(script, kills, checkpoint, tmp_path):
    flags, rng, landed = command(script, checkpoint, tmp_path), np.random.default_rng(0), 0
    began = time.time()
    undisturbed = begin(script, *flags, *start_run(tmp_path / "straight", script), cwd=tmp_path)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    whole = time.time() - began
    if script == "sta_tpo":  # sampled roll-outs depend on where a collection was stopped: kill it in its training, on the same ones
        shutil.copytree(tmp_path / "straight/rollouts", tmp_path / "killed/rollouts")
    for _ in range(kills):
        run = begin(script, *flags, *start_run(tmp_path / "killed", script), cwd=tmp_path)
        try:
            run.wait(rng.uniform(0.1, 1) * whole)
        except subprocess.TimeoutExpired:
            landed += 1
        run.kill()
        run.communicate()
    assert landed >= kills // 3  # the last ones may find nothing left to do
    last = begin(script, *flags, *start_run(tmp_path / "killed", script), cwd=tmp_path)
    assert last.wait() == 0, last.stderr.read()
    assert differing(tmp_path / "straight/checkpoint", tmp_path / "killed/checkpoint") == []


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [*children(pid), *(grandchild for child in children(pid) for grandchild in descendants(child))]


def wait_for(condition, run: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert run.poll() is None and time.time() < deadline, run.communicate() if run.poll() is not None else "too slow"
        time.sleep(0.05)


@pytest.mark.slow
def test_an_env_process_that_dies_ends_the_run_in_one_line(checkpoint, tmp_path):
    """The run that goes on from its checkpoint ends like an undisturbed one."""
    flags = command("sta_ppo", checkpoint, tmp_path)
    run = begin("sta_ppo", *flags, "--output-dir", "out", cwd=tmp_path)
    wait_for((tmp_path / "out/checkpoint").exists, run)
    envs = set(descendants(run.pid)) - set(children(run.pid))  # the fork server's children
    os.kill(max(envs), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and [line for line in errors.splitlines() if line.startswith("error: an env process died")], errors
    assert "Traceback" not in errors
    again = begin("sta_ppo", *flags, "--output-dir", "out", "--resume", cwd=tmp_path)
    assert again.wait() == 0, again.stderr.read()
    straight = begin("sta_ppo", *flags, "--output-dir", "straight", cwd=tmp_path)
    assert straight.wait() == 0 and differing(tmp_path / "straight/checkpoint", tmp_path / "out/checkpoint") == []


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_lets_the_update_end_and_saves_it(number, tmp_path):
    flags = ["--demo-path", write_demos(tmp_path / "demos.h5"), "--num-updates", 10**6, "--save-freq", 10**6, "--batch-size", 4, "--no-cuda"]
    run = begin("sft", *flags, "--output-dir", "out", cwd=tmp_path)
    wait_for(lambda: any(file.stat().st_size > 1500 for file in (tmp_path / "out").glob("events*")), run)  # some fifty updates
    assert not (tmp_path / "out/checkpoint").exists()
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and errors.splitlines()[-1].startswith("stopped; the last update is saved, a training run goes on"), errors
    assert "Traceback" not in errors and sft.load_state(tmp_path / "out", "sft")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_harms_no_env_process(number, checkpoint, tmp_path):
    """A terminal sends Ctrl-C so, torchrun its SIGTERM."""
    run = begin("sta_ppo", *command("sta_ppo", checkpoint, tmp_path), "--save-freq", 1000, "--total-timesteps", 10**6, "--output-dir", "out", cwd=tmp_path)
    wait_for(lambda: any(file.stat().st_size > 1500 for file in (tmp_path / "out").glob("events*")), run)
    os.killpg(run.pid, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in errors and sta_ppo.load_state(tmp_path / "out", "sta_ppo")["iteration"] > 0, errors


def test_envs_at_work_end_without_a_word_when_their_processes_are_gone(monkeypatch):
    """As when a signal stops a script while they compute: gymnasium's own would wait for an answer and print a traceback."""
    envs, complaints = make_envs("PickCube-v1", 2, 0, render=False), []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    for part in envs.parts:
        part.step_async(np.zeros((1, 7), np.float32))
        for process in part.processes:
            process.kill()
            process.join()
    del envs, part, process
    gc.collect()
    assert complaints == []


def test_a_second_signal_stops_an_update_but_not_its_save(monkeypatch):
    for name, value in (("signals", []), ("held", False), ("leaving", False)):
        monkeypatch.setattr(stare_utils.Stop, name, value)
    assert stare_utils.Stop.hold(True) and not stare_utils.Stop.asked()
    stare_utils.Stop.catch(signal.SIGTERM, None)  # waits for the update to end
    with pytest.raises(KeyboardInterrupt):
        stare_utils.Stop.catch(signal.SIGTERM, None)
    assert stare_utils.Stop.asked()
    stare_utils.Stop.catch(signal.SIGTERM, None)  # as torchrun sends one to the process that saves when the others have left
    with pytest.raises(KeyboardInterrupt):
        stare_utils.Stop.hold(True)


def test_a_disk_that_takes_no_checkpoint_is_one_line(tmp_path):
    flags = ["--demo-path", write_demos(tmp_path / "demos.h5"), "--num-updates", 1, "--batch-size", 4, "--num-eval-episodes", 0, "--no-cuda"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # noqa: E731
    run = begin("sft", *flags, "--output-dir", "out", cwd=tmp_path, preexec_fn=limit)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.splitlines()[-1].startswith("error: cannot use the disk: "), errors
    assert "Traceback" not in errors and not (tmp_path / "out/checkpoint").exists()


def test_a_signal_outside_an_update_acts_at_once(tmp_path):
    code = "import time, stare_utils\nwith stare_utils.one_line_errors():\n  print('on', flush=True)\n  time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.terminate()
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 143 and errors == "stopped; a training run goes on with --resume and its --output-dir\n"


@pytest.fixture
def two_saves(tmp_path):
    """A run folder with a checkpoint of step 2 and, beside it, the one of step 1."""
    for step in (1, 2):
        sft.save_checkpoint(tmp_path / "run", *tiny_model(), {"n": step}, {"step": step, "script": "sft"})
    return tmp_path / "run"


def spoil_length(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def spoil_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [spoil_length, spoil_byte, Path.unlink], ids=["short", "byte", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "training_state.safetensors", "config.json", "args.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(name, spoil, two_saves, capsys):
    assert vla.damage(two_saves / "checkpoint") == "" and sft.load_state(two_saves, "sft")["step"] == 2
    spoil(two_saves / "checkpoint" / name)
    with pytest.raises(UserError, match="cannot be loaded"):
        sta_ppo.load_policy(str(two_saves), torch.device("cpu"))
    capsys.readouterr()
    assert sft.load_state(two_saves, "sft")["step"] == 1 and "going on from the one before" in capsys.readouterr().out
    assert sta_ppo.load_policy(str(two_saves), torch.device("cpu"))
    spoil(two_saves / "checkpoint" / name)  # and now there is none before
    with pytest.raises(UserError, match="damaged|without a training state"):
        sft.load_state(two_saves, "sft")


def test_nothing_in_a_checkpoint_is_unpickled():
    for name in ("sft", "sta_tpo", "sta_ppo", "eval", "stare_utils", "vla"):
        text = (ROOT / f"{name}.py").read_text()
        assert not any(word in text for word in ("torch.load(", "torch.save(", "import pickle", "allow_pickle")), name


@pytest.mark.parametrize("script", ["sft", "sta_tpo", pytest.param("sta_ppo", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(script, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda files: invent_rollouts([11, 22]))
    flags = {"sft": ("--demo-path", write_demos(tmp_path / "demos.h5"), "--num-updates", 3, "--batch-size", 4),
             "sta_tpo": ("--checkpoint", checkpoint, "--batch-size", 8),
             "sta_ppo": (*PPO, "--checkpoint", checkpoint, "--total-timesteps", 50)}  # fmt: skip
    module = MODULES[script]
    logprob = module.action_logprob
    monkeypatch.setattr(module, "action_logprob", lambda *inputs: (logprob(*inputs)[0] * torch.nan, *logprob(*inputs)[1:]))
    with pytest.raises(UserError, match="not finite: .*The batch is in") as stopped:
        call(module, *flags[script], "--output-dir", tmp_path / "run", "--no-cuda", "--num-eval-episodes", 0)
    assert "\n" not in str(stopped.value) and not (tmp_path / "run/checkpoint").exists()
    batch = load_file(tmp_path / "run/nan_batch.safetensors")
    assert batch["rgb"].dtype == torch.uint8 and len(batch["rgb"]) == len(batch["bins"]) > 0


@pytest.mark.parametrize("script", MODULES)
def test_two_processes_in_one_folder(script, checkpoint, tmp_path):
    """Another process that holds the folder is refused neither more nor less than by --resume and by a fresh start."""
    (tmp_path / "run").mkdir()
    code = f"import fcntl, os, time; fcntl.flock(os.open({str(tmp_path / 'run')!r}, os.O_RDONLY), fcntl.LOCK_EX); print('in', flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)  # as stare_utils.lock_run
    other.stdout.readline()
    start = [] if script == "sft" else ["--checkpoint", checkpoint]
    for resume in (["--resume"], []):
        with pytest.raises(UserError, match="another process is at work in"):
            call(MODULES[script], *start, "--output-dir", tmp_path / "run", "--no-cuda", *resume)
    assert list((tmp_path / "run").iterdir()) == []
    other.kill()
    other.wait()
    stare_utils.lock_run(tmp_path / "run")  # the lock went with it


def test_a_damaged_rollout_is_named(tmp_path):
    rollout = {name: np.asarray(value) for name, value in invent_rollouts([3])[0].items()}
    np.savez(tmp_path / "3_0.npz", **rollout)
    assert sta_tpo.read_rollouts([tmp_path / "3_0.npz"])[0]["init_seed"] == 3
    for spoil in (spoil_length, spoil_byte):
        np.savez(tmp_path / "3_0.npz", **rollout)
        spoil(tmp_path / "3_0.npz")
        with pytest.raises(UserError, match="3_0.npz is damaged .*: remove it"):
            sta_tpo.read_rollouts([tmp_path / "3_0.npz"])


def test_an_env_process_that_dies_is_one_line_in_every_method():
    envs = make_envs("PickCube-v1", 2, seed=0, render=False)
    envs.reset(seed=0)
    envs.parts[1].processes[0].kill()
    envs.parts[1].processes[0].join()
    with pytest.raises(UserError, match="an env process died"):
        for _ in range(3):  # the first step may still be written into a pipe that nobody reads
            envs.step(torch.zeros(2, 7))
    assert not envs.parts[1].processes[0].is_alive()
    envs.close()


def test_checksums_are_of_whole_files(tmp_path):
    (tmp_path / "x").write_bytes(content := bytes(2**24) + b"end")
    assert vla.checksums(tmp_path) == {"x": zlib.crc32(content)}


def test_a_signal_after_the_loop_acts_at_once(monkeypatch):
    for name, value in (("signals", []), ("held", False), ("leaving", False)):
        monkeypatch.setattr(Stop, name, value)
    assert Stop.hold(True) and not Stop.hold(False)
    with pytest.raises(KeyboardInterrupt):
        Stop.catch(signal.SIGTERM, None)
