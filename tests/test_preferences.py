"""Human preferences: pairs go out as clips, and a person's verdicts come back as pairs.

The lines that name what is wrong with a run are tested here, too.
"""

import json
import math
import shutil
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import TASK, call, invent_rollouts, prompt, scalars

import sta_tpo
from plumbing.checkpoint import load_policy, load_separator
from plumbing.human_pairs import read_preferences
from plumbing.run import ppo_symptoms, tpo_symptoms
from stare_utils import decode_stages
from world.tasks import UserError

K = len(TASK.stages)
CPU = torch.device("cpu")
ROLLOUTS = invent_rollouts([11, 22])
for number, rollout in enumerate(ROLLOUTS):
    # Each step has a colour of its own.
    for step, frame in enumerate(rollout["rgb"]):
        frame[:] = torch.tensor([20 + 25 * number, 20 + 15 * step, 100])
NAMES = [f"{rollout['init_seed']}_{i % 4}" for i, rollout in enumerate(ROLLOUTS)]


def segments(rollouts: list[dict]) -> list[list[torch.Tensor]]:
    """The steps of each roll-out's stages."""
    return [sta_tpo.segments_of(rollout, K, True) for rollout in rollouts]


@pytest.fixture(scope="module")
def tpo(checkpoint, tmp_path_factory):
    """sta_tpo.main on the invented roll-outs, in the run folder given or else in a new one."""

    def run(*args, output=None):
        output = output or tmp_path_factory.mktemp("run")
        flags = ("--output-dir", output, "--num-eval-episodes", 0, "--no-cuda")
        call(sta_tpo, "--checkpoint", checkpoint, *flags, *args)
        return output

    files = [Path(f"{name}.npz") for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sta_tpo, "collect_rollouts", lambda *args: files)
        patch.setattr(sta_tpo, "read_rollouts", lambda files: list(ROLLOUTS))
        yield run


@pytest.fixture(scope="module")
def export(tpo, tmp_path_factory):
    """The run of --export-pairs and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("pairs")
    return tpo("--export-pairs", folder), folder


@pytest.fixture
def exported(export, tmp_path):
    """A copy of that folder, which a test may fill in."""
    return shutil.copytree(export[1], tmp_path / "pairs")


@pytest.fixture
def exported_run(export, tmp_path):
    """A copy of that run without what other tests have trained in it."""
    ignored = shutil.ignore_patterns("checkpoint*", "events*")
    return shutil.copytree(export[0], tmp_path / "run", ignore=ignored)


def read(folder):
    """The pairs that the folder's verdicts make."""
    return read_preferences(folder / "pairs.jsonl", ROLLOUTS, segments(ROLLOUTS), NAMES)


