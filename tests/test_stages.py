"""Stages without a simulator: tables, signals, segments, costs, shaping."""

import math
import types
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stare_utils import (
    Stage,
    decode_stages,
    segment_stages,
    segment_steps,
    shape_rewards,
    stage_costs,
    stage_potential,
    stage_signals,
)
from world.tasks import (
    PANDA,
    TASKS,
    get_task,
    norm,
    observe_lift_peg,
    observe_push,
    observe_stack_cube,
)

K = 4
FORMS = st.sampled_from(["sigmoid", "linear"])
ACROSS = st.sampled_from(["offset", "bare"])


# ---- made-up stages ----
def made_up_stages() -> tuple[Stage, ...]:
    """K stages whose entry flags and distances are columns of the state."""
    stages = []
    for k in range(K):
        stage = Stage(
            name=f"stage{k}",
            entry=lambda state, k=k: state["entered"][:, k],
            distance=lambda state, k=k: state["distance"][:, k],
            length=0.1 * (k + 1),
            target=None,
            gripper=None,
        )
        stages.append(stage)
    return tuple(stages)


# Rows of (entry flags, distances, success).
STATES = st.lists(
    st.tuples(
        st.lists(st.booleans(), min_size=K, max_size=K),
        st.lists(st.floats(0, 2), min_size=K, max_size=K),
        st.booleans(),
    ),
    min_size=2,
    max_size=6,
)


def signals(rows, form="sigmoid", across="offset"):
    """The columns of the rows as tensors, and the signals of these states."""
    entered, distance, success = map(torch.tensor, zip(*rows))
    entered[:, 0] = True
    state = {"entered": entered, "distance": distance}
    out = stage_signals(made_up_stages(), state, success, form, across)
    return entered, distance, success, out


@given(STATES)
def test_stage_is_the_largest_whose_entry_condition_holds_and_k_at_success(rows):
    entered, distance, success, out = signals(rows)
    for i in range(len(rows)):
        largest = max(k for k in range(K) if entered[i, k])
        assert out["stage"][i] == (K if success[i] else largest)
        assert out["stage_distance"][i] == (0 if success[i] else distance[i, largest])
    assert out["stage"].dtype == torch.long


@given(STATES, FORMS, ACROSS)
def test_potential_is_in_range_and_greatest_at_success(rows, form, across):
    _, _, success, out = signals(rows, form, across)
    top = K if across == "offset" else 1
    assert (out["potential"] >= 0).all()
    assert (out["potential"] <= top).all()
    assert (out["potential"][success] == top).all()


@given(STATES, FORMS)
def test_potential_never_falls_when_the_stage_rises(rows, form):
    _, _, _, out = signals(rows, form)
    for i in range(len(rows)):
        lower = out["stage"] < out["stage"][i]
        assert (out["potential"][i] >= out["potential"][lower]).all()


@given(STATES, FORMS)
def test_potential_rises_as_the_distance_of_a_stage_falls(rows, form):
    far = [(entered, distance, False) for entered, distance, _ in rows]
    near = [(entered, [d / 2 for d in distance], False) for entered, distance, _ in rows]
    *_, far_out = signals(far, form)
    *_, near_out = signals(near, form)
    assert (near_out["potential"] >= far_out["potential"]).all()


def test_potential_forms_by_hand():
    distance = torch.tensor([0.0, 0.1, 0.2, 0.5])
    length = torch.tensor(0.2)
    linear = stage_potential(distance, length, "linear")
    assert torch.allclose(linear, torch.tensor([1.0, 0.5, 0.0, 0.0]))
    sigmoid = [1 / (1 + math.exp(-(1 - x))) * (1 + math.exp(-1)) for x in (0, 0.5, 1, 2.5)]
    assert torch.allclose(stage_potential(distance, length), torch.tensor(sigmoid))


