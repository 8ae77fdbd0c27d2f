"""What is written, and when: a place that cannot be written is found before hours of work are lost.

Results come first, then pictures, then videos. A picture that cannot be written is a warning.
"""

import json
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio
import numpy as np
import pytest
from conftest import RESULT, call

import eval as evaluation
from plumbing import human_pairs, page, report
from world import assets
from world.tasks import UserError

ROOT = Path(__file__).parent.parent
FRAMES = [np.zeros((16, 16, 3), np.uint8)] * 2


# ---- before the first episode ----
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "b"
    report.check_writable(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named_with_its_cause():
    with pytest.raises(UserError, match=r"cannot write to /proc/x \(.+\): give another --output"):
        report.check_writable(Path("/proc/x"))


def test_a_file_in_the_folders_place_is_named(tmp_path):
    place = tmp_path / "results"
    place.write_text("a file")
    with pytest.raises(UserError, match="cannot write to .*results"):
        report.check_writable(place)


def test_a_full_disk_is_found_before_the_first_episode(tmp_path, monkeypatch):
    # /dev/full takes no byte.
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(UserError, match="No space left on device"):
        report.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_eval_ends_in_one_line_before_it_plays(tmp_path):
    checkpoint = ROOT / "checkpoints/PickCube-v1__sft"
    blocked = tmp_path / "file"
    blocked.write_text("")
    command = [sys.executable, "eval.py", "--checkpoint", checkpoint, "--output-dir", blocked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write to {blocked}")
    assert line.endswith("give another --output-dir")


# ---- results, pictures, videos ----
def fails(*args, **kwargs):
    """Stands for an encoder or a plotting library that refuses."""
    raise RuntimeError("no codec")


def test_numbers_are_there_before_any_picture(tmp_path, monkeypatch):
    seen = []

    def look(path, *args):
        seen.append((path.name, sorted(file.name for file in tmp_path.iterdir())))

    monkeypatch.setattr(evaluation, "write_page", look)
    monkeypatch.setattr(evaluation, "write_video", look)
    evaluation.report(tmp_path, "", RESULT, {}, [FRAMES], tmp_path)
    assert seen == [("report.html", ["results.json"]), ("video.mp4", ["results.json"])]


def test_a_refusing_encoder_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imageio, "mimwrite", fails)
    evaluation.report(tmp_path, "", RESULT, {}, [FRAMES], tmp_path)
    out = capsys.readouterr().out
    assert f"warning: {tmp_path / 'video.mp4'} is not written: no codec" in out
    assert f"warning: a film of {tmp_path / 'report.html'} is not written: no codec" in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'results.json'}, {tmp_path / 'report.html'}"
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["report.html", "results.json"]
    written = (tmp_path / "report.html").read_text()
    assert "<video" not in written and "The films could not be encoded." in written
    assert json.loads((tmp_path / "results.json").read_text()) == RESULT


def test_a_plot_that_fails_is_not_in_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "curves_svg", fails)
    evaluation.report(tmp_path, "", RESULT, {}, [], tmp_path)
    path = tmp_path / "report.html"
    assert f"a curve of {path} is not written: no codec" in capsys.readouterr().out
    assert "50.0 % of 2 greedy episodes" in path.read_text() and "<svg" not in path.read_text()


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space"), report.whole_file(path) as new:
        new.write_text("half")
        raise OSError("No space")
    assert list(tmp_path.iterdir()) == []
    report.write_text(path, "whole")
    assert path.read_text() == "whole"


def test_clips_for_a_person_need_an_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio, "mimwrite", fails)
    with pytest.raises(UserError, match=r"pair.mp4 \(no codec\): mend that"):
        human_pairs.write_clip(tmp_path / "pair.mp4", np.zeros((2, 16, 16, 3), np.uint8))


def test_a_video_that_is_cut_short_is_noticed(tmp_path, monkeypatch):
    # ffmpeg ends so on a full disk, and raises nothing.
    write = imageio.mimwrite
    monkeypatch.setattr(
        imageio, "mimwrite", lambda new, frames, **how: write(new, frames[:1], **how)
    )
    frames = [np.zeros((16, 16, 3), np.uint8)] * 3
    with pytest.raises(RuntimeError, match="1 of 3 frames"):
        report.encode(tmp_path / "a.mp4", frames)
    assert list(tmp_path.iterdir()) == []


# ---- the user's cache ----
def test_the_cache_follows_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_home() == tmp_path
    # An empty variable counts as none.
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.cache_home() == tmp_path / "home" / ".cache"


def test_a_user_without_a_home_is_told_the_variable(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody(uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        assets.cache_home()


def test_a_task_with_borrowed_statistics_has_files_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: {**RESULT})
    policy = ("--checkpoint", ROOT / "checkpoints/PickCube-v1__sft", "--output-dir", tmp_path)
    call(evaluation, *policy, "--no-cuda")
    borrowed = ("--env-id", "PushCube-v1", "--unnorm-key", "PickCube-v1")
    call(evaluation, *policy, *borrowed, "--no-cuda")
    names = {file.name for file in tmp_path.iterdir()}
    assert {"results.json", "results_PushCube-v1.json"} <= names