def rows_of(folder):
    """The lines of the folder's pairs.jsonl."""
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def fill(folder, verdicts):
    """Writes verdicts into the folder's pairs.jsonl. Returns its lines as they were."""
    rows = rows_of(folder)
    lines = [json.dumps({**row, "preferred": verdict}) for row, verdict in zip(rows, verdicts)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return rows


# ---- clips go out ----
def test_pairs_are_exported_as_clips_side_by_side_in_random_order(exported):
    rows = rows_of(exported)
    args = sta_tpo.Args()
    pairs = sta_tpo.build_stage_pairs(ROLLOUTS, K, args.cost_margin, args.max_pairs_per_stage)
    assert len(rows) == len(pairs) == len(list(exported.glob("*.mp4"))) > 8
    for row, pair in zip(rows, pairs):
        assert {row["left"], row["right"]} == {NAMES[pair["chosen"]], NAMES[pair["rejected"]]}
        assert row["preferred"] is None and row["instruction"] == TASK.instruction
        assert row["stage_name"] == TASK.stages[row["stage"]]
    # The better one is on either side.
    lefts = sum(row["left"] == NAMES[pair["chosen"]] for row, pair in zip(rows, pairs))
    assert 0 < lefts < len(rows)
    for row in rows[:6]:
        check_clip(exported, row)


def check_clip(folder, row):
    """A clip shows its two segments beside each other, and the shorter one waits at its end."""
    clip = imageio.v3.imread(folder / row["clip"]).astype(float)
    films = []
    for side in ("left", "right"):
        rollout = ROLLOUTS[NAMES.index(row[side])]
        first, last = row[f"{side}_steps"]
        # The frame after the segment shows the event that ends it.
        film = rollout["rgb"][first : last + 2].float().mean((1, 2)).numpy()  # (T, 3)
        films.append(film)
    assert clip.shape == (max(map(len, films)), 384, 2 * 384 + 12, 3)
    assert clip[:, :, 384:396].min() > 200
    halves = clip[:, :, :384].mean((1, 2)), clip[:, :, 396:].mean((1, 2))
    for film, half in zip(films, halves):
        waiting = np.concatenate([film, np.repeat(film[-1:], len(half) - len(film), 0)])
        # Compression changes the colours by some of 255 levels.
        assert np.abs(half - waiting).max() < 4


def test_whole_trajectories_are_exported_from_their_first_step_to_their_last(tpo, tmp_path):
    tpo("--export-pairs", tmp_path / "pairs", "--no-stage-aware")
    rows = rows_of(tmp_path / "pairs")
    for row in rows:
        assert (row["stage"], row["stage_name"]) == (0, "trajectory")
        for side in ("left", "right"):
            rollout = ROLLOUTS[NAMES.index(row[side])]
            assert row[f"{side}_steps"] == [0, len(rollout["stage"]) - 1]
    assert len(rows) > 2


# ---- verdicts come back ----
def test_verdicts_become_pairs(exported, capsys):
    rows = fill(exported, ["left", "right", "tie", *[None] * 99])
    pairs = read(exported)
    chosen = [(NAMES[pair["chosen"]], NAMES[pair["rejected"]], pair["stage"]) for pair in pairs]
    sides = [(row["left"], row["right"], row["stage"]) for row in rows[:3]]
    flipped = [(right, left, stage) for left, right, stage in sides]
    assert chosen == [sides[0], flipped[1], sides[2]]
    assert [pair["reason"] for pair in pairs] == ["human", "human", "tie"]
    assert f"3 of {len(rows)} lines" in capsys.readouterr().out
    # With costs a tie would train towards the costlier side.
    assert all(pair["cost_chosen"] == pair["cost_rejected"] == 0 for pair in pairs)


def test_training_follows_the_person_and_not_the_rules(exported, export, tpo):
    pairs = sta_tpo.build_stage_pairs(ROLLOUTS, K, 0.1, 6)
    rules = {(NAMES[p["chosen"]], NAMES[p["rejected"]], p["stage"]) for p in pairs}
    against = []
    for row in rows_of(exported):
        right_wins = (row["right"], row["left"], row["stage"]) in rules
        against.append("left" if right_wins else "right")
    fill(exported, against)
    flags = "--num-epochs 8 --learning-rate 1e-3 --cost-coef 0 --resume --preferences"
    run = tpo(*flags.split(), exported / "pairs.jsonl", output=export[0])
    curves = scalars(run)
    assert curves["rewards/margins"][0] == pytest.approx(0, abs=1e-5)
    assert curves["rewards/margins"][-1] > 0.5 and curves["rewards/accuracies"][-1] > 0.9


def test_a_tie_moves_nothing_where_both_are_as_likely(exported, exported_run, tpo):
    flags = ("--batch-size", 1, "--learning-rate", 1e-8)
    untied = min(scalars(tpo(*flags, "--cost-coef", 0))["losses/grad_norm"])
    fill(exported, ["tie"] * 99)
    run = tpo("--resume", "--preferences", exported / "pairs.jsonl", *flags, output=exported_run)
    curves = scalars(run)
    losses = curves["losses/tpo_loss"]
    assert len(losses) > 2
    assert losses == pytest.approx([math.log(2)] * len(losses), abs=1e-3)
    # A pair in both orders would move the policy wherever the two fall into different batches.
    assert max(curves["losses/grad_norm"]) < 0.01 * untied


def test_the_loss_of_a_tie_is_the_mean_of_either_orders(exported, exported_run, tpo):
    row = rows_of(exported)[0]
    lines = [json.dumps({**row, "preferred": verdict}) for verdict in ("left", "tie")]
    (exported / "pairs.jsonl").write_text("\n".join(lines))
    flags = ("--resume", "--preferences", exported / "pairs.jsonl")
    run = tpo(*flags, "--num-epochs", 6, "--learning-rate", 1e-4, output=exported_run)
    curves = scalars(run)
    margins = np.array(curves["rewards/margins"])
    won = np.logaddexp(0, -margins)
    lost = np.logaddexp(0, margins)
    assert np.abs(margins).max() > 0.3
    expected = (won + (won + lost) / 2) / 2
    assert curves["losses/tpo_loss"] == pytest.approx(expected, abs=1e-5)


def test_roll_outs_of_another_task_are_refused(export, tpo):
    with pytest.raises(UserError, match="begun with --env-id = PickCube-v1, not PushCube-v1"):
        tpo("--resume", "--env-id", "PushCube-v1", output=export[0])


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("cannot be read", lambda row: "{"),
        ("cannot be read", lambda row: json.dumps(7)),
        ("cannot be read", lambda row: json.dumps({**row, "left": "../../etc/passwd"})),
        ("cannot be read", lambda row: json.dumps({**row, "stage": 9})),
        ("cannot be read", lambda row: json.dumps({**row, "stage": "reach"})),
        ("cannot be read", lambda row: json.dumps({**row, "stage": float("inf")})),
        ("cannot be read", lambda row: json.dumps({**row, "stage": 10**30})),
        (
            "is not a pair of this run",
            lambda row: json.dumps({**row, "right": row["left"], "right_steps": row["left_steps"]}),
        ),
        ("is not a pair of this run", lambda row: json.dumps({**row, "left_steps": [0, 99]})),
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_number(words, change, exported):
    check_second_line(exported, f"line 2 {words}", change)


def test_another_verdict_is_named_by_its_line(exported):
    words = "line 2: \"preferred\" is 'lleft'"
    check_second_line(exported, words, lambda row: json.dumps({**row, "preferred": "lleft"}))


def check_second_line(exported, words, change):
    """The file is refused in one line that holds `words`, once `change` has its second line."""
    rows = fill(exported, ["left"] * 99)
    lines = (exported / "pairs.jsonl").read_text().splitlines()
    lines[1] = change(rows[1])
    (exported / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read(exported)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_without_verdicts_or_of_another_kind(exported, tpo, tmp_path):
    with pytest.raises(UserError, match="no verdict yet"):
        read(exported)
    with pytest.raises(UserError, match="is not an empty folder"):
        tpo("--export-pairs", exported)
    given = ("--preferences", exported / "pairs.jsonl")
    for flags in (
        ("--resume", "--preferences", tmp_path / "nowhere.jsonl"),
        given,
        ("--resume", *given, "--export-pairs", tmp_path / "other"),
    ):
        with pytest.raises(UserError, match="it goes with --resume, without --export-pairs"):
            tpo(*flags)
    (exported / "pair_0000.mp4").rename(exported / "pairs.jsonl")
    with pytest.raises(UserError, match="line 1 cannot be read"):
        read(exported)


def test_a_pair_of_two_initial_states_is_refused(tmp_path):
    row = {
        "stage": 0,
        "left": "c",
        "right": "h",
        "left_steps": [0, 2],
        "right_steps": [0, 3],
        "preferred": "left",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    rollouts = invent_rollouts([11, 22])
    with pytest.raises(UserError, match="not a pair of this run"):
        read_preferences(tmp_path / "pairs.jsonl", rollouts, segments(rollouts), list("abcdefgh"))


# ---- training on pairs ----
def test_other_pairs_are_not_trained_on_top_of_a_finished_run(tpo):
    run = tpo("--num-epochs", 1)
    with pytest.raises(UserError, match="was trained on other pairs"):
        tpo("--resume", "--max-pairs-per-stage", 2, output=run)
    with pytest.raises(UserError, match="begun with --env-id = PickCube-v1, not PushCube-v1"):
        tpo("--resume", "--env-id", "PushCube-v1", output=run)


def test_a_bfloat16_policy_starts_at_ln_2_too(tpo, monkeypatch):
    """Without LoRA it is trained in float32, and so must its reference be."""

    def load(*args):
        model, *rest = load_policy(*args)
        return model.bfloat16(), *rest

    monkeypatch.setattr(sta_tpo, "load_policy", load)
    curves = scalars(tpo("--num-epochs", 1, "--cost-coef", 0))
    assert curves["losses/tpo_loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert curves["rewards/margins"][0] == pytest.approx(0, abs=1e-5)


def test_without_distances_the_pairs_kept_are_of_as_many_rollouts_as_can_be():
    rollouts = []
    for i in range(8):
        rollout = {
            "init_seed": 0,
            "stage": torch.zeros(3, dtype=torch.long),
            "distance": torch.zeros(3),
            "success": i % 2 == 0,
        }
        rollouts.append(rollout)
    pairs = sta_tpo.build_stage_pairs(rollouts, 1, max_pairs_per_stage=4)
    used = [i for pair in pairs for i in (pair["chosen"], pair["rejected"])]
    assert sorted(used) == list(range(8))


def features(model, processor, rollout: dict) -> torch.Tensor:
    """What a separator reads at each step, (T, D)."""
    inputs = prompt(processor, rollout)
    return model(**inputs, logits_to_keep=1).last_hidden_state[:, -1]


def centred_separator(*args):
    """`load_separator`, whose separator sees several stages.

    An untrained one sees one stage everywhere. This one is without the features' mean.
    """
    folder, separator = load_separator(*args)
    model, processor, _ = load_policy(folder, CPU)
    with torch.no_grad():
        hidden = torch.cat([features(model, processor, rollout) for rollout in ROLLOUTS])
        separator.weight *= 50
        separator.bias.copy_(-separator.weight @ hidden.mean(0))
    return folder, separator


def test_pairs_of_the_learned_separator_know_no_distance(tpo, monkeypatch):
    """Its segments replace those of the rules, whose labels and distances are not read."""
    seen = []
    pairs_of = sta_tpo.build_stage_pairs

    def build(rollouts, *args):
        seen.extend(rollouts)
        return pairs_of(rollouts, *args)

    monkeypatch.setattr(sta_tpo, "build_stage_pairs", build)
    monkeypatch.setattr(sta_tpo, "require_separator", centred_separator)
    for rollout in ROLLOUTS:
        monkeypatch.setitem(rollout, "stage", rollout["stage"].clone())
        monkeypatch.setitem(rollout, "distance", rollout["distance"].clone())
    # Roll-outs are longer than a chunk.
    run = tpo("--stage-source", "learned", "--chunk-size", 4)
    source = Path((run / "source.txt").read_text().split()[0])
    folder, separator = centred_separator(source, "PickCube-v1", CPU)
    model, processor, _ = load_policy(folder, CPU)
    assert len(seen) == len(ROLLOUTS)
    with torch.no_grad():
        for rollout in seen:
            logprobs = separator(features(model, processor, rollout)).log_softmax(-1)
            assert torch.equal(rollout["stage"], decode_stages(logprobs))
            assert (rollout["distance"] == 0).all() and (rollout["stage"].diff() >= 0).all()
    assert len(torch.cat([rollout["stage"] for rollout in seen]).unique()) > 1
    assert {pair["reason"] for pair in pairs_of(seen, K)} == {"completed"}
    assert not [key for key in scalars(run) if key.endswith("_cost")]


# ---- what is wrong with a run ----
PPO = {
    "losses/first_ratio": 1.0,
    "losses/rollout_update_logprob_gap": 1e-5,
    "losses/entropy": 10.0,
    "charts/success_once": 0.5,
    "charts/shaped_return": 0.4,
}


@pytest.mark.parametrize(
    ("cause", "now"),
    [
        ("ratio", {"losses/first_ratio": 1.03}),
        ("ratio", {"losses/rollout_update_logprob_gap": 0.2}),
        ("entropy", {"losses/entropy": 2.0}),
        ("instead of the task", {"charts/success_once": 0.2, "charts/shaped_return": 0.6}),
        ("learning-rate", {"charts/success_once": 0.2}),
        ("", {}),
        ("", {"charts/shaped_return": 0.9, "charts/success_once": 0.9}),
        ("", {"losses/entropy": 5.0}),
    ],
)
def test_what_is_wrong_with_a_ppo_run_is_named(cause, now):
    lines = ppo_symptoms(PPO, {**PPO, **now}, 0.25)
    assert len(lines) == bool(cause)
    assert all(cause in line and "\n" not in line for line in lines)
    # Without a stage reward the cause cannot be the stage reward.
    plain = ppo_symptoms(PPO, {**PPO, **now}, 0.0)
    assert [line for line in plain if "task" in line] == [] and len(plain) == len(lines)


@pytest.mark.parametrize(
    ("wrong", "chosen_shift", "margin"),
    [(True, -2.0, 2.0), (False, 1.0, 2.0), (False, -2.0, -1.0)],
)
def test_a_margin_that_grows_while_the_chosen_fall_is_named(wrong, chosen_shift, margin):
    lines = tpo_symptoms(chosen_shift, margin)
    assert len(lines) == wrong and all("logps/chosen" in line for line in lines)


def test_a_run_prints_a_warning_once(tpo, capsys):
    tpo("--learning-rate", 0.03, "--num-epochs", 6, "--batch-size", 8)
    assert capsys.readouterr().out.count("warning: ") == 1


def pair_of(chosen: int, rejected: int, reason: str) -> dict:
    """A pair in stage 1."""
    return {"stage": 1, "chosen": chosen, "rejected": rejected, "reason": reason}


def test_the_printed_table_counts_pairs_by_reason(capsys):
    rollouts = invent_rollouts([11])
    cut = segments(rollouts)
    pairs = [pair_of(2, 3, reason) for reason in ("cost", "cost", "completed", "tie")]
    pairs.append(pair_of(3, 2, "cost"))
    sta_tpo.print_pairs(pairs, rollouts, cut, TASK.stages)
    lines = capsys.readouterr().out.splitlines()
    gap = abs(rollouts[2]["distance"][3] - rollouts[3]["distance"][4])
    steps = [len(cut[i][1]) for i in (2, 3)]
    assert steps[0] != steps[1]
    assert lines[0] == "4 roll-outs, 0.500 successful, 37 env steps"
    assert lines[2].split()[1:] == ["0", "0", "0", "-", "0", "0.00"]
    slower = "67" if steps[0] > steps[1] else "33"
    assert lines[3].split() == ["grasp", "5", "1", "3", slower, "%", "1", f"{gap:.2f}"]


@pytest.mark.parametrize("slower", [5, 6])
def test_slow_winners_are_named(slower, capsys):
    rollouts = invent_rollouts([11])
    cut = segments(rollouts)
    slow, quick = 2, 3
    if len(cut[2][1]) < len(cut[3][1]):
        slow, quick = 3, 2
    pairs = [pair_of(slow, quick, "cost")] * slower + [pair_of(quick, slow, "cost")] * 5
    sta_tpo.print_pairs(pairs, rollouts, cut, TASK.stages)
    warning = "warning: in grasp most winners by cost are the slower"
    assert capsys.readouterr().out.count(warning) == (slower > 5)
