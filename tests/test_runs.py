"""Folders of runs, jobs of several processes, and signals: what comes from outside is checked."""

import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, cli, tiny_model, write_demos

import plumbing.folders
import sft
import sta_tpo
from plumbing import parallel
from plumbing.checkpoint import checksums, read_settings, save_checkpoint
from plumbing.folders import LOCKS, RUN_FILES, find_checkpoint, holds_run, lock_run, make_folder
from plumbing.run import PATIENCE, Run
from world.tasks import UserError


# ---- where a run starts ----
@pytest.fixture
def put_run(checkpoint, tmp_path, monkeypatch):
    """Puts runs into an empty working directory's runs/, each one newer than those before."""
    monkeypatch.chdir(tmp_path)
    age = iter(range(1000))

    def put(name: str, **settings) -> Path:
        folder = tmp_path / "runs" / name / "checkpoint"
        shutil.copytree(checkpoint / "checkpoint", folder)
        settings = {"env_id": "PickCube-v1", **settings}
        (folder / "args.json").write_text(json.dumps(settings))
        (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
        os.utime(folder, (1e9 + next(age),) * 2)
        return folder.parent

    return put


def start_of_ppo(env_id: str = "PickCube-v1") -> str:
    """The name of the run that sta_ppo.py starts from."""
    return Path(find_checkpoint(env_id, ("sta_tpo", "sft"))).parent.name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("my_sft", {"script": "sft"}),
        ("PushCube-v1__sta_ppo__renamed", {"script": "sft"}),
        ("several", {"script": "sft", "env_id": "PushCube-v1,PickCube-v1"}),
        ("from_before_scripts_were_named", {"num_demos": 3}),
        ("PickCube-v1__sft__1__0", {}),
        ("PushCube-v1,PickCube-v1__sft__1__0", {"env_id": "PushCube-v1,PickCube-v1"}),
        ("PushCube-v1+PickCube-v1__sft__1__0", {"env_id": "PushCube-v1,PickCube-v1"}),
    ],
)
def test_a_run_is_found_whatever_its_folder_is_called(name, settings, put_run, capsys):
    put_run(name, **settings)
    put_run("of_another_task", script="sft", env_id="PushCube-v1")
    put_run("of_another_script", script="sta_ppo")
    assert start_of_ppo() == name
    said = capsys.readouterr().out
    assert f"starts from runs/{name}/checkpoint" in said and "passed over" not in said


