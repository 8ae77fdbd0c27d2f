"""Human preferences: pairs go out as clips, a person's verdicts come back as pairs. And the lines that name what is wrong with a run."""
import json
import math
import shutil
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import TASK, call, invent_rollouts, prompt, scalars

import sta_ppo
import sta_tpo
import vla
from stare_utils import UserError, decode_stages

ROLLOUTS = invent_rollouts([11, 22])
for number, rollout in enumerate(ROLLOUTS):  # each step has a colour of its own
    for step, frame in enumerate(rollout["rgb"]):
        frame[:] = torch.tensor([20 + 25 * number, 20 + 15 * step, 100])
NAMES = [f"{rollout['init_seed']}_{i % 4}" for i, rollout in enumerate(ROLLOUTS)]
K = len(TASK.stages)


@pytest.fixture(scope="module")
def tpo(checkpoint, tmp_path_factory):
    """sta_tpo.main on the invented roll-outs, each time in a new run folder or in the one given."""

    def run(*args, output=None):
        output = output or tmp_path_factory.mktemp("run")
        call(sta_tpo, "--checkpoint", checkpoint, "--output-dir", output, "--num-eval-episodes", 0, "--no-cuda", *args)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sta_tpo, "collect_rollouts", lambda *args: [Path(f"{name}.npz") for name in NAMES])
        patch.setattr(sta_tpo, "read_rollouts", lambda folder: list(ROLLOUTS))
        yield run


