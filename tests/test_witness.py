"""A file of demonstrations is a witness: it is believed as far as something else confirms it.

Two small files are made with the simulator, one as ManiSkill records states and one by sft.py.
Each test spoils a copy.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, call, needs_assets, write_demos
from hypothesis import given, settings
from hypothesis import strategies as st

import sft
import vla
import world.demos
from world.demos import collect_demos, open_h5, read_demos
from world.envs import StageEnv
from world.episodes import executed
from world.tasks import TASKS, UserError

ENV_ID = "PickCube-v1"
PUT_CARROT = "PutCarrotOnPlateInScene-v1"
RIGHT = torch.zeros(1, dtype=torch.long)
# The episodes of the file of states are the ends of the expert's.
STEPS = 3


# ---- two good files ----
def play(env: StageEnv, seed: int) -> tuple[list, list, list]:
    """The expert's episode: states (T + 1), actions (T), and what was seen before each (T)."""
    env.terminate_on_success = False
    obs, _ = env.reset(seed=[seed])
    states = [env.base.get_state_dict()]
    actions = []
    seen = []
    success = False
    while not success:
        seen.append(obs)
        actions.append(env.expert_action(RIGHT))
        obs, *_, info = env.step(actions[-1])
        success = bool(info["success"][0])
        states.append(env.base.get_state_dict())
    return states, actions, seen


def write_states(path: Path, episodes: dict[int, tuple[list, list]], env_id: str = ENV_ID) -> Path:
    """A file as ManiSkill's RecordEpisode writes it. episodes: states and actions, by seed."""
    entries = []
    mode = TASKS[env_id].arm.control_mode
    with h5py.File(path, "w") as file:
        for i, (seed, (states, actions)) in enumerate(episodes.items()):
            group = file.create_group(f"traj_{i}")
            group["actions"] = torch.cat(actions).numpy()
            group["success"] = np.arange(1, len(states)) == len(actions)
            for kind in ("actors", "articulations"):
                for name in states[0][kind]:
                    rows = np.concatenate([state[kind][name].numpy() for state in states])
                    group[f"env_states/{kind}/{name}"] = rows
            entry = {
                "episode_id": i,
                "episode_seed": seed,
                "reset_kwargs": {"seed": seed, "options": None},
                "control_mode": mode,
                "elapsed_steps": len(actions),
                "success": True,
            }
            entries.append(entry)
    env_info = {"env_id": env_id, "env_kwargs": {"sim_backend": "physx_cuda", "num_envs": 1}}
    meta = {"env_info": env_info, "source_type": "motionplanning", "episodes": entries}
    path.with_suffix(".json").write_text(json.dumps(meta))
    return path


@pytest.fixture(scope="module")
def simulator():
    """The one simulator of this module, which read_demos uses too."""
    env = StageEnv(ENV_ID, 1, "cpu", 0)

    def get(env_id: str, *args, **kwargs) -> StageEnv:
        return env if env_id == ENV_ID else StageEnv(env_id, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.demos, "StageEnv", get)
        yield env
    env.close()


@pytest.fixture(scope="module")
def states_file(simulator, tmp_path_factory) -> Path:
    """Two episodes of states, which need no more than the simulator."""
    episodes = {}
    for seed in (5, 6):
        states, actions, _ = play(simulator, seed)
        episodes[seed] = (states[-STEPS - 1 :], actions[-STEPS:])
    return write_states(tmp_path_factory.mktemp("states") / "states.h5", episodes)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory) -> Path:
    """Two episodes as sft.py makes them."""
    path = tmp_path_factory.mktemp("own") / "own.h5"
    mistakes = {"speed": 1.0, "noise": 0.1, "slip": 0.05, "pause": 0.05, "twist": 0}
    collect_demos(path, ENV_ID, 2, 1, 0, **mistakes)
    return path


@pytest.fixture(scope="module")
def states(states_file):
    """What the good file of states holds."""
    return read_demos(states_file, ENV_ID, 9)


@pytest.fixture(scope="module")
def own(own_file):
    """What the good file of sft.py holds."""
    return read_demos(own_file, ENV_ID, 9)


