"""Stages without a simulator: tables, signals, segments, costs, shaping."""
import math
import types
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stare_utils
from stare_utils import Stage, Task, decode_stages, norm, segment_stages, shape_rewards, stage_costs, stage_potential, stage_signals

K = 4
FORMS, ACROSS = st.sampled_from(["sigmoid", "linear"]), st.sampled_from(["offset", "bare"])


def made_up_task() -> Task:
    """K stages whose entry flags and distances are columns of the state."""
    stages = [Stage(f"stage{k}", lambda s, k=k: s["entered"][:, k], lambda s, k=k: s["distance"][:, k], 0.1 * (k + 1), None, None) for k in range(K)]
    return Task("", (), tuple(stages), None, 50)


STATES = st.lists(st.tuples(st.lists(st.booleans(), min_size=K, max_size=K), st.lists(st.floats(0, 2), min_size=K, max_size=K), st.booleans()),
                  min_size=2, max_size=6)  # fmt: skip


def signals(rows, form="sigmoid", across="offset"):
    entered, distance, success = (torch.tensor(column) for column in zip(*rows))
    entered[:, 0] = True
    return entered, distance, success, stage_signals(made_up_task(), {"entered": entered, "distance": distance}, success, form, across)


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
    assert (out["potential"] >= 0).all() and (out["potential"] <= top).all()
    assert (out["potential"][success] == top).all()


@given(STATES, FORMS)
def test_potential_never_falls_when_the_stage_rises(rows, form):
    _, _, _, out = signals(rows, form)
    for i in range(len(rows)):
        assert (out["potential"][i] >= out["potential"][out["stage"] < out["stage"][i]]).all()


@given(STATES, FORMS)
def test_potential_rises_as_the_distance_of_a_stage_falls(rows, form):
    nearer = [(entered, [d / 2 for d in distance], False) for entered, distance, _ in rows]
    _, distance, _, far = signals([(entered, distance, False) for entered, distance, _ in rows], form)
    assert (signals(nearer, form)[-1]["potential"] >= far["potential"]).all()


def test_potential_forms_by_hand():
    d, length = torch.tensor([0.0, 0.1, 0.2, 0.5]), torch.tensor(0.2)
    assert torch.allclose(stage_potential(d, length, "linear"), torch.tensor([1.0, 0.5, 0.0, 0.0]))
    sigmoid = [1 / (1 + math.exp(-(1 - x))) * (1 + math.exp(-1)) for x in (0, 0.5, 1, 2.5)]
    assert torch.allclose(stage_potential(d, length), torch.tensor(sigmoid))


def test_the_bare_potential_falls_at_a_switch_and_the_offset_one_does_not():
    before = ([True, False, False, False], [0.0, 0.2, 0.3, 0.4], False)  # stage 0 done, and the next one begins at its length scale
    after = ([True, True, False, False], [0.0, 0.2, 0.3, 0.4], False)
    bare, offset = (signals([before, after], across=across)[-1]["potential"] for across in ("bare", "offset"))
    assert bare[1] < bare[0] and offset[1] > offset[0]


