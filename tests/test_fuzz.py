"""Whatever a user hands in, a script ends in one line or does its work.

It prints no traceback, it does not hang, and it leaves nothing half-written. There are some 600
invented cases.
"""

import contextlib
import dataclasses
import json
import resource
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
from plumbing.checkpoint import load_policy, task_stats
from plumbing.human_pairs import read_preferences
from plumbing.run import one_line_errors
from world.demos import read_demos
from world.tasks import UserError

SCRIPTS = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 64),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NUMBERS = "-1 0 1 2 3 -0.5 0.5 1e-4 nan inf 1e400 x".split() + [""]
WORDS = "x /dev/null/x \0 PickCube-v1 Pick,Push ../.. none --".split(" ") + ["", "a" * 300]


# ---- command lines ----
def values_of(annotation):
    """Values of a flag as a command line gives them; None for a flag that takes no value."""
    if annotation is bool:
        return st.none()
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from([*map(str, typing.get_args(annotation)), "neither"])
    return st.sampled_from(WORDS if annotation in (str, tuple[str, ...]) else NUMBERS)


def command_lines(script):
    """Some flags of a script with values that are good, bad or absurd."""
    hints = typing.get_type_hints(script.Args)
    names = [field.name for field in dataclasses.fields(script.Args)]
    names = [name for name in names if name not in ("output_dir", "cuda", "track")]
    one = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), values_of(hints[name]))
    )
    return st.lists(one, max_size=4, unique_by=lambda flag: flag[0])


class Reached(Exception):
    """The script begins its work: the input has passed every check."""


def reached(*args, **kwargs):
    raise Reached


def run(script, args: list[str], folder: Path) -> int:
    """The exit code of a script, 0 where its input is good.

    On an error it must say one line and leave its folder as it was.
    """
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
    script = SCRIPTS[name]
    codes = []
    monkeypatch.chdir(tmp_path)
    # This is where the script begins its work.
    if name == "eval":
        monkeypatch.setattr(script, "evaluate", reached)
    else:
        monkeypatch.setattr(script.Run, "open", reached)
    start = ["--checkpoint", str(checkpoint)]
    if name == "sft":
        start = ["--demo-path", str(write_demos(tmp_path / "demos.h5"))]

    @settings(max_examples=70)
    @given(command_lines(script))
    def check(flags):
        flags = dict(flags)
        args = [] if start[0][2:].replace("-", "_") in flags else list(start)
        for flag, value in flags.items():
            args.append(f"--{flag.replace('_', '-')}")
            if value is not None:
                args.append(value)
        codes.append(run(script, [*args, "--no-cuda"], tmp_path / "out"))
        errors = capsys.readouterr().err
        assert "Traceback" not in errors and (codes[-1] == 0 or errors), errors

    check()
    assert {0, 2} == set(codes), "good and bad ones"


# ---- files ----
def spoil_json(text: str, data) -> str:
    """A JSON text that is cut short, or that has junk in place of one value at any depth."""
    if data.draw(st.booleans(), label="cut"):
        return text[: data.draw(st.integers(0, len(text) - 1))]
    tree = json.loads(text)
    node = tree
    while True:
        keys = st.integers(0, len(node) - 1)
        if isinstance(node, dict):
            keys = st.sampled_from(sorted(node))
        key = data.draw(keys)
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
            continue
        node[key] = data.draw(JUNK)
        return json.dumps(tree)


def spoil_bytes(path: Path, data) -> None:
    """Changes some bytes of a file, and may cut it short."""
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    length = len(content)
    if data.draw(st.booleans()):
        length = data.draw(st.integers(0, length))
    path.write_bytes(content[:length])


def spoil_array(path: Path, data, missing: bool) -> None:
    """Removes an array of demonstrations, or puts another one in its place."""
    names = (
        "traj_0/actions",
        "traj_0/geometry",
        "traj_1/obs/proprio",
        "traj_1/obs/sensor_data/base_camera/rgb",
        "traj_0",
    )
    with h5py.File(path, "a") as file:
        name = data.draw(st.sampled_from(names))
        del file[name]
        if missing:
            return
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        value = data.draw(st.sampled_from([0.0, np.nan, 1e30]))
        file[name] = np.full(shape, value, data.draw(st.sampled_from(["f4", "i8", "u1"])))