def copy(good: Path, folder: Path, group=None, entry=None, meta=None) -> Path:
    """A copy of a file, spoilt in each episode by `group` and `entry`, and as a whole by `meta`."""
    path = folder / "copy.h5"
    shutil.copy(good, path)
    found = json.loads(good.with_suffix(".json").read_text())
    with h5py.File(path, "a") as file:
        for name in list(file) if group else []:
            group(file[name])
    for row in found["episodes"] if entry else []:
        entry(row)
    if meta:
        meta(found)
    path.with_suffix(".json").write_text(json.dumps(found))
    return path


def replace(group: h5py.Group, name: str, change) -> None:
    """Puts `change(array)` in the place of an array."""
    array = change(group[name][()])
    del group[name]
    group[name] = array


def refusal(path: Path, env_id: str = ENV_ID) -> str:
    """The one line in which a file is refused."""
    with pytest.raises(UserError) as error:
        read_demos(path, env_id, 99)
    line = str(error.value)
    assert "\n" not in line and path.stem in line
    assert not re.search(r"KeyError|NoneType|zip\(\)|Error\b", line)
    return line


# ---- states are put back ----
def test_recorded_states_are_seen_through_our_camera(simulator, tmp_path):
    """A ManiSkill trajectory without images gives the frames that its states show."""
    states, actions, seen = play(simulator, 5)
    path = write_states(tmp_path / "demos.h5", {5: (states, actions)})
    rgb, proprio, labels, *_ = read_demos(path, ENV_ID, 9)
    assert torch.equal(labels, torch.cat(actions))
    expected = torch.cat([obs["proprio"] for obs in seen])
    assert torch.allclose(proprio, expected, atol=1e-5)
    assert rgb.dtype == torch.uint8
    assert rgb.shape == (len(actions), 128, 128, 3)
    difference = (rgb.int() - torch.cat([obs["rgb"] for obs in seen]).int()).abs()
    assert (difference > 8).float().mean() < 1e-3


def move_cube(group: h5py.Group) -> None:
    group["env_states/actors/cube"][-1, 0] += 0.05


def roll(group: h5py.Group, rows: int) -> None:
    for kind in group["env_states"].values():
        for name in list(kind):
            replace(kind, name, lambda array: np.roll(array, rows, 0))


@pytest.mark.parametrize("spoil", [move_cube, lambda g: roll(g, 1), lambda g: roll(g, -1)])
def test_a_file_that_does_not_come_back_is_refused_with_the_count(spoil, states_file, tmp_path):
    path = copy(states_file, tmp_path, group=spoil)
    assert "2 of 2 successful episodes do not come back" in refusal(path)


def test_a_few_episodes_that_do_not_come_back_are_left_out(states_file, states, tmp_path, capsys):
    for num_spoilt in (1, 2):
        path = copy(states_file, tmp_path)
        meta = json.loads(path.with_suffix(".json").read_text())
        meta["episodes"] = [{**meta["episodes"][0], "episode_id": i} for i in range(11)]
        path.with_suffix(".json").write_text(json.dumps(meta))
        with h5py.File(path, "a") as file:
            del file["traj_1"]
            for i in range(1, 11):
                file.copy("traj_0", f"traj_{i}")
            for i in range(num_spoilt):
                move_cube(file[f"traj_{3 + i}"])
        if num_spoilt == 2:
            assert "2 of 11 successful" in refusal(path)
        else:
            # The next episode takes the place of the lost one.
            found = read_demos(path, ENV_ID, 9)
            assert "1 of 10 episodes" in capsys.readouterr().out
            for array, whole in zip(states, found):
                assert torch.equal(torch.cat(9 * [array[:STEPS]]), whole)


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        (
            "env_states/actors/cube has the shape (3, 13), where 3 actions need (4, 13)",
            lambda g: replace(g, "env_states/actors/cube", lambda a: a[1:]),
        ),
        (
            "env_states/articulations/panda has the shape (4, 30)",
            lambda g: replace(g, "env_states/articulations/panda", lambda a: a[:, 1:]),
        ),
        (
            "env_states/actors/goal_site is missing",
            lambda g: g.__delitem__("env_states/actors/goal_site"),
        ),
        (
            "env_states/actors/ground is not in PickCube-v1",
            lambda g: g.copy("env_states/actors/cube", "env_states/actors/ground"),
        ),
        (
            "env_states has articulations/panda_wristcam, and PickCube-v1 has articulations/panda",
            lambda g: g.move(
                "env_states/articulations/panda", "env_states/articulations/panda_wristcam"
            ),
        ),
        (
            "env_states/actors/cube has numbers that are not finite",
            lambda g: g["env_states/actors/cube"].__setitem__((1, 0), np.nan),
        ),
        (
            "env_states/actors/cube has quaternions",
            lambda g: g["env_states/actors/cube"].__setitem__((1, 3), 0.5),
        ),
        (
            "env_states is one array, as ManiSkill 2 wrote it",
            lambda g: (g.__delitem__("env_states"), g.__setitem__("env_states", np.zeros((4, 70)))),
        ),
        ("neither images of our camera", lambda g: g.__delitem__("env_states")),
        ("there are no actions", lambda g: g.__delitem__("actions")),
        ("there are no actions", lambda g: replace(g, "actions", lambda a: a[:0])),
        (
            "actions has the shape (3, 8)",
            lambda g: replace(g, "actions", lambda a: a[:, [0, *range(7)]]),
        ),
        ("elapsed_steps is 3, and there are 2", lambda g: replace(g, "actions", lambda a: a[1:])),
        ("another type: int64", lambda g: replace(g, "actions", lambda a: a.astype(int))),
        ("another type: |S8", lambda g: replace(g, "actions", lambda a: a.astype("S8"))),
        ("success of the .h5 file has not 3", lambda g: replace(g, "success", lambda a: a[1:])),
        ("contradict", lambda g: replace(g, "success", lambda a: ~a)),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(words, spoil, states_file, tmp_path):
    line = refusal(copy(states_file, tmp_path, group=spoil))
    assert words in line and "episode 0: " in line