def test_the_bare_potential_falls_at_a_switch_and_the_offset_one_does_not():
    # Stage 0 is done, and stage 1 begins at its length scale.
    before = ([True, False, False, False], [0.0, 0.2, 0.3, 0.4], False)
    after = ([True, True, False, False], [0.0, 0.2, 0.3, 0.4], False)
    *_, bare = signals([before, after], across="bare")
    *_, offset = signals([before, after], across="offset")
    assert bare["potential"][1] < bare["potential"][0]
    assert offset["potential"][1] > offset["potential"][0]


# ---- the tasks' stages ----
def pick_cube_state(**changes):
    """A state of one env, with what follows from the places of its object and its goal."""
    state = {
        "tool": [0.0, 0.0, 0.2],
        "object": [0.0, 0.0, 0.02],
        "object_start": [0.0, 0.0, 0.02],
        "goal": [0.0, 0.1, 0.2],
        "grasped": False,
        "yaw_error": 0.0,
        "opening": 0.08,
        "width": 0.04,
        "speed": 0.0,
    }
    state = {name: torch.tensor([value]) for name, value in {**state, **changes}.items()}
    offset = state["object"] - state["goal"]
    return {
        **state,
        "to_grip": norm(state["tool"] - state["object"]),
        "to_goal": norm(offset),
        "beside_goal": norm(offset[:, :2]),
        "above_goal": offset[:, 2],
    }


def stage_of(env_id: str, state: dict) -> int:
    """The stage of a task that a state of one env is in, without success."""
    table = TASKS[env_id].stage_table
    out = stage_signals(table, state, torch.tensor([False]), "sigmoid", "offset")
    return out["stage"].item()


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, 0),
        # The gripper is at the cube.
        ({"tool": [0.0, 0.0, 0.028]}, 1),
        # It is not yet there.
        ({"tool": [0.0, 0.0, 0.032]}, 0),
        ({"tool": [0.0, 0.0, 0.02], "grasped": True}, 1),
        # The cube is lifted.
        ({"tool": [0.0, 0.0, 0.06], "object": [0.0, 0.0, 0.06], "grasped": True}, 2),
        # The cube is carried along the table.
        ({"tool": [0.04, 0.0, 0.02], "object": [0.04, 0.0, 0.02], "grasped": True}, 2),
        ({"tool": [0.0, 0.1, 0.18], "object": [0.0, 0.1, 0.18], "grasped": True}, 3),
        # The cube is not yet near the goal.
        ({"tool": [0.0, 0.1, 0.155], "object": [0.0, 0.1, 0.155], "grasped": True}, 2),
        # The cube is near the goal, but not held.
        ({"tool": [0.0, 0.1, 0.3], "object": [0.0, 0.1, 0.18]}, 0),
        # The cube was dropped: the label falls back.
        ({"tool": [0.0, 0.1, 0.18], "object": [0.04, 0.0, 0.02]}, 0),
    ],
)
def test_stages_of_pick_cube(changes, stage):
    assert stage_of("PickCube-v1", pick_cube_state(**changes)) == stage


@pytest.mark.parametrize("env_id", TASKS)
def test_reach_holds_the_turn_that_the_tool_lacks(env_id):
    """Where a grip waits for a turn, the turn must pay. Elsewhere it must not cost anything."""
    reach = TASKS[env_id].stage_table[0].distance
    straight = reach(pick_cube_state(yaw_error=0.0))
    turns = (0.3, -0.3)
    lacking = [(reach(pick_cube_state(yaw_error=turn)) - straight).item() for turn in turns]
    any_side = ("PickCube-v1", "PlaceSphere-v1", "PushCube-v1", "PullCube-v1")
    assert lacking == pytest.approx([0.0 if env_id in any_side else 0.03] * 2, abs=1e-6)


def test_align_holds_the_turn_from_peg_to_hole():
    align = TASKS["PegInsertionSide-v1"].stage_table[2].distance
    state = {"aside": torch.tensor([0.02]), "peg_turn": torch.tensor([[0.0, 0.3, 0.4]])}
    assert align(state).item() == pytest.approx(0.02 + 0.1 * 0.5)