def test_the_newest_run_of_the_first_script_is_the_one_to_start_from(put_run):
    put_run("a", script="sft")
    put_run("c", script="sft")
    put_run("b", script="sft")
    assert start_of_ppo() == "b"
    put_run("tpo", num_initial_states=3)
    put_run("later", script="sft")
    assert start_of_ppo() == "tpo"
    assert find_checkpoint("PickCube-v1", ("sft",)) == "runs/later/checkpoint"


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("in", flush=True)
time.sleep(99)
"""


@pytest.fixture
def hold():
    """Locks a folder in another process, as a run does."""
    others = []

    def begin(folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, folder]
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        others[-1].stdout.readline()

    yield begin
    for other in others:
        other.kill()
        other.wait()


def test_runs_that_cannot_be_started_from_are_passed_over_with_a_reason(put_run, hold, capsys):
    put_run("whole", script="sft")
    damaged = put_run("damaged", script="sft")
    file = damaged / "checkpoint/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    no_model = put_run("no_model", script="sft")
    for name in ("config.json", "checksums.json"):
        (no_model / "checkpoint" / name).unlink()
    (put_run("PickCube-v1__sft__1__2") / "checkpoint/args.json").write_text("{")
    half_saved = put_run("PickCube-v1__sft__1__3", script="sft") / "checkpoint"
    half_saved.rename(half_saved.with_name("checkpoint.old"))
    (put_run("own_name") / "checkpoint/args.json").write_text('{"env_id": 3}')
    hold(put_run("at_work", script="sft"))
    assert start_of_ppo() == "whole"
    (said,) = capsys.readouterr().out.splitlines()
    for words in (
        "runs/damaged (damaged: model.safetensors",
        "runs/no_model (no checkpoint",
        "runs/PickCube-v1__sft__1__2 (damaged: args.json",
        "runs/PickCube-v1__sft__1__3 (it died while it saved: --resume",
        "runs/own_name (no args.json that names its script and task)",
        "runs/at_work (another process is at work in it)",
    ):
        assert words in said
    shutil.rmtree("runs/whole")
    assert find_checkpoint("PickCube-v1", ("sft",)) == str(ROOT / "checkpoints/PickCube-v1__sft")


def test_where_none_is_left_the_error_says_why(put_run, hold):
    hold(put_run("at_work", script="sft", env_id="Nothing-v1"))
    with pytest.raises(UserError, match=r"sft.py --env-id Nothing-v1.*runs/at_work \(another"):
        find_checkpoint("Nothing-v1", ("sft",))


def test_a_run_s_args_json_names_its_script_and_a_command_to_paste(tmp_path, monkeypatch):
    argv = ["sft.py", "--output-dir", "my runs/it's", "--demo-path", "a;b.h5"]
    monkeypatch.setattr(sys, "argv", argv)
    save_checkpoint(tmp_path, *tiny_model(), {"env_id": "PickCube-v1"}, {"script": "sft"})
    settings = read_settings(tmp_path / "checkpoint")
    assert settings["script"] == "sft"
    assert shlex.split(settings["command"]) == ["python", *argv]
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    for per_node, where in (("4", "--standalone"), ("2", "--nnodes 2")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
        expected = f"torchrun {where} --nproc-per-node {per_node}"
        assert " ".join(parallel.launcher()) == expected


# ---- new folders ----
def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 5.5)
    made = []
    gate = threading.Barrier(8)

    def begin():
        gate.wait()
        made.append(make_folder("PickCube-v1,PushCube-v1", "sft", 1))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"PickCube-v1+PushCube-v1__sft__1__{second}" for second in range(5, 13)]
    assert sorted(path.name for path in made) == sorted(names)


@pytest.mark.parametrize("spoil", [lambda runs: runs.touch(), lambda runs: runs.symlink_to("no")])
def test_where_runs_is_no_folder_no_name_is_searched_for(spoil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "runs")
    with pytest.raises(OSError, match="runs"):
        make_folder("PickCube-v1", "sft", 1)


def open_run(folder: Path) -> None:
    """Opens a new run of sft.py in a folder."""
    run = Run("sft", str(folder), False, 0)
    run.open(asdict(sft.Args(output_dir=str(folder))), str(folder), 0)
    run.writer.close()


def test_a_log_file_is_no_run(tmp_path):
    for name in ("slurm-1.out", "log.txt", "nohup.out", ".nfs01"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    open_run(tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_file_of_a_run_is_one(name, tmp_path):
    assert not holds_run(tmp_path)
    (tmp_path / name.replace("*", "x")).touch()
    with pytest.raises(UserError, match="holds a run already"):
        open_run(tmp_path)


# ---- what a folder holds ----
@pytest.mark.parametrize("text", [None, "", "[1]", "{", '{"env_id": "Pick', "\0\xff"])
def test_settings_that_cannot_be_read_are_one_line(text, tmp_path):
    state = {"script": "sft", "step": 1, "wall_s": 0}
    save_checkpoint(tmp_path, *tiny_model(), {}, state)
    (tmp_path / "checkpoint/checksums.json").unlink()
    file = tmp_path / "checkpoint/args.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="args.json is missing or damaged") as error:
        Run("sft", str(tmp_path), True, 0)
    assert "\n" not in str(error.value)


def test_a_damaged_record_of_the_source_is_one_line(tmp_path):
    (tmp_path / "source.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="source.txt is damaged"):
        call(sta_tpo, "--resume", "--output-dir", tmp_path, "--no-cuda")


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EBADF"])
def test_a_file_system_without_locks_is_said_and_used(name, put_run, monkeypatch, capsys):
    run = put_run("a", script="sft")

    def refuse(handle: int, how: int) -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        lock_run(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be locked" in line and os.strerror(getattr(errno, name)) in line
    assert start_of_ppo() == "a"
    assert run.resolve() in LOCKS


# ---- a launcher's variables ----
@pytest.fixture
def launcher(monkeypatch):
    """Sets a launcher's variables, and none besides."""

    def put(text: str) -> None:
        for name in parallel.PLACE + parallel.ADDRESS:
            monkeypatch.delenv(name, raising=False)
        for pair in text.split():
            monkeypatch.setenv(*pair.split("="))

    return put


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("WORLD_SIZE=2", "RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set"),
        ("WORLD_SIZE=2 RANK=0", "LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=here", "MASTER_PORT not set"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR= MASTER_PORT=1", "MASTER_ADDR not set"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=here MASTER_PORT=1", "LOCAL_RANK not set"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=here MASTER_PORT=x", "is a number from"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=70000", "is a number from"),
        ("LOCAL_WORLD_SIZE=0", "does not hold"),
        ("LOCAL_WORLD_SIZE=3", "does not hold"),
        ("LOCAL_WORLD_SIZE=", "whole numbers"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=here MASTER_PORT=1", "does not hold"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=1 MASTER_ADDR=here MASTER_PORT=1", "does not hold"),
        ("RANK=1", "does not hold"),
        ("LOCAL_RANK=1", "does not hold"),
        ("WORLD_SIZE=0", "does not hold"),
        ("WORLD_SIZE= RANK=", "whole numbers"),
        ("RANK=-1", "whole numbers"),
        ("RANK=one", "whole numbers"),
        ("LOCAL_RANK=0.5", "whole numbers"),
        ("WORLD_SIZE=\u00b2", "whole numbers"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_are_named(given, words, launcher):
    launcher(given)
    with pytest.raises(UserError) as error:
        parallel.join(cuda=False)
    names = " ".join(pair.split("=")[0] for pair in given.split())
    line = str(error.value)
    assert words in line and "torchrun" in line and "\n" not in line
    assert all(pair in line for pair in given.split())
    assert set(names.split()) == set(line.partition("`unset ")[2].partition("`")[0].split())


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("", (0, 1, 0)),
        ("RANK=0 WORLD_SIZE=1", (0, 1, 0)),
        ("MASTER_ADDR=here", (0, 1, 0)),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=here MASTER_PORT=1", (1, 2, 0)),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=here MASTER_PORT=1", (3, 4, 1)),
    ],
)
def test_variables_of_a_launcher_that_fit(given, place, launcher):
    launcher(given)
    assert parallel.read_place() == place