def test_an_episode_that_is_no_group_is_refused(own_file, tmp_path):
    for put in (np.zeros((3, 7)), None):
        path = copy(own_file, tmp_path)
        with h5py.File(path, "a") as file:
            del file["traj_1"]
            if put is not None:
                file["traj_1"] = put
        assert "traj_1 is missing, or is no group" in refusal(path)


# ---- success, wherever it is said ----
FORMS = [(True, False), ([True], [False]), ("True", "False"), ("true", ["false"]), (1, 0.0)]


@pytest.mark.parametrize("place", ["success", "info"])
@pytest.mark.parametrize("form", FORMS)
def test_success_is_understood_in_all_forms(form, place, own_file, own, tmp_path):
    def say(value):
        def entry(row):
            del row["success"]
            row.update({"success": value} if place == "success" else {"info": {"success": value}})

        return copy(own_file, tmp_path, entry=entry, group=lambda g: g.__delitem__("success"))

    good, bad = form
    assert len(read_demos(say(good), ENV_ID, 9)[0]) == len(own[0])
    assert "no successful episode" in refusal(say(bad))


@pytest.mark.parametrize("form", ["yes", None, 2, [True, False], {}, [[True]]])
def test_an_unknown_form_of_success_is_refused(form, own_file, tmp_path):
    path = copy(own_file, tmp_path, entry=lambda row: row.update(success=form))
    assert "success is " in refusal(path) and "neither true nor false" in refusal(path)


def test_success_said_in_the_h5_file_alone_counts(own_file, own, tmp_path):
    path = copy(own_file, tmp_path, entry=lambda row: row.pop("success"))
    assert len(read_demos(path, ENV_ID, 9)[0]) == len(own[0])
    with h5py.File(path, "a") as file:
        file["traj_0/success"][-1] = False
        steps = len(file["traj_1/actions"])
    assert len(read_demos(path, ENV_ID, 9)[0]) == steps


@pytest.mark.parametrize("kind", ["O", "S5"])
def test_success_as_strings_of_the_h5_file_counts(kind, own_file, own, tmp_path):
    path = copy(own_file, tmp_path, entry=lambda row: row.pop("success"))
    with h5py.File(path, "a") as file:
        for name, word in (("traj_0", "False"), ("traj_1", "True")):
            rows = len(file[name]["actions"])
            del file[name]["success"]
            file[name]["success"] = np.array([word] * rows, dtype=kind)
        steps = len(file["traj_1/actions"])
    assert len(read_demos(path, ENV_ID, 9)[0]) == steps