def pick_cube_state(**changes):
    state = {"tool": [0.0, 0.0, 0.2], "object": [0.0, 0.0, 0.02], "object_start": [0.0, 0.0, 0.02], "goal": [0.0, 0.1, 0.2], "grasped": False,
             "yaw_error": 0.0, "opening": 0.08, "width": 0.04, "speed": 0.0}  # fmt: skip
    state = {name: torch.tensor([value]) for name, value in {**state, **changes}.items()}
    offset = state["object"] - state["goal"]
    return {**state, "to_grip": norm(state["tool"] - state["object"]), "to_goal": norm(offset), "beside_goal": norm(offset[:, :2]), "above_goal": offset[:, 2]}


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, 0),
        ({"tool": [0.0, 0.0, 0.028]}, 1),  # the gripper is at the cube
        ({"tool": [0.0, 0.0, 0.032]}, 0),  # not yet
        ({"tool": [0.0, 0.0, 0.02], "grasped": True}, 1),
        ({"tool": [0.0, 0.0, 0.06], "object": [0.0, 0.0, 0.06], "grasped": True}, 2),  # lifted
        ({"tool": [0.04, 0.0, 0.02], "object": [0.04, 0.0, 0.02], "grasped": True}, 2),  # carried along the table
        ({"tool": [0.0, 0.1, 0.18], "object": [0.0, 0.1, 0.18], "grasped": True}, 3),
        ({"tool": [0.0, 0.1, 0.155], "object": [0.0, 0.1, 0.155], "grasped": True}, 2),  # not yet near the goal
        ({"tool": [0.0, 0.1, 0.3], "object": [0.0, 0.1, 0.18]}, 0),  # near it, but not held
        ({"tool": [0.0, 0.1, 0.18], "object": [0.04, 0.0, 0.02]}, 0),  # dropped: the label falls back
    ],
)
def test_stages_of_pick_cube(changes, stage):
    assert stage_signals(stare_utils.TASKS["PickCube-v1"], pick_cube_state(**changes), torch.tensor([False]), "sigmoid", "offset")["stage"] == stage


@pytest.mark.parametrize(("env_id", "near"), [("StackCube-v1", 0.03), ("PlaceSphere-v1", 0.02), ("PutCarrotOnPlateInScene-v1", 0.085),
                                              ("PutSpoonOnTableClothInScene-v1", 0.08), ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 0.03),
                                              ("PutEggplantInBasketScene-v1", 0.1)])  # fmt: skip
def test_placing_begins_near_the_goal_beside_and_above(env_id, near):
    task, signals = stare_utils.TASKS[env_id], []
    for beside, above in ((0.9, 0.9), (1.1, 0.5), (0.5, 1.1), (0.5, -1.1)):
        where = [0.0, 0.1 + beside * near, 0.2 + above * near]
        signals.append(stage_signals(task, pick_cube_state(tool=where, object=where, grasped=True), torch.tensor([False]), "sigmoid", "offset")["stage"].item())
    assert signals == [3, 2, 2, 2]


@pytest.mark.parametrize(("env_id", "stage", "changes"), [
    ("LiftPegUpright-v1", 2, {"tilt": 0.21}), ("LiftPegUpright-v1", 3, {"tilt": 0.19}), ("LiftPegUpright-v1", 3, {"tilt": 0.19, "grasped": False}),
    ("PegInsertionSide-v1", 3, {"aside": 0.009, "peg_turn": [0.0, 0.1, 0.1]}), ("PegInsertionSide-v1", 2, {"aside": 0.011, "peg_turn": [0.0, 0.1, 0.1]}),
    ("PegInsertionSide-v1", 2, {"aside": 0.009, "peg_turn": [0.0, 0.11, 0.11]}), ("PegInsertionSide-v1", 0, {"aside": 0.009, "grasped": False}),
])  # fmt: skip
def test_the_last_stages_of_the_pegs(env_id, stage, changes):
    lifted = {"tool": [0.0, 0.0, 0.1], "object": [0.0, 0.0, 0.07], "grasped": True, "depth": 0.1, "peg_turn": [0.0, 0.0, 0.0]}
    signals = stage_signals(stare_utils.TASKS[env_id], pick_cube_state(**lifted | changes), torch.tensor([False]), "sigmoid", "offset")
    assert signals["stage"] == stage


def test_distances_of_grasp_and_place_by_hand():
    reach, grasp, transport, place = stare_utils.TASKS["StackCube-v1"].stage_table
    low, goal = [0.0, 0.0, 0.02], [0.0, 0.1, 0.2]
    assert grasp.distance(pick_cube_state(tool=low)).item() == pytest.approx(0.04 + 0.03)  # the fingers have to close by 4 cm, the cube to move by 3
    assert grasp.distance(pick_cube_state(tool=low, grasped=True)).item() == pytest.approx(0.03)
    for opening, left in ((0.04, 0.01), (0.06, 0.0)):  # let go: 1 cm wider than the cube
        assert place.distance(pick_cube_state(tool=goal, object=goal, opening=opening)).item() == pytest.approx(left, abs=1e-6)


