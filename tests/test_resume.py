"""A run that dies after its first save and is resumed equals a straight one, bit for bit."""

import itertools
import time
from dataclasses import asdict

import pytest
import torch
from conftest import call, differing, invent_rollouts, output_of, scalars, write_demos

import sft
import sta_tpo
from plumbing.run import Run
from world.tasks import UserError


class Stopped(Exception):
    pass


def die_after_first_save(script, monkeypatch, *args):
    def save_and_die(*parts, **named):
        save(*parts, **named)
        raise Stopped

    with monkeypatch.context() as patch:
        save = script.save_checkpoint
        patch.setattr(script, "save_checkpoint", save_and_die)
        with pytest.raises(Stopped):
            call(script, *args)


def check_resume(script, monkeypatch, tmp_path, *args):
    straight = tmp_path / "straight"
    stopped = tmp_path / "stopped"
    call(script, *args, "--output-dir", straight)
    die_after_first_save(script, monkeypatch, *args, "--output-dir", stopped)
    # The run did stop early.
    assert differing(straight / "checkpoint", stopped / "checkpoint")
    # The second time there is nothing left to do.
    for _ in range(2):
        call(script, *args, "--output-dir", stopped, "--resume")
        assert differing(straight / "checkpoint", stopped / "checkpoint") == []


def test_what_was_logged_after_the_last_save_is_not_logged_twice(tmp_path):
    settings = asdict(sft.Args(output_dir=str(tmp_path), resume=True))
    # The run was stopped after step 5 and saved after step 3.
    for begin, end in ((0, 5), (3, 6)):
        # TensorBoard reads files in the order of their names, which count in whole seconds.
        time.sleep(1)
        run = Run("sft", str(tmp_path), True, 0)
        run.open(settings, str(tmp_path), begin)
        for step in range(begin + 1, end + 1):
            run.log({"losses/ce": 10 * begin + step}, step)
        run.writer.close()
    assert scalars(tmp_path)["losses/ce"] == [1, 2, 3, 34, 35, 36]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sft_resumes(lora_rank, checkpoint, tmp_path, monkeypatch):
    demos = write_demos(tmp_path / "demos.h5")
    start = ("--vla", checkpoint if lora_rank else "tiny")
    data = ("--demo-path", demos)
    rank = ("--lora-rank", lora_rank)
    flags = "--num-updates 5 --save-freq 2 --batch-size 4 --num-eval-episodes 0 --no-cuda"
    check_resume(sft, monkeypatch, tmp_path, *data, *rank, *start, *flags.split())
    again = ("--output-dir", tmp_path / "stopped", "--resume", "--no-cuda")
    with pytest.raises(UserError, match=f"begun with lora_rank = {lora_rank}, not 3"):
        call(sft, *data, "--lora-rank", 3, *again)
    with pytest.raises(UserError, match="begun with env_id = PickCube-v1, not PushCube-v1"):
        call(sft, "--env-id", "PushCube-v1", *rank, *start, *again)
    with pytest.raises(UserError, match="begun with seed = 1, not 2"):
        call(sft, "--seed", 2, *rank, *start, *again)
    with pytest.raises(UserError, match="begun with vla = .*, not /another"):
        call(sft, *data, *rank, "--vla", "/another", *again)
    # Two processes would see batches twice as large.
    monkeypatch.setattr(sft.parallel, "join", lambda cuda: (0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="begun with processes = 1, not 2"):
        call(sft, *data, *rank, *start, *again)


def test_sft_s_chunks_and_gradient_checkpointing_change_no_gradient(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--num-updates 2 --batch-size 8 --num-eval-episodes 0 --no-cuda"
    for name, more in (("whole", ""), ("parts", "--chunk-size 3 --gradient-checkpointing")):
        folders = ("--demo-path", demos, "--output-dir", tmp_path / name)
        call(sft, *folders, *flags.split(), *more.split())
    whole = scalars(tmp_path / "whole")
    parts = scalars(tmp_path / "parts")
    for key in ("losses/grad_norm", "losses/ce", "losses/aux", "losses/stage_accuracy"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-3), key
    assert whole["losses/grad_norm"][0] > 0.1


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sta_tpo_resumes(lora_rank, checkpoint, tmp_path, monkeypatch):
    rollouts = invent_rollouts([11, 22])
    seeds = itertools.count()

    def collect(*args):
        # Sampling leaves other random numbers in each process, and in a run that goes on. A new
        # adapter must not depend on them.
        torch.manual_seed(next(seeds))
        return []

    monkeypatch.setattr(sta_tpo, "collect_rollouts", collect)
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda files: list(rollouts))
    flags = "--batch-size 8 --num-epochs 2 --save-freq 3 --num-eval-episodes 0 --no-cuda"
    start = ("--checkpoint", checkpoint, "--lora-rank", lora_rank)
    check_resume(sta_tpo, monkeypatch, tmp_path, *start, *flags.split())


def test_a_resumed_run_goes_on_under_its_id_at_wandb(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    flags = "--env-id PickCube-v1 --track --batch-size 4 --num-eval-episodes 0 --no-cuda --resume"
    args = ("--demo-path", demos, *flags.split(), "--output-dir", tmp_path / "run")
    for updates in (50, 100):
        output_of("sft.py", *args, "--num-updates", updates, cwd=tmp_path, WANDB_MODE="offline")
    kept = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(kept) == 2
    # Both are parts of one run, and hold what TensorBoard shows.
    assert len({file.name for file in kept}) == 1
    for file in kept:
        assert b"losses/ce" in file.read_bytes()