def test_success_said_nowhere_is_seen_in_the_last_state(states_file, states, own_file, tmp_path):
    def silent(good):
        return copy(
            good,
            tmp_path,
            entry=lambda row: row.pop("success"),
            group=lambda g: g.__delitem__("success"),
        )

    assert len(read_demos(silent(states_file), ENV_ID, 9)[0]) == 2 * STEPS
    with h5py.File(tmp_path / "copy.h5", "a") as file:
        move_cube(file["traj_0"])
    found = read_demos(tmp_path / "copy.h5", ENV_ID, 9)
    assert torch.equal(found[0], states[0][STEPS:])
    # Without states nothing can tell.
    assert "success is missing" in refusal(silent(own_file))


# ---- seeds ----
@pytest.mark.parametrize(
    "entry",
    [
        # ManiSkill 2
        {"reset_kwargs": {"seed": 5}},
        # ManiSkill 3
        {"episode_seed": [5], "reset_kwargs": {"seed": [5]}},
        {"episode_seed": 5, "reset_kwargs": {"seed": [5]}},
        {"episode_seed": 5.0},
        # parallel envs
        {"episode_seed": 5, "reset_kwargs": {}},
        {"episode_seed": 5, "reset_kwargs": {"seed": [4, 5, 6]}},
    ],
)
def test_seeds_as_each_version_of_maniskill_writes_them(
    entry, states_file, states, tmp_path, monkeypatch
):
    def write(row):
        del row["episode_seed"], row["reset_kwargs"]
        row.update(entry)

    seeds = []
    reset = StageEnv.reset
    monkeypatch.setattr(StageEnv, "reset", lambda env, seed: seeds.append(seed) or reset(env, seed))
    found = read_demos(copy(states_file, tmp_path, entry=write), ENV_ID, 1)
    assert seeds == [5]
    assert torch.equal(found[0], states[0][:STEPS])


@pytest.mark.parametrize(
    ("words", "entry"),
    [
        ("episode_seed is missing", {}),
        ("episode_seed is 4294967296, not", {"episode_seed": 2**32}),
        ("episode_seed is -1, not", {"episode_seed": -1}),
        ("episode_seed is 5.5, not", {"episode_seed": 5.5}),
        ("episode_seed is True, not", {"episode_seed": True}),
        ("episode_seed is '5', not", {"episode_seed": "5"}),
        ("episode_seed is [3, 4, 5], not", {"episode_seed": [3, 4, 5]}),
        ("reset_kwargs.seed is [3, 4], not", {"reset_kwargs": {"seed": [3, 4]}}),
        ("contradict", {"episode_seed": 5, "reset_kwargs": {"seed": 6}}),
    ],
)
def test_seeds_that_cannot_be_used_are_refused_by_name(words, entry, states_file, tmp_path):
    def write(row):
        del row["episode_seed"], row["reset_kwargs"]
        row.update(entry)

    assert words in refusal(copy(states_file, tmp_path, entry=write))


# ---- the .json file ----
@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("env_info is missing", lambda meta: meta.pop("env_info")),
        ("env_info is missing", lambda meta: meta.update(env_info=None)),
        ("env_info.env_id is missing", lambda meta: meta["env_info"].pop("env_id")),
        (
            "holds PickCube-v1  demonstrations",
            lambda m: m["env_info"].update(env_id="PickCube-v1 "),
        ),
        ("episodes is missing", lambda meta: meta.pop("episodes")),
        ("episodes is missing", lambda meta: meta.update(episodes={"0": {}})),
        ("episode_id of episodes[1]", lambda meta: meta["episodes"][1].pop("episode_id")),
        ("episode_id of episodes[1]", lambda meta: meta["episodes"][1].update(episode_id=0)),
        ("episode_id of episodes[0]", lambda meta: meta.update(episodes=[None])),
        ("control_mode is missing", lambda meta: meta["episodes"][0].pop("control_mode")),
        ("traj_7 is missing", lambda meta: meta["episodes"][1].update(episode_id=7)),
    ],
)
def test_fields_of_the_json_file_are_named(words, spoil, own_file, tmp_path):
    assert words in refusal(copy(own_file, tmp_path, meta=spoil))


def test_a_json_file_that_is_none_is_named(own_file, tmp_path):
    path = copy(own_file, tmp_path)
    for text in ("", "{", "[]", "[" * 100_000):
        path.with_suffix(".json").write_text(text)
        assert "it is not" in refusal(path)
    path.with_suffix(".json").write_bytes(b"\xff")
    assert "it is not JSON" in refusal(path)