@pytest.fixture(scope="module")
def export(tpo, tmp_path_factory):
    """The run of --export-pairs and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("pairs")
    return tpo("--export-pairs", folder), folder


@pytest.fixture
def exported(export, tmp_path):
    """A copy of that folder that may be filled in."""
    return shutil.copytree(export[1], tmp_path / "pairs")


def read(folder):
    return sta_tpo.read_preferences(folder / "pairs.jsonl", ROLLOUTS, NAMES, K, True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def fill(folder, verdicts):
    rows = rows_of(folder)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({**row, "preferred": verdict}) for row, verdict in zip(rows, verdicts)) + "\n")
    return rows


def test_pairs_are_exported_as_clips_side_by_side_in_random_order(exported):
    rows, pairs = rows_of(exported), sta_tpo.build_stage_pairs(ROLLOUTS, K, sta_tpo.Args().cost_margin, sta_tpo.Args().max_pairs_per_stage)
    assert len(rows) == len(pairs) == len(list(exported.glob("*.mp4"))) > 8
    for row, pair in zip(rows, pairs):
        assert {row["left"], row["right"]} == {NAMES[pair["chosen"]], NAMES[pair["rejected"]]} and row["preferred"] is None
        assert row["stage_name"] == TASK.stages[row["stage"]] and row["instruction"] == TASK.instruction
    lefts = sum(row["left"] == NAMES[pair["chosen"]] for row, pair in zip(rows, pairs))
    assert 0 < lefts < len(rows)  # the better one is on either side
    for row in rows[:6]:
        clip = imageio.v3.imread(exported / row["clip"]).astype(float)
        films = []
        for side in ("left", "right"):
            rollout, (first, last) = ROLLOUTS[NAMES.index(row[side])], row[f"{side}_steps"]
            films.append(rollout["rgb"][first : last + 2].float().mean((1, 2)).numpy())  # (T, 3): the frame after the segment shows the event
        assert clip.shape == (max(map(len, films)), 384, 2 * 384 + 12, 3) and clip[:, :, 384:396].min() > 200
        halves = clip[:, :, :384].mean((1, 2)), clip[:, :, 396:].mean((1, 2))
        for film, half in zip(films, halves):
            waiting = np.concatenate([film, np.repeat(film[-1:], len(half) - len(film), 0)])
            assert np.abs(half - waiting).max() < 4  # of 255, after compression


def test_whole_trajectories_are_exported_from_their_first_step_to_their_last(tpo, tmp_path):
    tpo("--export-pairs", tmp_path / "pairs", "--no-stage-aware")
    for row in (rows := rows_of(tmp_path / "pairs")):
        assert (row["stage"], row["stage_name"]) == (0, "trajectory")
        for side in ("left", "right"):
            assert row[f"{side}_steps"] == [0, len(ROLLOUTS[NAMES.index(row[side])]["stage"]) - 1]
    assert len(rows) > 2


def test_verdicts_become_pairs(exported, capsys):
    rows = fill(exported, ["left", "right", "tie", *[None] * 99])
    pairs = read(exported)
    chosen = [(NAMES[pair["chosen"]], NAMES[pair["rejected"]], pair["stage"]) for pair in pairs]
    sides = [(row["left"], row["right"], row["stage"]) for row in rows[:3]]
    flipped = [(right, left, stage) for left, right, stage in sides]
    assert chosen == [sides[0], flipped[1], sides[2]] and [pair["reason"] for pair in pairs] == ["human", "human", "tie"]
    assert f"3 of {len(rows)} lines" in capsys.readouterr().out
    assert all(pair["cost_chosen"] == pair["cost_rejected"] == 0 for pair in pairs)  # else a tie would train towards the costlier side


def test_training_follows_the_person_and_not_the_rules(exported, export, tpo):
    rules = {(NAMES[p["chosen"]], NAMES[p["rejected"]], p["stage"]) for p in sta_tpo.build_stage_pairs(ROLLOUTS, K, 0.1, 6)}
    against = ["left" if (row["right"], row["left"], row["stage"]) in rules else "right" for row in rows_of(exported)]
    fill(exported, against)
    run = tpo("--resume", "--preferences", exported / "pairs.jsonl", "--num-epochs", 8, "--learning-rate", 1e-3, "--cost-coef", 0, output=export[0])
    curves = scalars(run)
    assert curves["rewards/margins"][0] == pytest.approx(0, abs=1e-5) and curves["rewards/margins"][-1] > 0.5 and curves["rewards/accuracies"][-1] > 0.9


def test_a_tie_moves_nothing_where_both_are_as_likely(exported, export, tpo):
    untied = min(scalars(tpo("--batch-size", 1, "--learning-rate", 1e-8, "--cost-coef", 0))["losses/grad_norm"])
    fill(exported, ["tie"] * 99)
    run = shutil.copytree(export[0], exported / "run", ignore=shutil.ignore_patterns("checkpoint*", "events*"))  # others train in it
    tpo("--resume", "--preferences", exported / "pairs.jsonl", "--batch-size", 1, "--learning-rate", 1e-8, output=run)
    curves = scalars(run)
    assert len(curves["losses/tpo_loss"]) > 2 and curves["losses/tpo_loss"] == pytest.approx([math.log(2)] * len(curves["losses/tpo_loss"]), abs=1e-3)
    assert max(curves["losses/grad_norm"]) < 0.01 * untied  # a pair in either order would move the policy wherever the two fall into different batches


def test_the_loss_of_a_tie_is_the_mean_of_either_orders(exported, export, tpo):
    lines = [json.dumps({**rows_of(exported)[0], "preferred": verdict}) for verdict in ("left", "tie")]
    (exported / "pairs.jsonl").write_text("\n".join(lines))
    run = shutil.copytree(export[0], exported / "run", ignore=shutil.ignore_patterns("checkpoint*", "events*"))  # others train in it
    tpo("--resume", "--preferences", exported / "pairs.jsonl", "--num-epochs", 6, "--learning-rate", 1e-4, output=run)
    curves = scalars(run)
    won, lost = (np.logaddexp(0, sign * np.array(curves["rewards/margins"])) for sign in (-1, 1))
    assert np.abs(curves["rewards/margins"]).max() > 0.3 and curves["losses/tpo_loss"] == pytest.approx((won + (won + lost) / 2) / 2, abs=1e-5)


def test_roll_outs_of_another_task_are_refused(export, tpo):
    with pytest.raises(UserError, match="begun with --env-id = PickCube-v1, not PushCube-v1"):
        tpo("--resume", "--env-id", "PushCube-v1", output=export[0])


@pytest.mark.parametrize(
    ("words", "change"),
    [("line 2 cannot be read", lambda row: "{"), ("line 2 cannot be read", lambda row: json.dumps(7)),
     ("line 2 cannot be read", lambda row: json.dumps({**row, "left": "../../etc/passwd"})),
     ("line 2 cannot be read", lambda row: json.dumps({**row, "stage": 9})),
     ("line 2 cannot be read", lambda row: json.dumps({**row, "stage": "reach"})),
     ("line 2 cannot be read", lambda row: json.dumps({**row, "stage": float("inf")})),
     ("line 2 cannot be read", lambda row: json.dumps({**row, "stage": 10**30})),
     ("line 2 is not a pair of this run", lambda row: json.dumps({**row, "right": row["left"], "right_steps": row["left_steps"]})),
     ("line 2 is not a pair of this run", lambda row: json.dumps({**row, "left_steps": [0, 99]})),
     ("line 2: \"preferred\" is 'lleft'", lambda row: json.dumps({**row, "preferred": "lleft"}))],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named_by_number(words, change, exported):
    rows = fill(exported, ["left"] * 99)
    lines = (exported / "pairs.jsonl").read_text().splitlines()
    (exported / "pairs.jsonl").write_text("\n".join([lines[0], change(rows[1]), *lines[2:]]))
    with pytest.raises(UserError) as error:
        read(exported)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_without_verdicts_or_of_another_kind(exported, tpo, tmp_path):
    with pytest.raises(UserError, match="no verdict yet"):
        read(exported)
    with pytest.raises(UserError, match="is not an empty folder"):
        tpo("--export-pairs", exported)
    flags = (["--resume", "--preferences", tmp_path / "nowhere.jsonl"], ["--preferences", exported / "pairs.jsonl"],
             ["--resume", "--preferences", exported / "pairs.jsonl", "--export-pairs", tmp_path / "other"])  # fmt: skip
    for wrong in flags:
        with pytest.raises(UserError, match="it goes with --resume, without --export-pairs"):
            tpo(*wrong)
    (exported / "pair_0000.mp4").rename(exported / "pairs.jsonl")
    with pytest.raises(UserError, match="line 1 cannot be read"):
        read(exported)


def test_other_pairs_are_not_trained_on_top_of_a_finished_run(tpo):
    run = tpo("--num-epochs", 1)
    with pytest.raises(UserError, match="was trained on other pairs"):
        tpo("--resume", "--max-pairs-per-stage", 2, output=run)
    with pytest.raises(UserError, match="begun with --env-id = PickCube-v1, not PushCube-v1"):
        tpo("--resume", "--env-id", "PushCube-v1", output=run)


def test_a_bfloat16_policy_starts_at_ln_2_too(tpo, monkeypatch):
    """Without LoRA it is trained in float32, and so must its reference be."""
    load_policy = sta_tpo.load_policy

    def load(*args):
        model, *rest = load_policy(*args)
        return model.bfloat16(), *rest

    monkeypatch.setattr(sta_tpo, "load_policy", load)
    curves = scalars(tpo("--num-epochs", 1, "--cost-coef", 0))
    assert curves["losses/tpo_loss"][0] == pytest.approx(math.log(2), abs=1e-6) and curves["rewards/margins"][0] == pytest.approx(0, abs=1e-5)


def test_without_distances_the_pairs_kept_are_of_as_many_rollouts_as_can_be():
    rollouts = [{"init_seed": 0, "stage": torch.zeros(3, dtype=torch.long), "distance": torch.zeros(3), "success": i % 2 == 0} for i in range(8)]
    pairs = sta_tpo.build_stage_pairs(rollouts, 1, max_pairs_per_stage=4)
    assert sorted(i for pair in pairs for i in (pair["chosen"], pair["rejected"])) == list(range(8))


def test_pairs_of_the_learned_separator_know_no_distance(tpo, monkeypatch):
    """Its segments replace the rules', whose labels and distances are not read."""
    seen = {}

    def build(rollouts, *args):
        seen["rollouts"] = rollouts
        return pairs_of(rollouts, *args)

    def centred(*args):
        """An untrained separator sees one stage everywhere; without the features' mean it sees several."""
        folder, separator = load_separator(*args)
        model, processor, _ = sta_tpo.load_policy(folder, torch.device("cpu"))
        with torch.no_grad():
            hidden = [model(**prompt(processor, rollout), logits_to_keep=1).last_hidden_state[:, -1] for rollout in ROLLOUTS]
            separator.weight *= 50
            separator.bias.copy_(-separator.weight @ torch.cat(hidden).mean(0))
        return folder, separator

    pairs_of, load_separator = sta_tpo.build_stage_pairs, vla.load_separator
    monkeypatch.setattr(sta_tpo, "build_stage_pairs", build)
    monkeypatch.setattr(vla, "load_separator", centred)
    for rollout in ROLLOUTS:
        monkeypatch.setitem(rollout, "stage", rollout["stage"].clone())
        monkeypatch.setitem(rollout, "distance", rollout["distance"].clone())
    run = tpo("--stage-source", "learned")
    folder, separator = vla.load_separator(Path((run / "source.txt").read_text().split()[0]), "PickCube-v1", torch.device("cpu"))
    model, processor, _ = sta_tpo.load_policy(folder, torch.device("cpu"))
    with torch.no_grad():
        for rollout in seen["rollouts"]:
            hidden = model(**prompt(processor, rollout), logits_to_keep=1).last_hidden_state[:, -1]
            assert torch.equal(rollout["stage"], decode_stages((separator(hidden)).log_softmax(-1)))
    assert len(torch.cat([rollout["stage"] for rollout in seen["rollouts"]]).unique()) > 1
    assert all((r["distance"] == 0).all() and (r["stage"].diff() >= 0).all() for r in seen["rollouts"])
    assert {pair["reason"] for pair in pairs_of(seen["rollouts"], K)} == {"completed"}
    assert not [key for key in scalars(run) if key.endswith("_cost")]