@settings(max_examples=150)
@given(st.data())
def test_demonstrations(tmp_path_factory, data):
    """Either file of a pair is spoilt: the pair is read with shapes that fit, or it is refused."""
    path = write_demos(tmp_path_factory.mktemp("demos") / "demos.h5")
    kind = data.draw(st.sampled_from(["json", "bytes", "array", "missing"]))
    if kind == "json":
        meta = path.with_suffix(".json")
        meta.write_text(spoil_json(meta.read_text(), data))
    elif kind == "bytes":
        spoil_bytes(path, data)
    else:
        spoil_array(path, data, kind == "missing")
    with contextlib.suppress(UserError):
        rgb, *others = read_demos(path, "PickCube-v1", 10, 128)
        assert rgb.shape[1:] == (128, 128, 3)
        assert {len(x) for x in others} == {len(rgb)}
        assert all(x.isfinite().all() for x in others)


def test_what_is_not_spoilt_is_accepted(checkpoint, tmp_path):
    """The tests here would pass if everything were refused."""
    path = write_demos(tmp_path / "demos.h5")
    assert len(read_demos(path, "PickCube-v1", 10, 128)[0]) > 0
    with memory_limit(2**32):
        model, _, _ = load_policy(str(checkpoint / "checkpoint"), torch.device("cpu"))
        assert task_stats(model, "PickCube-v1")


def read_pairs(path: Path) -> list[dict]:
    """The pairs of a pairs.jsonl, of four invented roll-outs from one initial state."""
    rollouts = invent_rollouts([11])
    segments = [sta_tpo.segments_of(rollout, 4, True) for rollout in rollouts]
    return read_preferences(path, rollouts, segments, [f"11_{i}" for i in range(4)])


@settings(max_examples=150)
@given(st.data())
def test_preferences(tmp_path_factory, data):
    """A pairs.jsonl with one spoilt line, or with any text as one of its lines.

    It holds pairs of this run, or the error names the file.
    """
    pair = {
        "clip": "a.mp4",
        "stage": 0,
        "left": "11_2",
        "right": "11_3",
        "left_steps": [0, 2],
        "right_steps": [0, 3],
    }
    texts = [json.dumps({**pair, "preferred": verdict}) for verdict in ("left", "tie", None)]
    at = data.draw(st.integers(0, 2))
    if data.draw(st.integers(0, 4)):
        texts[at] = spoil_json(texts[at], data)
    else:
        texts[at] = data.draw(st.text(max_size=20))
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(texts), errors="replace")
    try:
        pairs = read_pairs(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        for pair in pairs:
            assert 0 <= pair["chosen"] < 4 and 0 <= pair["rejected"] < 4
            assert type(pair["stage"]) is int and pair["stage"] in range(4)


def test_a_line_of_pairs_names_no_path(tmp_path):
    """Roll-outs are looked up among the run's own, so a path leads nowhere."""
    row = {
        "stage": 0,
        "left": "../../etc/passwd",
        "right": "11_3",
        "left_steps": [0, 2],
        "right_steps": [0, 3],
        "preferred": "left",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="line 1 cannot be read: KeyError"):
        read_pairs(tmp_path / "pairs.jsonl")


@contextlib.contextmanager
def memory_limit(num_bytes: int):
    """Inside this context an allocation fails that would need so much more memory.

    A spoilt config.json may describe a model larger than the machine. Without a limit the kernel
    would kill the tests.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@settings(max_examples=120)
@given(st.data())
def test_configurations_of_checkpoints(checkpoint, tmp_path_factory, data):
    """A spoilt config.json beside its checksums is always refused.

    Without checksums the policy loads with statistics that fit, or it is refused.
    """
    folder = tmp_path_factory.mktemp("config") / "checkpoint"
    shutil.copytree(checkpoint / "checkpoint", folder)
    before = (folder / "config.json").read_text()
    after = spoil_json(before, data)
    (folder / "config.json").write_text(after)
    if after != before:
        with pytest.raises(UserError, match="damaged"):
            load_policy(str(folder), torch.device("cpu"))
    (folder / "checksums.json").unlink()
    with contextlib.suppress(UserError), memory_limit(2**32):
        model, _, _ = load_policy(str(folder), torch.device("cpu"))
        stats = task_stats(model, "PickCube-v1")
        assert len(stats["action"]["q01"]) == len(stats["action"]["q99"])