@pytest.mark.parametrize(
    ("env_id", "near"),
    [
        ("StackCube-v1", 0.03),
        ("PlaceSphere-v1", 0.02),
        ("PutCarrotOnPlateInScene-v1", 0.085),
        ("PutSpoonOnTableClothInScene-v1", 0.08),
        ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 0.03),
        ("PutEggplantInBasketScene-v1", 0.1),
    ],
)
def test_placing_begins_near_the_goal_beside_and_above(env_id, near):
    stages = []
    for beside, above in ((0.9, 0.9), (1.1, 0.5), (0.5, 1.1), (0.5, -1.1)):
        where = [0.0, 0.1 + beside * near, 0.2 + above * near]
        state = pick_cube_state(tool=where, object=where, grasped=True)
        stages.append(stage_of(env_id, state))
    assert stages == [3, 2, 2, 2]


@pytest.mark.parametrize(
    ("env_id", "stage", "changes"),
    [
        ("LiftPegUpright-v1", 2, {"tilt": 0.21}),
        ("LiftPegUpright-v1", 3, {"tilt": 0.19}),
        ("LiftPegUpright-v1", 3, {"tilt": 0.19, "grasped": False}),
        ("PegInsertionSide-v1", 3, {"aside": 0.009, "peg_turn": [0.0, 0.1, 0.1]}),
        ("PegInsertionSide-v1", 2, {"aside": 0.011, "peg_turn": [0.0, 0.1, 0.1]}),
        ("PegInsertionSide-v1", 2, {"aside": 0.009, "peg_turn": [0.0, 0.11, 0.11]}),
        ("PegInsertionSide-v1", 0, {"aside": 0.009, "grasped": False}),
    ],
)
def test_the_last_stages_of_the_pegs(env_id, stage, changes):
    lifted = {
        "tool": [0.0, 0.0, 0.1],
        "object": [0.0, 0.0, 0.07],
        "grasped": True,
        "depth": 0.1,
        "peg_turn": [0.0, 0.0, 0.0],
    }
    assert stage_of(env_id, pick_cube_state(**lifted | changes)) == stage


def test_distances_of_grasp_and_place_by_hand():
    _, grasp, _, place = TASKS["StackCube-v1"].stage_table
    low = [0.0, 0.0, 0.02]
    goal = [0.0, 0.1, 0.2]
    # The fingers have to close by 4 cm, and the cube has to move by 3 cm.
    open_above = pick_cube_state(tool=low)
    assert grasp.distance(open_above).item() == pytest.approx(0.04 + 0.03)
    held = pick_cube_state(tool=low, grasped=True)
    assert grasp.distance(held).item() == pytest.approx(0.03)
    # A cube is let go when the fingers are 1 cm wider than it.
    for opening, left in ((0.04, 0.01), (0.06, 0.0)):
        state = pick_cube_state(tool=goal, object=goal, opening=opening)
        assert place.distance(state).item() == pytest.approx(left, abs=1e-6)


# ---- observers ----
def at(*p, turn: float = 0.0, axis: int = 2):
    """A pose, turned about one of its axes."""
    q = [math.cos(turn / 2), 0.0, 0.0, 0.0]
    q[1 + axis] = math.sin(turn / 2)
    return types.SimpleNamespace(p=torch.tensor([p]), q=torch.tensor([q]))


def stub(tool: tuple, **actors):
    """What observers read of an env of the Panda with the tool there."""
    link = types.SimpleNamespace(pose=at(*tool), linear_velocity=torch.zeros(1, 3))
    arm = types.SimpleNamespace(config=types.SimpleNamespace(use_target=False))
    robot = types.SimpleNamespace(links_map={PANDA.tool: link}, qpos=torch.zeros(1, 9))
    agent = types.SimpleNamespace(
        robot=robot,
        controller=types.SimpleNamespace(controllers={"arm": arm}),
        is_grasping=lambda actor: torch.tensor([False]),
    )
    return types.SimpleNamespace(
        agent=agent,
        device=torch.device("cpu"),
        goal_radius=0.1,
        peg_half_length=0.1,
        peg_half_width=0.02,
        **{name: types.SimpleNamespace(pose=pose) for name, pose in actors.items()},
    )