PPO = {"losses/first_ratio": 1.0, "losses/rollout_update_logprob_gap": 1e-5, "losses/entropy": 10.0, "charts/success_once": 0.5, "charts/shaped_return": 0.4}


@pytest.mark.parametrize(
    ("cause", "now"),
    [("ratio", {"losses/first_ratio": 1.03}), ("ratio", {"losses/rollout_update_logprob_gap": 0.2}), ("entropy", {"losses/entropy": 2.0}),
     ("instead of the task", {"charts/success_once": 0.2, "charts/shaped_return": 0.6}), ("learning-rate", {"charts/success_once": 0.2}),
     ("", {}), ("", {"charts/shaped_return": 0.9, "charts/success_once": 0.9}), ("", {"losses/entropy": 5.0})],
)  # fmt: skip
def test_what_is_wrong_with_a_ppo_run_is_named(cause, now):
    lines = sta_ppo.ppo_symptoms(PPO, {**PPO, **now}, 0.25)
    assert len(lines) == bool(cause) and all(cause in line and "\n" not in line for line in lines)
    plain = sta_ppo.ppo_symptoms(PPO, {**PPO, **now}, 0.0)  # without a stage reward it is not the stage reward
    assert [line for line in plain if "task" in line] == [] and len(plain) == len(lines)