# ---- actions are what the controller executes ----
def random_actions(env_id: str, num: int = 200) -> np.ndarray:
    """Actions that the Panda's controller clips in all ways. The WidowX's are within its limits."""
    rng = np.random.default_rng(0)
    if env_id == PUT_CARROT:
        return (rng.uniform(-1, 1, (num, 7)) * TASKS[env_id].arm.limit).astype(np.float32)
    return rng.normal(0, 0.8, (num, 7)).astype(np.float32)


def controlled(env: StageEnv, name: str, actions: np.ndarray) -> np.ndarray:
    """What a controller of ManiSkill makes of actions."""
    controller = env.base.agent.controller.controllers[name]
    rows = [controller._preprocess_action(action[None]) for action in torch.from_numpy(actions)]
    return torch.cat(rows).numpy()


def test_labels_are_what_the_pandas_controller_executes(simulator):
    arm = TASKS[ENV_ID].arm
    actions = random_actions(ENV_ID)
    actions[0] = 1e30
    found = executed(actions, arm)
    assert (np.abs(found) <= 1).all() and (np.linalg.norm(found[:, 3:6], axis=1) < 1 + 1e-6).all()
    moved = controlled(simulator, "arm", actions[1:, :6])
    assert np.allclose(found[1:, :6] * np.array(arm.unit), moved, atol=1e-7)
    gripper = controlled(simulator, "gripper", actions[:, 6:])
    assert np.allclose(controlled(simulator, "gripper", found[:, 6:]), gripper)
    inside = np.abs(actions).max(1) < 0.5
    assert np.array_equal(found[inside], actions[inside])


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_labels_are_what_the_widowxs_controller_executes(env_id):
    env = StageEnv(env_id, 1, "cpu", 0, render=False)
    actions = random_actions(ENV_ID)
    found = executed(actions, TASKS[env_id].arm)
    assert np.array_equal(controlled(env, "arm", actions[:, :6]), found[:, :6])
    gripper = controlled(env, "gripper", actions[:, 6:])
    assert np.allclose(controlled(env, "gripper", found[:, 6:]), gripper)
    assert np.abs(found[:, 6]).max() == 1
    env.close()


@pytest.mark.parametrize("glitch", [1e6, -1e6, 12.0, 3e38, 0.7])
@pytest.mark.parametrize("env_id", [ENV_ID, PUT_CARROT])
def test_one_glitch_costs_no_other_frame_its_resolution(env_id, glitch, tmp_path, capsys):
    """An ordinary frame decodes to within half a bin of what the controller executes."""
    arm = TASKS[env_id].arm
    path = write_demos(tmp_path / "a.h5", env_id, arm.control_mode, lengths=(20,))
    actions = random_actions(env_id, 20)
    actions[7, :6] = glitch
    with h5py.File(path, "a") as file:
        file["traj_0/actions"][:] = actions
    labels = read_demos(path, env_id, 9)[2]
    stats = sft.action_stats(labels, env_id)
    assert stats["q99"] == pytest.approx(arm.limit)
    decoded = vla.detokenize_actions(vla.tokenize_actions(labels, stats), stats).numpy()
    off = np.abs(decoded - executed(actions, arm)) / np.array(arm.limit)
    ordinary = np.arange(20) != 7
    assert off[ordinary].max() < 1 / 255 + 1e-5
    # Where the controller does not clip, the frame has no right label, and that is said.
    assert ("warning: 1 actions" in capsys.readouterr().out) == (env_id == PUT_CARROT)
    if env_id == ENV_ID:
        assert off[7].max() < 1 / 255 + 1e-5


def test_demonstrations_in_which_nothing_varies_are_refused(tmp_path):
    path = write_demos(tmp_path / "a.h5", lengths=(1,))
    for value in (0.5, 2.0):
        with h5py.File(path, "a") as file:
            file["traj_0/actions"][:] = value
        flags = ("--demo-path", path, "--output-dir", tmp_path / "out", "--no-cuda")
        with pytest.raises(UserError, match="no action varies"):
            call(sft, *flags)
        assert not (tmp_path / "out").exists()
    glitches = torch.full((3, 7), 1e6)
    with pytest.raises(UserError, match="no action"):
        sft.action_stats(glitches, PUT_CARROT)