def at(*p, turn: float = 0.0, axis: int = 2):
    """A pose, turned about one of its axes."""
    q = [math.cos(turn / 2), 0.0, 0.0, 0.0]
    q[1 + axis] = math.sin(turn / 2)
    return types.SimpleNamespace(p=torch.tensor([p]), q=torch.tensor([q]))


def stub(tool: tuple, **actors):
    """What observers read of an env of the Panda with the tool there."""
    link = types.SimpleNamespace(pose=at(*tool), linear_velocity=torch.zeros(1, 3))
    arm = types.SimpleNamespace(config=types.SimpleNamespace(use_target=False))
    agent = types.SimpleNamespace(robot=types.SimpleNamespace(links_map={stare_utils.PANDA.tool: link}, qpos=torch.zeros(1, 9)),
                                  controller=types.SimpleNamespace(controllers={"arm": arm}), is_grasping=lambda actor: torch.tensor([False]))  # fmt: skip
    bodies = {name: types.SimpleNamespace(pose=pose) for name, pose in actors.items()}
    return types.SimpleNamespace(agent=agent, device=torch.device("cpu"), goal_radius=0.1, peg_half_length=0.1, peg_half_width=0.02, **bodies)


def pushing(tool: tuple) -> dict:
    return stare_utils.observe_push(stub(tool, obj=at(0.0, 0.0, 0.02), goal_region=at(0.3, 0.0, 0.0)))


def test_fingers_close_on_the_sides_that_the_other_cube_leaves_free():
    away, beside, before = (stare_utils.observe_stack_cube(stub((0.0, 0.0, 0.2), cubeA=at(0.0, 0.0, 0.02), cubeB=at(*where, 0.02)))
                            for where in ((0.2, 0.0), (0.0, 0.05), (0.05, 0.0)))  # fmt: skip
    assert away["yaw_error"].abs() < 1e-6 and before["yaw_error"].abs() < 1e-6 and away["wait"] == before["wait"] == 0
    assert beside["yaw_error"].abs().item() == pytest.approx(math.pi / 2) and beside["wait"].item() == pytest.approx(0.05)  # they open along y


def test_a_peg_stands_on_either_end():
    poses = [at(0.0, 0.0, 0.1, turn=turn, axis=1) for turn in (math.pi / 2, -math.pi / 2, 0.3)]
    tilts = [stare_utils.observe_lift_peg(stub((0.0, 0.0, 0.2), peg=pose))["tilt"].item() for pose in poses]
    assert tilts == pytest.approx([0, 0, math.pi / 2 - 0.3], abs=1e-3)


@pytest.mark.parametrize(("tool", "stage"), [
    ((-0.045, 0.0, 0.02), 1), ((-0.075, 0.0, 0.02), 1), ((-0.085, 0.0, 0.02), 0),  # behind the cube, too far behind
    ((-0.005, 0.0, 0.02), 0), ((0.045, 0.0, 0.02), 0),  # inside it, before it
    ((-0.045, 0.025, 0.02), 1), ((-0.045, 0.035, 0.02), 0), ((-0.045, 0.0, 0.05), 0),  # beside it, above it
])  # fmt: skip
def test_pushing_begins_behind_the_cube(tool, stage):
    signals = stage_signals(stare_utils.TASKS["PushCube-v1"], pushing(tool), torch.tensor([False]), "sigmoid", "offset")
    assert signals["stage"] == stage
    assert signals["distances"][0].tolist() == pytest.approx([math.dist(tool, (-0.045, 0.0, 0.02)), 0.2], abs=1e-6)  # to the grip; to the goal's rim