def stacking(x: float, y: float) -> dict:
    """StackCube's state with the tool above cube A at the origin, and cube B at (x, y)."""
    env = stub((0.0, 0.0, 0.2), cubeA=at(0.0, 0.0, 0.02), cubeB=at(x, y, 0.02))
    return observe_stack_cube(env)


def test_fingers_close_on_the_sides_that_the_other_cube_leaves_free():
    away = stacking(0.2, 0.0)
    beside = stacking(0.0, 0.05)
    before = stacking(0.05, 0.0)
    assert away["yaw_error"].abs() < 1e-6
    assert before["yaw_error"].abs() < 1e-6
    assert away["wait"] == before["wait"] == 0
    # The fingers open along y, where the other cube is.
    assert beside["yaw_error"].abs().item() == pytest.approx(math.pi / 2)
    assert beside["wait"].item() == pytest.approx(0.05)


def test_a_peg_stands_on_either_end():
    tilts = []
    for turn in (math.pi / 2, -math.pi / 2, 0.3):
        peg = at(0.0, 0.0, 0.1, turn=turn, axis=1)
        tilts.append(observe_lift_peg(stub((0.0, 0.0, 0.2), peg=peg))["tilt"].item())
    assert tilts == pytest.approx([0, 0, math.pi / 2 - 0.3], abs=1e-3)


@pytest.mark.parametrize(
    ("tool", "stage"),
    [
        # Behind the cube, and too far behind it.
        ((-0.045, 0.0, 0.02), 1),
        ((-0.075, 0.0, 0.02), 1),
        ((-0.085, 0.0, 0.02), 0),
        # Inside the cube, and before it.
        ((-0.005, 0.0, 0.02), 0),
        ((0.045, 0.0, 0.02), 0),
        # Beside the cube, and above it.
        ((-0.045, 0.025, 0.02), 1),
        ((-0.045, 0.035, 0.02), 0),
        ((-0.045, 0.0, 0.05), 0),
    ],
)
def test_pushing_begins_behind_the_cube(tool, stage):
    env = stub(tool, obj=at(0.0, 0.0, 0.02), goal_region=at(0.3, 0.0, 0.0))
    table = TASKS["PushCube-v1"].stage_table
    out = stage_signals(table, observe_push(env), torch.tensor([False]), "sigmoid", "offset")
    assert out["stage"] == stage
    # To the grip, and to the goal's rim.
    distances = [math.dist(tool, (-0.045, 0.0, 0.02)), 0.2]
    assert out["distances"][0].tolist() == pytest.approx(distances, abs=1e-6)


def test_tasks_have_what_outside_checks_read():
    for env_id, task in TASKS.items():
        assert get_task(env_id) is task
        assert isinstance(task.instruction, str)
        assert isinstance(task.max_episode_steps, int)
        assert len(task.stages) >= 2
        assert all(isinstance(name, str) for name in task.stages)
        assert all(stage.length > 0 for stage in task.stage_table)
        # The held-out words are other words.
        words = {task.instruction, *task.paraphrases}
        assert len(words) == 1 + len(task.paraphrases) >= 3
    # A policy of several tasks tells them apart by their instructions.
    assert len({task.instruction for task in TASKS.values()}) == len(TASKS) == 11


# ---- segments ----
LABELS = st.lists(st.integers(0, K), min_size=1, max_size=12)


@given(LABELS)
def test_segments_are_the_running_maximum_below_k(labels):
    segment = segment_stages(torch.tensor(labels), K)
    expected = [min(max(labels[: t + 1]), K - 1) for t in range(len(labels))]
    assert segment.tolist() == expected


