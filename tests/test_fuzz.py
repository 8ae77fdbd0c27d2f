"""Whatever a user hands in, a script ends in one line or does its work: no traceback, no hang, nothing half-written. Some 600 invented cases."""
import contextlib
import dataclasses
import json
import shutil
import typing
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import invent_rollouts, write_demos
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
from stare_utils import UserError, one_line_errors

SCRIPTS = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
JUNK = st.one_of(st.none(), st.booleans(), st.integers(-3, 64), st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 3), max_size=3),
                 st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))  # fmt: skip
NUMBERS = ["-1", "0", "1", "2", "3", "-0.5", "0.5", "1e-4", "nan", "inf", "1e400", "x", ""]
WORDS = ["", "x", "/dev/null/x", "\0", "PickCube-v1", "Pick,Push", "a" * 300, "../..", "none", "--"]


def values_of(annotation):
    if annotation is bool:
        return st.none()
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from([*map(str, typing.get_args(annotation)), "neither"])
    return st.sampled_from(WORDS if annotation in (str, tuple[str, ...]) else NUMBERS)


def command_lines(script):
    """Some flags of a script with values that are good, bad or absurd."""
    fields = [field for field in dataclasses.fields(script.Args) if field.name not in ("output_dir", "cuda", "track")]
    hints = typing.get_type_hints(script.Args)
    one = st.sampled_from(fields).flatmap(lambda field: st.tuples(st.just(field.name), values_of(hints[field.name])))
    return st.lists(one, max_size=4, unique_by=lambda flag: flag[0])


class Reached(Exception):
    """The world: every check of the input has passed."""


def reached(*args, **kwargs):
    raise Reached


def run(script, args: list[str], folder: Path) -> int:
    """The exit code of a script, 0 where its input is good. What it says on an error is one line, and its folder is as it was."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with one_line_errors():
            script.main(tyro.cli(script.Args, args=[*args, "--output-dir", str(folder)]))
    except SystemExit as stopped:
        assert stopped.code == 2
        assert not folder.exists() or not any(folder.iterdir()), "half-written"
        return 2
    except Reached:
        return 0
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_command_lines(name, checkpoint, tmp_path, monkeypatch, capsys):
    script, codes = SCRIPTS[name], []
    monkeypatch.chdir(tmp_path)
    for world in {"sft": ["open_run"], "sta_tpo": ["open_run"], "sta_ppo": ["open_run"], "eval": ["evaluate"]}[name]:
        monkeypatch.setattr(script, world, reached)
    start = ["--demo-path", str(write_demos(tmp_path / "demos.h5"))] if name == "sft" else ["--checkpoint", str(checkpoint)]

    @settings(max_examples=70)
    @given(command_lines(script))
    def check(flags):
        flags = dict(flags)
        args = [] if start[0][2:].replace("-", "_") in flags else list(start)
        for flag, value in flags.items():
            args += [f"--{flag.replace('_', '-')}", *([] if value is None else [value])]
        codes.append(run(script, [*args, "--no-cuda"], tmp_path / "out"))
        errors = capsys.readouterr().err
        assert "Traceback" not in errors and (codes[-1] == 0 or errors), errors

    check()
    assert {0, 2} == set(codes), "good and bad ones"


def spoil_json(text: str, data) -> str:
    """A JSON text with one value, at any depth, replaced by junk, removed, or the text itself cut."""
    if data.draw(st.booleans(), label="cut"):
        return text[: data.draw(st.integers(0, len(text) - 1))]
    tree = node = json.loads(text)
    while True:
        key = data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
            continue
        node[key] = data.draw(JUNK)
        return json.dumps(tree)


@settings(max_examples=150)
@given(st.data())
def test_demonstrations(tmp_path_factory, data):
    """Either file of a pair of demonstrations spoilt: it is read, with shapes that fit, or refused."""
    path = write_demos(tmp_path_factory.mktemp("demos") / "demos.h5")
    kind = data.draw(st.sampled_from(["json", "bytes", "array", "missing"]))
    if kind == "json":
        path.with_suffix(".json").write_text(spoil_json(path.with_suffix(".json").read_text(), data))
    elif kind == "bytes":
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    else:
        with h5py.File(path, "a") as file:
            name = data.draw(st.sampled_from(["traj_0/actions", "traj_0/geometry", "traj_1/obs/proprio", "traj_1/obs/sensor_data/base_camera/rgb", "traj_0"]))
            del file[name]
            if kind == "array":
                shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
                file[name] = np.full(shape, data.draw(st.sampled_from([0.0, np.nan, 1e30])), data.draw(st.sampled_from(["f4", "i8", "u1"])))
    with contextlib.suppress(UserError):
        rgb, *others = sft.read_demos(path, "PickCube-v1", 10, 128)
        assert rgb.shape[1:] == (128, 128, 3) and {len(x) for x in others} == {len(rgb)} and all(x.isfinite().all() for x in others)


@settings(max_examples=150)
@given(st.data())
def test_preferences(tmp_path_factory, data):
    """A pairs.jsonl of which one line is spoilt, or of any text: pairs of this run, or a line by its number."""
    rollouts = invent_rollouts([11])
    names = [f"11_{i}" for i in range(4)]
    lines = [{"clip": "a.mp4", "stage": 0, "left": "11_2", "right": "11_3", "left_steps": [0, 2], "right_steps": [0, 3], "preferred": verdict}
             for verdict in ("left", "tie", None)]  # fmt: skip
    texts = [json.dumps(line) for line in lines]
    at = data.draw(st.integers(0, 2))
    texts[at] = spoil_json(texts[at], data) if data.draw(st.integers(0, 4)) else data.draw(st.text(max_size=20))
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(texts), errors="replace")
    try:
        pairs = sta_tpo.read_preferences(path, rollouts, names, 4, True)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all(0 <= pair[side] < 4 for pair in pairs for side in ("chosen", "rejected")) and all(pair["stage"] in range(4) for pair in pairs)


def test_a_line_of_pairs_names_no_path(tmp_path):
    """Roll-outs are looked up among the run's own: a path leads nowhere."""
    row = {"stage": 0, "left": "../../etc/passwd", "right": "11_3", "left_steps": [0, 2], "right_steps": [0, 3], "preferred": "left"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="line 1 cannot be read: KeyError"):
        sta_tpo.read_preferences(tmp_path / "pairs.jsonl", invent_rollouts([11]), [f"11_{i}" for i in range(4)], 4, True)


@settings(max_examples=120)
@given(st.data())
def test_configurations_of_checkpoints(checkpoint, tmp_path_factory, data):
    """A spoilt config.json beside checksums is always refused; without them the policy acts, or is refused."""
    folder = shutil.copytree(checkpoint / "checkpoint", tmp_path_factory.mktemp("config") / "checkpoint")
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(after := spoil_json(before, data))
    if after != before:
        with pytest.raises(UserError, match="damaged"):
            sta_ppo.load_policy(str(folder), torch.device("cpu"))
    (folder / "checksums.json").unlink()
    with contextlib.suppress(UserError):
        model, processor, _ = sta_ppo.load_policy(str(folder), torch.device("cpu"))
        stats = sta_ppo.task_stats(model, "PickCube-v1")
        assert len(stats["action"]["q01"]) == len(stats["action"]["q99"])