# ---- messages ----
def test_advice_on_slow_demonstrations_is_one_that_applies(tmp_path, capsys):
    path = write_demos(tmp_path / "demos.h5", lengths=(60,))
    read_demos(path, ENV_ID, 9)
    assert "record faster ones" in capsys.readouterr().out
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**meta, "source_type": "scripted"}))
    with h5py.File(path, "a") as file:
        file["traj_0/expert_actions"] = file["traj_0/actions"][()]
        file["traj_0/stage"] = np.zeros(60, int)
    read_demos(path, ENV_ID, 9)
    assert "a higher --demo-speed" in capsys.readouterr().out


def test_says_which_demonstrations_are_left_unread(own_file, own, capsys):
    """--num-demos has a default, and a file may hold more."""
    one = read_demos(own_file, ENV_ID, 1)
    assert 0 < len(one[0]) < len(own[0])
    assert f"{own_file}: read 1 episodes, not the 1 after them" in capsys.readouterr().out
    read_demos(own_file, ENV_ID, 2)
    assert "not the" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("pd_joint_pos", "-c pd_ee_delta_pose -b physx_cpu"),
        ("pd_joint_delta_pos", "cannot convert it"),
        ("pd_ee_pose", "cannot convert it, so record it again in pd_ee_delta_pose"),
        ("pd_ee_target_delta_pose", "cannot convert it"),
        ("pd_joint_vel", "cannot convert it"),
    ],
)
def test_only_what_maniskill_converts_is_told_to_be_converted(mode, words, states_file, tmp_path):
    folder = tmp_path / "with blanks"
    folder.mkdir()
    line = refusal(copy(states_file, folder, entry=lambda row: row.update(control_mode=mode)))
    assert f"control_mode is {mode}" in line and words in line
    if "--traj-path" in line:
        command = shlex.split(line.split("`")[1])
        assert str(folder / "copy.h5") in command
    else:
        assert "`" not in line


def test_what_maniskill_s_tool_cannot_read_is_not_sent_to_it(own_file, tmp_path):
    """A file of one's own recorder lacks what the tool needs. The WidowX knows one mode alone."""
    change = {"control_mode": "pd_joint_pos"}
    path = copy(own_file, tmp_path, entry=lambda row: row.update(change))
    assert "env_info.env_kwargs" in refusal(path)
    path = write_demos(tmp_path / "b.h5", PUT_CARROT, "pd_joint_pos")
    assert "cannot convert it" in refusal(path, PUT_CARROT)


def test_a_file_of_another_pace_is_refused(states_file, tmp_path):
    def slow(freq):
        return lambda meta: meta["env_info"].update(
            env_kwargs={"sim_config": {"control_freq": freq}}
        )

    assert "control_freq is 10, and the env has 20" in refusal(
        copy(states_file, tmp_path, meta=slow(10))
    )
    read_demos(copy(states_file, tmp_path, meta=slow(20)), ENV_ID, 9)


@pytest.mark.parametrize("label", [-2, 5])
def test_a_stage_that_the_task_has_not_is_refused(label, own_file, tmp_path):
    def spoil(group):
        group["stage"][1] = label

    assert "stage has labels beyond" in refusal(copy(own_file, tmp_path, group=spoil))


def test_a_policy_that_cannot_do_what_the_demonstrations_show_is_warned_of(capsys):
    known = {"q01": [-1.0] * 3 + [0.0] + [-1.0] * 3, "q99": [1.0] * 3 + [0.0] + [1.0] * 3}
    actions = torch.zeros(100, 7)
    sft.warn_of_other_range(ENV_ID, actions, known, 256)
    assert capsys.readouterr().out == ""
    # It never turned about x, and these do.
    actions[:5, 3] = 0.5
    sft.warn_of_other_range(ENV_ID, actions, known, 256)
    assert "warning: 5 % of the actions are beyond" in capsys.readouterr().out


def test_a_demo_path_that_names_nothing_is_refused():
    with pytest.raises(UserError, match="names no file"):
        sft.demo_paths(",")


def test_a_path_may_have_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b,c"):
        Path(folder).mkdir()
        for name in ("x.h5", "y,z.h5"):
            (Path(folder) / name).touch()
    Path("b,c/x.h5,a").mkdir()
    Path("b,c/x.h5,a/x.h5").touch()
    for text, names in {
        "a/x.h5": ["a/x.h5"],
        "b,c/x.h5": ["b,c/x.h5"],
        "b,c/y,z.h5,a/x.h5": ["b,c/y,z.h5", "a/x.h5"],
        "a/x.h5,b,c/x.h5,": ["a/x.h5", "b,c/x.h5"],
        # The whole string comes first.
        "b,c/x.h5,a/x.h5": ["b,c/x.h5,a/x.h5"],
        # Two files of which one is missing, and none.
        "a/x.h5,nowhere.h5": ["a/x.h5", "nowhere.h5"],
        "": [],
    }.items():
        assert sft.demo_paths(text) == [Path(name) for name in names], text


