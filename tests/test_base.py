"""checkpoints/base and benchmark/base.py, which makes it: a model that sees and knows no action."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call, output_of, write_demos

import eval as evaluation
import sft
from benchmark import base
from plumbing.checkpoint import load_policy
from world.tasks import UserError

ENV_ID = "PickCube-v1"


def made_up_frames(folder, M: int) -> base.Frames:
    """Frames of two tasks. Each number says the task and the row."""
    for k, env_id in enumerate(("a", "b")):
        (folder / env_id).mkdir()
        for name, (shape, dtype) in base.FIELDS.items():
            rows = (100 * k + np.arange(M)).reshape(M, *[1] * len(shape))
            np.save(
                folder / env_id / f"{name}.npy", np.broadcast_to(rows, (M, *shape)).astype(dtype)
            )
    return base.Frames(folder, ["a", "b"], M)


def test_a_row_is_of_the_right_task(tmp_path):
    frames = made_up_frames(tmp_path, M=5)
    index = torch.tensor([0, 4, 5, 9])
    for name, (shape, _) in base.FIELDS.items():
        rows = frames.rows(name, index)
        assert rows.shape == (4, *shape)
        assert rows.flatten(1).float().mean(1).tolist() == [0, 4, 100, 104], name
    assert frames.stats["mean"] == pytest.approx([52] * 8)


def test_frames_of_another_number_are_refused(tmp_path):
    made_up_frames(tmp_path, M=5)
    with pytest.raises(UserError, match="has 5 frames, not 6: give another --frames"):
        base.Frames(tmp_path, ["a", "b"], 6)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "args.json").write_text('{"script": "sft"}')
    with pytest.raises(UserError, match="is no base model: give another --output"):
        call(base, "--output", tmp_path)
    assert (tmp_path / "args.json").exists()


def test_nobody_acts_with_it(tmp_path):
    flags = ("--checkpoint", sft.BASE, "--output-dir", tmp_path, "--no-cuda")
    with pytest.raises(UserError, match="knows the actions of no task here"):
        call(evaluation, *flags)
    with pytest.raises(UserError, match=f"not on {ENV_ID}"):
        call(evaluation, *flags, "--env-id", ENV_ID)


def test_held_out_losses_are_means_per_task(tmp_path):
    frames = made_up_frames(tmp_path, M=5)
    reader = base.Reader(base.Args(), frames, [ENV_ID, "PushCube-v1"])
    # A read-out of 0 leaves the smooth L1 distance of the geometry itself, in units of 10 cm.
    torch.nn.init.zeros_(reader.head.weight)
    torch.nn.init.zeros_(reader.head.bias)
    found = reader.held_out(torch.tensor([1, 3, 6]))
    assert found == pytest.approx([(10 + 30) / 2 - 0.5, 1010 - 0.5])


def test_sft_starts_from_the_shipped_model_that_knows_no_action():
    assert sft.start_of(sft.Args()) == str(ROOT / "checkpoints/base")
    model, processor, _ = load_policy(sft.BASE, torch.device("cpu"))
    assert list(model.config.norm_stats) == ["base"] and processor.image_size == 128
    assert sum(weights.numel() for weights in model.parameters()) < 1_200_000


@pytest.mark.slow
def test_a_base_is_made_and_a_policy_from_it(tmp_path):
    made = tmp_path / "base"
    flags = "--num-frames 20 --num-updates 2 --batch-size 4".split()
    args = ("--env-id", ENV_ID, "--output", made, "--frames", tmp_path / "frames", *flags)
    printed = output_of("benchmark/base.py", *args, cwd=tmp_path)
    assert "update 2: loss" in printed and f"held out: {ENV_ID}" in printed
    file = tmp_path / "frames" / ENV_ID / "rgb.npy"
    recorded = file.stat().st_mtime_ns
    rgb = np.load(file)
    assert rgb.shape == (20, 128, 128, 3) and (rgb.std((1, 2, 3)) > 10).all()
    # Frames that are there are not made again, and the same seed gives the same model.
    weights = (made / "model.safetensors").read_bytes()
    shutil.rmtree(made)
    output_of("benchmark/base.py", *args, cwd=tmp_path)
    assert file.stat().st_mtime_ns == recorded
    assert (made / "model.safetensors").read_bytes() == weights

    stats = {}
    for start in (made, "tiny"):
        run = tmp_path / f"run_{len(stats)}"
        demos = write_demos(tmp_path / "demos.h5")
        flags = "--num-updates 2 --batch-size 4 --num-eval-episodes 0 --no-cuda".split()
        args = ("--vla", start, "--demo-path", demos, "--output-dir", run, *flags)
        output_of("sft.py", "--env-id", ENV_ID, *args, cwd=tmp_path)
        config = json.loads((run / "checkpoint/config.json").read_text())
        stats[str(start)] = config["norm_stats"]
    # The range of the actions is the demonstrations' own. Proprioception stays as it was learned.
    assert stats[str(made)][ENV_ID]["action"] == stats["tiny"][ENV_ID]["action"]
    assert stats[str(made)][ENV_ID]["proprio"] == stats[str(made)]["base"]["proprio"]
    flags = "--num-eval-episodes 2 --num-envs 2 --no-cuda".split()
    output_of("eval.py", "--checkpoint", tmp_path / "run_0", *flags, cwd=tmp_path)
    # One task has no name in the names of the files.
    assert (tmp_path / "run_0/results.json").exists()
