"""A run that dies after its first save and is resumed ends like one that never stopped, bit for bit."""
import itertools
import time

import pytest
import torch
from conftest import call, differing, invent_rollouts, scalars, write_demos

import sft
import sta_tpo
from stare_utils import UserError


class Stopped(Exception):
    pass


def die_after_first_save(script, monkeypatch, *args):
    def save_and_die(*parts):
        save(*parts)
        raise Stopped

    with monkeypatch.context() as patch:
        save = script.save_checkpoint
        patch.setattr(script, "save_checkpoint", save_and_die)
        with pytest.raises(Stopped):
            call(script, *args)


def check_resume(script, monkeypatch, tmp_path, *args):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    call(script, *args, "--output-dir", straight)
    die_after_first_save(script, monkeypatch, *args, "--output-dir", stopped)
    assert differing(straight / "checkpoint", stopped / "checkpoint")  # it did stop early
    for _ in range(2):  # the second time there is nothing left to do
        call(script, *args, "--output-dir", stopped, "--resume")
        assert differing(straight / "checkpoint", stopped / "checkpoint") == []


def test_what_was_logged_after_the_last_save_is_not_logged_twice(tmp_path):
    args = sft.Args(output_dir=str(tmp_path), resume=True)
    for begin, end in ((0, 5), (3, 6)):  # stopped after step 5, saved after 3
        time.sleep(1)  # TensorBoard reads files in the order of their names, which tell seconds apart and no less
        _, writer = sft.open_run(args, "sft", 0, begin)
        for step in range(begin + 1, end + 1):
            writer.add_scalar("losses/ce", 10 * begin + step, step)
        writer.close()
    assert scalars(tmp_path)["losses/ce"] == [1, 2, 3, 34, 35, 36]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sft_resumes(lora_rank, checkpoint, tmp_path, monkeypatch):
    demos, vla = write_demos(tmp_path / "demos.h5"), checkpoint if lora_rank else "tiny"
    check_resume(sft, monkeypatch, tmp_path, "--demo-path", demos, "--num-updates", 5, "--save-freq", 2, "--batch-size", 4,
                 "--lora-rank", lora_rank, "--vla", vla, "--num-eval-episodes", 0, "--no-cuda")  # fmt: skip
    with pytest.raises(UserError, match=f"begun with lora_rank = {lora_rank}, not 3"):
        call(sft, "--demo-path", demos, "--lora-rank", 3, "--output-dir", tmp_path / "stopped", "--resume", "--no-cuda")
    with pytest.raises(UserError, match="begun with env_id = PickCube-v1, not PushCube-v1"):
        call(sft, "--env-id", "PushCube-v1", "--lora-rank", lora_rank, "--vla", vla, "--output-dir", tmp_path / "stopped", "--resume", "--no-cuda")
    with pytest.raises(UserError, match="begun with seed = 1, not 2"):
        call(sft, "--seed", 2, "--lora-rank", lora_rank, "--vla", vla, "--output-dir", tmp_path / "stopped", "--resume", "--no-cuda")
    with pytest.raises(UserError, match="begun with vla = .*, not /another"):
        call(sft, "--demo-path", demos, "--lora-rank", lora_rank, "--vla", "/another", "--output-dir", tmp_path / "stopped", "--resume", "--no-cuda")


def test_sft_s_chunks_and_gradient_checkpointing_change_no_gradient(tmp_path):
    demos = write_demos(tmp_path / "demos.h5")
    for name, flags in (("whole", ()), ("parts", ("--chunk-size", 3, "--gradient-checkpointing"))):
        call(sft, "--demo-path", demos, "--num-updates", 2, "--batch-size", 8, "--num-eval-episodes", 0, "--no-cuda", *flags,
             "--output-dir", tmp_path / name)  # fmt: skip
    whole, parts = (scalars(tmp_path / name) for name in ("whole", "parts"))
    for key in ("losses/grad_norm", "losses/ce", "losses/aux", "losses/stage_accuracy"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-3), key
    assert whole["losses/grad_norm"][0] > 0.1


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sta_tpo_resumes(lora_rank, checkpoint, tmp_path, monkeypatch):
    rollouts, seeds = invent_rollouts([11, 22]), itertools.count()
    # Sampling leaves other random numbers in each process, and in a run that goes on; a new adapter must not depend on them
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: torch.manual_seed(next(seeds)) and [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda folder: list(rollouts))
    check_resume(sta_tpo, monkeypatch, tmp_path, "--checkpoint", checkpoint, "--batch-size", 8, "--num-epochs", 2, "--save-freq", 3,
                 "--lora-rank", lora_rank, "--num-eval-episodes", 0, "--no-cuda")  # fmt: skip