def test_a_file_that_another_process_writes_is_not_waited_for(own_file, tmp_path):
    path = copy(own_file, tmp_path)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process has it open" in refusal(path)


NO_LOCKS = """
#define _GNU_SOURCE
#include <errno.h>
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_file_system_without_locks_is_named(own_file, tmp_path):
    """HDF5 meets the error of a file system that has no locks, in reading and in writing."""
    (tmp_path / "no_locks.c").write_text(NO_LOCKS)
    library = tmp_path / "no_locks.so"
    build = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "no_locks.c"]
    subprocess.run(build, check=True)
    path = copy(own_file, tmp_path)
    program = f"""
from pathlib import Path
from world.demos import open_h5
from world.tasks import UserError
for name, mode in (({str(path)!r}, "r"), ({str(tmp_path / "new.h5")!r}, "w")):
    try:
        open_h5(Path(name), mode)
        print("opened")
    except UserError as error:
        print(error)
"""
    environ = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    read, write = done.stdout.splitlines()
    assert read.startswith("cannot read") and "set HDF5_USE_FILE_LOCKING=FALSE" in read
    assert write.startswith("cannot write") and "set HDF5_USE_FILE_LOCKING=FALSE" in write
    assert not (tmp_path / "new.h5").exists()
    environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["opened", "opened"]


def test_opening_a_file_that_is_none_says_so(tmp_path):
    (tmp_path / "a.h5").write_text("no HDF5")
    with pytest.raises(UserError, match=r"cannot read .*a\.h5: "):
        open_h5(tmp_path / "a.h5")


# ---- any damage ----
JUNK = st.sampled_from([None, True, False, -1, 0, 1, 7, 0.5, "x", "", [], [1], [1, 2], {}])


def array_names(group: h5py.Group) -> list[str]:
    """The arrays of an episode, by name."""
    names = []
    group.visititems(
        lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
    )
    return sorted(names)


def damage_array(group: h5py.Group, data) -> None:
    """Spoils one array in a way that a witness can reveal.

    Nobody can notice a number that is changed to another plausible one, such as a cube that lies a
    millimetre elsewhere in a middle frame, or an array that is rounded. A huge action is not among
    the damages, because the controller clips it.
    """
    name = data.draw(st.sampled_from(array_names(group)), label="array")
    array = group[name][()]
    del group[name]
    kinds = ["missing", "a group", "shape", "type", "rows"]
    if array.dtype.kind == "f":
        kinds.append("value")
    kind = data.draw(st.sampled_from(kinds), label="damage")
    if kind == "a group":
        group.create_group(name)
    elif kind == "shape":
        group[name] = data.draw(st.sampled_from([array[..., None], array[..., :-1], array[0]]))
    elif kind == "type":
        dtype = data.draw(st.sampled_from(["f8", "i8", "u1", "?", "S8"]))
        with np.errstate(all="ignore"):
            group[name] = array.astype(dtype)
    elif kind == "rows":
        changes = [array[1:], array[:-1], array[:0], np.concatenate([array, array[-1:]])]
        group[name] = data.draw(st.sampled_from(changes))
    elif kind == "value":
        worst = [np.nan, np.inf, -np.inf] + [1e6] * ("actions" not in name)
        at = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
        array[at] = data.draw(st.sampled_from(worst))
        group[name] = array


def damage_json(path: Path, data) -> None:
    """Removes a field, or puts junk in its place."""
    file = path.with_suffix(".json")
    meta = json.loads(file.read_text())
    episode = data.draw(st.integers(0, 1), label="episode")
    place = data.draw(st.sampled_from([meta, meta["env_info"], meta["episodes"][episode]]))
    field = data.draw(st.sampled_from(sorted(place)), label="field")
    if data.draw(st.booleans(), label="missing"):
        del place[field]
    else:
        place[field] = data.draw(JUNK, label="junk")
    file.write_text(json.dumps(meta))


def refused_or_right(path: Path, whole: tuple, first: int) -> None:
    """A damaged file is refused, or it gives some of the good file's episodes, unchanged.

    whole: what the good file holds, of which the first episode has `first` steps.
    """
    try:
        found = read_demos(path, ENV_ID, 9)
    except UserError as error:
        assert "\n" not in str(error)
        return
    parts = [slice(None), slice(first), slice(first, None)]
    equal = []
    for part in parts:
        pairs = [(array, expected[part]) for array, expected in zip(found, whole)]
        equal.append(all(torch.equal(array, expected) for array, expected in pairs))
    assert any(equal)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_of_sft_is_refused_or_read_rightly(own_file, own, tmp_path_factory, data):
    with h5py.File(own_file) as file:
        first = len(file["traj_0/actions"])
    path = copy(own_file, tmp_path_factory.mktemp("damaged"))
    if data.draw(st.booleans(), label="array"):
        with h5py.File(path, "a") as file:
            damage_array(file[data.draw(st.sampled_from(["traj_0", "traj_1"]))], data)
    else:
        damage_json(path, data)
    refused_or_right(path, own, first)
    shutil.rmtree(path.parent)


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_of_states_is_refused_or_read_rightly(
    states_file, states, tmp_path_factory, data
):
    path = copy(states_file, tmp_path_factory.mktemp("damaged"))
    kind = data.draw(st.sampled_from(["array", "array", "json", "moved", "shifted"]))
    with h5py.File(path, "a") as file:
        group = file[data.draw(st.sampled_from(["traj_0", "traj_1"]))]
        if kind == "array":
            damage_array(group, data)
        elif kind == "moved":
            move_cube(group)
        elif kind == "shifted":
            roll(group, data.draw(st.sampled_from([-2, -1, 1, 2])))
    if kind == "json":
        damage_json(path, data)
    refused_or_right(path, states, STEPS)
    shutil.rmtree(path.parent)


# ---- other tasks, and ManiSkill's own tools ----
@pytest.mark.slow
@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_success_that_needs_a_contact_comes_back(env_id):
    """Contact forces are in no state, and SimplerEnv asks for them."""
    env = StageEnv(env_id, 1, "cpu", 0, render=False)
    for seed in range(4):
        states, *_ = play(env, seed)
        env.reset(seed)
        assert env.succeeds(states[-1]), seed
        env.reset(seed)
        assert not env.succeeds(states[-4]), seed
    env.close()


@pytest.mark.slow
def test_a_peg_of_another_size_does_not_come_back(tmp_path):
    """The seed decides the sizes of peg and hole."""
    env = StageEnv("PegInsertionSide-v1", 1, "cpu", 0)
    states, actions, _ = play(env, 3)
    env.close()
    episode = (states[-4:], actions[-3:])
    path = write_states(tmp_path / "peg.h5", {3: episode}, "PegInsertionSide-v1")
    assert len(read_demos(path, "PegInsertionSide-v1", 9)[0]) == 3
    path = write_states(tmp_path / "peg.h5", {4: episode}, "PegInsertionSide-v1")
    assert "1 of 1 successful episodes do not come back" in refusal(path, "PegInsertionSide-v1")


@pytest.mark.slow
def test_the_printed_command_converts_the_planner_s_demonstrations(simulator, tmp_path):
    """As printed it runs, on a file with blanks in its path that says that a GPU recorded it."""
    folder = tmp_path / "my demos"
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def shell(command: str) -> None:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    tool = "python -m mani_skill.examples.motionplanning.panda.run"
    shell(f"{tool} -e PickCube-v1 -n 2 --only-count-success --traj-name mp -b physx_cpu")
    shutil.move(tmp_path / "demos/PickCube-v1/motionplanning", folder)
    path = copy(
        folder / "mp.h5",
        folder,
        meta=lambda meta: meta["env_info"]["env_kwargs"].update(sim_backend="physx_cuda"),
    )
    shell(refusal(path).split("`")[1])
    path = folder / "copy.none.pd_ee_delta_pose.physx_cpu.h5"
    rgb, *_ = read_demos(path, ENV_ID, 9)
    start = 0
    for entry in json.loads(path.with_suffix(".json").read_text())["episodes"]:
        obs, _ = simulator.reset(entry["episode_seed"])
        assert torch.equal(rgb[start], obs["rgb"][0])
        start += entry["elapsed_steps"]
    assert start == len(rgb)
