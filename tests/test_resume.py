"""A run that dies after its first save and is resumed ends like one that never stopped, bit for bit."""
import pytest
from conftest import call, differing, invent_rollouts, write_demos

import sft
import sta_tpo


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


def test_sft_resumes(tmp_path, monkeypatch):
    demos = write_demos(tmp_path / "demos.h5")
    check_resume(sft, monkeypatch, tmp_path, "--demo-path", demos, "--num-updates", 5, "--save-freq", 2, "--warmup-updates", 2, "--batch-size", 4,
                 "--num-eval-episodes", 0, "--no-cuda")  # fmt: skip


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sta_tpo_resumes(lora_rank, checkpoint, tmp_path, monkeypatch):
    rollouts = invent_rollouts([11, 22])
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda folder: list(rollouts))
    check_resume(sta_tpo, monkeypatch, tmp_path, "--checkpoint", checkpoint, "--batch-size", 8, "--num-epochs", 2, "--save-freq", 3,
                 "--lora-rank", lora_rank, "--num-eval-episodes", 0, "--no-cuda")  # fmt: skip