@given(LABELS)
def test_the_steps_of_the_segments_are_those_of_their_labels_in_order(labels):
    stage = torch.tensor(labels)
    segment = segment_stages(stage, K).tolist()
    found = segment_steps(stage, K)
    assert all(steps.dtype == torch.long for steps in found)
    expected = [[t for t, label in enumerate(segment) if label == k] for k in range(K)]
    assert [steps.tolist() for steps in found] == expected


def columns_of(length: int):
    """One to four columns of labels, all of one length."""
    column = st.lists(st.integers(0, K), min_size=length, max_size=length)
    return st.lists(column, min_size=1, max_size=4)


@given(st.integers(1, 8).flatmap(columns_of))
def test_segments_of_a_batch_are_those_of_its_columns(columns):
    batch = segment_stages(torch.tensor(columns).T, K)
    alone = [segment_stages(torch.tensor(column), K) for column in columns]
    assert torch.equal(batch, torch.stack(alone, 1))


LOGPROBS = st.lists(
    st.lists(st.integers(-9, 0), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
)


@given(LOGPROBS)
def test_decoded_stages_are_the_best_of_all_paths_that_never_fall(rows):
    logprobs = torch.tensor(rows, dtype=torch.double)

    def score(path) -> float:
        return sum(logprobs[t, k].item() for t, k in enumerate(path))

    path = decode_stages(logprobs).tolist()
    assert path == sorted(path)
    assert score(path) == max(map(score, combinations_with_replacement(range(3), len(rows))))


def test_one_misread_step_does_not_move_a_decoded_boundary():
    causal = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0, 1, 2, 2])
    likely = torch.nn.functional.one_hot(causal, 3) == 1
    logprobs = torch.where(likely, 0.8, 0.1).log()
    assert decode_stages(logprobs).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


# ---- costs and shaping ----
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, K - 1)), min_size=1, max_size=12))
def test_costs_are_means_over_segments_and_nan_where_never_entered(rows):
    distance, segment = zip(*rows)
    distance = torch.tensor(distance, dtype=torch.double)
    cost = stage_costs(distance, torch.tensor(segment), K).tolist()
    for k in range(K):
        in_stage = [d for d, s in rows if s == k]
        if in_stage:
            assert cost[k] == pytest.approx(sum(in_stage) / len(in_stage))
        else:
            assert math.isnan(cost[k])


def random_episode(T=9, seed=0):
    """Rewards, potentials, next potentials and terminated, (T, 1) each, without an ending."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(T, 1, generator=g, dtype=torch.double)
    potentials = torch.rand(T + 1, 1, generator=g, dtype=torch.double)
    return rewards, potentials[:-1], potentials[1:], torch.zeros(T, 1, dtype=torch.bool)


@pytest.mark.parametrize("terminal", [True, False])
def test_shaping_telescopes_and_the_potential_of_a_terminal_state_is_zero(terminal):
    rewards, potentials, next_potentials, terminated = random_episode()
    T = len(rewards)
    terminated[-1] = terminal
    shaped = shape_rewards(rewards, potentials, next_potentials, terminated, gamma=0.9, weight=0.25)
    discounts = 0.9 ** torch.arange(T, dtype=torch.double)[:, None]
    # A truncated episode would have gone on.
    left = 0 if terminal else 0.9**T * next_potentials[-1]
    gain = (discounts * (shaped - rewards)).sum(0)
    assert torch.allclose(gain, 0.25 * (left - potentials[0]))


def test_shaping_of_weight_zero_changes_nothing():
    rewards, *rest = random_episode()
    assert torch.equal(shape_rewards(rewards, *rest, gamma=0.9, weight=0.0), rewards)


@pytest.mark.parametrize("which", range(4))
def test_shaping_refuses_shapes_that_would_broadcast(which):
    inputs = list(random_episode())
    inputs[which] = inputs[which][:, 0]
    with pytest.raises(AssertionError):
        shape_rewards(*inputs, gamma=0.9, weight=1.0)