def test_tasks_have_what_outside_checks_read():
    for env_id, task in stare_utils.TASKS.items():
        assert stare_utils.get_task(env_id) is task
        assert isinstance(task.instruction, str) and isinstance(task.max_episode_steps, int)
        assert len(task.stages) >= 2 and all(isinstance(name, str) for name in task.stages)
        assert all(stage.length > 0 for stage in task.stage_table)
        assert len({task.instruction, *task.paraphrases}) == 1 + len(task.paraphrases) >= 3  # held-out words are other words
    assert len({task.instruction for task in stare_utils.TASKS.values()}) == len(stare_utils.TASKS) == 11  # told apart by language


LABELS = st.lists(st.integers(0, K), min_size=1, max_size=12)


@given(LABELS)
def test_segments_are_the_running_maximum_below_k(labels):
    segment = segment_stages(torch.tensor(labels), K)
    assert segment.tolist() == [min(max(labels[: t + 1]), K - 1) for t in range(len(labels))]


@given(st.integers(1, 8).flatmap(lambda length: st.lists(st.lists(st.integers(0, K), min_size=length, max_size=length), min_size=1, max_size=4)))
def test_segments_of_a_batch_are_those_of_its_columns(columns):
    batch = segment_stages(torch.tensor(columns).T, K)
    assert torch.equal(batch, torch.stack([segment_stages(torch.tensor(column), K) for column in columns], 1))


@given(st.lists(st.lists(st.integers(-9, 0), min_size=3, max_size=3), min_size=1, max_size=5))
def test_decoded_stages_are_the_best_of_all_paths_that_never_fall(rows):
    logprobs = torch.tensor(rows, dtype=torch.double)
    score = lambda path: sum(logprobs[t, k].item() for t, k in enumerate(path))  # noqa: E731
    path = decode_stages(logprobs).tolist()
    assert path == sorted(path) and score(path) == max(map(score, combinations_with_replacement(range(3), len(rows))))


def test_one_misread_step_does_not_move_a_decoded_boundary():
    causal = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0, 1, 2, 2])
    logprobs = torch.where(torch.nn.functional.one_hot(causal, 3) == 1, 0.8, 0.1).log()
    assert decode_stages(logprobs).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, K - 1)), min_size=1, max_size=12))
def test_costs_are_means_over_segments_and_nan_where_never_entered(rows):
    distance, segment = zip(*rows)
    cost = stage_costs(torch.tensor(distance, dtype=torch.double), torch.tensor(segment), K).tolist()
    for k in range(K):
        mine = [d for d, s in rows if s == k]
        assert cost[k] == pytest.approx(sum(mine) / len(mine)) if mine else math.isnan(cost[k])


def random_episode(T=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, potentials = torch.rand(T, 1, generator=g, dtype=torch.double), torch.rand(T + 1, 1, generator=g, dtype=torch.double)
    return rewards, potentials[:-1], potentials[1:], torch.zeros(T, 1, dtype=torch.bool)


@pytest.mark.parametrize("terminal", [True, False])
def test_shaping_telescopes_and_the_potential_of_a_terminal_state_is_zero(terminal):
    rewards, potentials, next_potentials, terminated = random_episode()
    terminated[-1] = terminal
    shaped = shape_rewards(rewards, potentials, next_potentials, terminated, gamma=0.9, weight=0.25)
    discounts = 0.9 ** torch.arange(len(rewards), dtype=torch.double)[:, None]
    left = 0 if terminal else 0.9 ** len(rewards) * next_potentials[-1]  # a truncated episode would have gone on
    assert torch.allclose((discounts * (shaped - rewards)).sum(0), 0.25 * (left - potentials[0]))


def test_shaping_of_weight_zero_changes_nothing():
    rewards, *rest = random_episode()
    assert torch.equal(shape_rewards(rewards, *rest, gamma=0.9, weight=0.0), rewards)


@pytest.mark.parametrize("which", range(4))
def test_shaping_refuses_shapes_that_would_broadcast(which):
    inputs = list(random_episode())
    inputs[which] = inputs[which][:, 0]
    with pytest.raises(AssertionError):
        shape_rewards(*inputs, gamma=0.9, weight=1.0)