def test_more_processes_than_gpus(launcher, monkeypatch):
    launcher("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=here MASTER_PORT=1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK=1, .* 1 GPUs: .*--nproc-per-node 1"):
        parallel.join(cuda=True)


def free_port() -> int:
    """A port that no program uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_half_a_job_is_one_line_in_a_shell(tmp_path):
    done = cli("sft.py", "--output-dir", "out", "--no-cuda", cwd=tmp_path, WORLD_SIZE="2")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: WORLD_SIZE=2") and "`unset WORLD_SIZE`" in line


def test_a_port_in_use_is_one_line(launcher):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher(f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
        with pytest.raises(UserError, match=f"cannot start a job at 127.0.0.1:{port} .*in use"):
            parallel.connect("gloo")


# ---- waits, and the signals that end them ----
# A script's processes: all join. Then the last one stands still, and rank 0 waits for it.
HANG = """
import os, signal, sys, time
import torch
from plumbing import parallel, run
from plumbing.run import Stop, one_line_errors

parallel.HEARTBEAT = 0.5
run.PATIENCE = 1
with one_line_errors():
    rank, world_size, _ = parallel.join(False)
    envs = None
    if "envs" in sys.argv and rank == 0:
        from world.vector import make_envs
        envs = make_envs("PickCube-v1", 2, 0, render=False)
    parallel.barrier()
    Stop.hold(True)
    print("held", file=sys.stderr, flush=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    parallel.sum_over_processes([torch.ones(3)])
"""


def process_of_job(rank: int, port: int, *args) -> subprocess.Popen:
    """Starts one process of a job of two."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ |= {name: str(value) for name, value in place.items()}
    command = [sys.executable, "-c", HANG, *args]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen, words: str) -> str:
    """The first line of a process's errors that holds the words."""
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"ended with {process.wait()} and without {words!r}")


def family(pid: int) -> list[int]:
    """A process's descendants that are at work."""
    found = []
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    for child, parent, state in rows:
        if int(parent) == pid and not state.startswith("Z"):
            found += [int(child), *family(int(child))]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is at work."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def end_with(process: subprocess.Popen, signals: tuple) -> float:
    """Sends signals with a moment between them. Returns the seconds until the process ends."""
    for number in signals:
        time.sleep(0.5)
        assert process.poll() is None, "the first signal waits for the update"
        process.send_signal(number)
    begin = time.time()
    process.wait(20)
    return time.time() - begin


def test_a_wait_for_processes_that_never_come_says_so_and_ends_at_two_signals():
    port = free_port()
    process = process_of_job(0, port)
    line = read_until(process, "waiting for")
    assert f"process 0: waiting for 1 of 2 processes at 127.0.0.1:{port}" in line
    assert end_with(process, (signal.SIGINT, signal.SIGTERM)) < 8
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in process.stderr.read()


@pytest.mark.parametrize(
    ("signals", "args"),
    [
        ((signal.SIGINT, signal.SIGINT), ()),
        pytest.param((signal.SIGTERM, signal.SIGTERM), ("envs",), marks=pytest.mark.slow),
    ],
)
def test_two_signals_end_a_process_that_waits_for_a_hung_one(signals, args):
    port = free_port()
    hung = process_of_job(1, port)
    process = process_of_job(0, port, *args)
    try:
        read_until(process, "held")
        line = read_until(process, "waiting for")
        assert "waiting for 1 of 2 processes" in line and "(sum)" in line
        started = family(process.pid)
        assert len(started) >= 3 if args else not started
        assert end_with(process, signals) < 8
        assert process.returncode == 128 + signals[-1]
        # The fork server notices after a moment that the script is gone.
        deadline = time.time() + 5
        while any(map(is_alive, started)) and time.time() < deadline:
            time.sleep(0.1)
        assert [pid for pid in started if is_alive(pid)] == []
    finally:
        for each in (hung, process):
            each.kill()
            each.wait()
    # The test's own patience is shorter than a user's.
    assert PATIENCE <= 9


@pytest.mark.slow
def test_the_processes_of_a_job_share_a_new_folder(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = "--num-updates 1 --batch-size 4 --num-eval-episodes 0 --no-cuda"
    command = [*launcher, "--nproc-per-node", "2", ROOT / "sft.py", "--demo-path", demos]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *flags.split()], cwd=tmp_path, env=environ, check=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert read_settings(run / "checkpoint")["command"].startswith("torchrun --standalone")
    assert plumbing.folders.made_by(run) == ("sft", ["PickCube-v1"])