@pytest.mark.parametrize(("wrong", "chosen_shift", "margin"), [(True, -2.0, 2.0), (False, 1.0, 2.0), (False, -2.0, -1.0)])
def test_a_margin_that_grows_while_the_chosen_fall_is_named(wrong, chosen_shift, margin):
    lines = sta_tpo.tpo_symptoms(chosen_shift, margin)
    assert len(lines) == wrong and all("logps/chosen" in line for line in lines)


def test_a_run_prints_a_warning_once(tpo, capsys):
    tpo("--learning-rate", 0.03, "--num-epochs", 6, "--batch-size", 8)
    assert capsys.readouterr().out.count("warning: ") == 1


def test_a_pair_of_two_initial_states_is_refused(tmp_path):
    row = {"stage": 0, "left": "c", "right": "h", "left_steps": [0, 2], "right_steps": [0, 3], "preferred": "left"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="not a pair of this run"):
        sta_tpo.read_preferences(tmp_path / "pairs.jsonl", invent_rollouts([11, 22]), list("abcdefgh"), K, True)


def test_the_printed_table_counts_pairs_by_reason(capsys):
    rollouts, reasons = invent_rollouts([11]), ("cost", "cost", "completed", "tie")
    pairs = [{"stage": 1, "chosen": 2, "rejected": 3, "reason": reason} for reason in reasons] + [{"stage": 1, "chosen": 3, "rejected": 2, "reason": "cost"}]
    sta_tpo.print_pairs(pairs, rollouts, TASK.stages)
    lines, gap = capsys.readouterr().out.splitlines(), abs(rollouts[2]["distance"][3] - rollouts[3]["distance"][4])
    steps = [len(sta_tpo.segment_rows(rollouts[i], 1, K, True)) for i in (2, 3)]
    assert steps[0] != steps[1] and lines[0] == "4 roll-outs, 0.500 successful, 37 env steps"
    slower = "67" if steps[0] > steps[1] else "33"
    assert lines[3].split() == ["grasp", "5", "1", "3", slower, "%", "1", f"{gap:.2f}"] and lines[2].split()[1:] == ["0", "0", "0", "-", "0", "0.00"]


@pytest.mark.parametrize("slower", [5, 6])
def test_who_lingers_and_wins_is_named(slower, capsys):
    rollouts = invent_rollouts([11])
    slow, quick = sorted((2, 3), key=lambda i: -len(sta_tpo.segment_rows(rollouts[i], 1, K, True)))
    pairs = [{"stage": 1, "chosen": slow, "rejected": quick, "reason": "cost"}] * slower
    sta_tpo.print_pairs(pairs + [{"stage": 1, "chosen": quick, "rejected": slow, "reason": "cost"}] * 5, rollouts, TASK.stages)
    assert capsys.readouterr().out.count("warning: in grasp most winners by cost are the slower") == (slower > 5)
