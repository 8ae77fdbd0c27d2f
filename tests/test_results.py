"""Figures are those of the rows in docs/*.jsonl: tables and plot are what benchmark/paper_table.py and mechanism.py make of them; some follow by hand."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import mechanism
import paper_table


def rows(*successes, env_id="PickCube-v1"):
    """One row per training seed, of its episodes' successes."""
    rest = {"env_id": env_id, "env_steps": 0, "wall_s": 0.0, "success_at_end": 0.0, "stage_reach_rate": [0.0] * 4}
    return [{**rest, "seed": seed, "successes": once, "success_once": once.count("1") / len(once)} for seed, once in enumerate(successes, 1)]


def test_the_pages_hold_what_the_rows_say(tmp_path, monkeypatch):
    """Else: python benchmark/paper_table.py, or mechanism.py"""
    pages = ("README.md", "docs/results.md", "docs/tables.md", "docs/results.jsonl", "docs/mechanism.jsonl")
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    for script in (paper_table, mechanism):
        monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
        script.main([])
    assert [page for page in pages if (tmp_path / page).read_bytes() != (ROOT / page).read_bytes()] == []
    for picture in ("results", "summary"):  # coordinates may differ in a last digit
        drawn, shipped = ((root / f"docs/{picture}.svg").read_text().count("<use ") for root in (tmp_path, ROOT))
        assert drawn == shipped > 0


SECTIONS = ("In short", "Lambda and the reward", "The preference step", "Preferences with", "All three steps", "PlaceSphere-v1, where", "SimplerEnv's three")


@pytest.mark.parametrize(("page", "start"), [("README.md", "## What the stages add, and"), *(("docs/results.md", f"\n## {start}") for start in SECTIONS)])
def test_figures_of_the_summaries_stand_in_the_tables(page, start):
    summary = (ROOT / page).read_text().split(start)[1].split("\n## ")[0]
    tables = (ROOT / "docs/tables.md").read_text()
    figures = re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]|[\d.]+ ± [\d.]+\b", summary)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in tables] == []


def test_a_paired_difference_adds_the_spread_of_seeds_and_of_episodes():
    sft, ppo = rows("0101"), rows("1101", "1111")
    # ppo - sft, by seed: 1 0 0 0 and 1 0 1 0; means of the seeds 0.25, 0.5, of the episodes 1, 0, 0.5, 0
    seeds, episodes = 0.03125 / 2, 0.229166667 / 4
    freedom = (seeds + episodes) ** 2 / (seeds**2 / 1 + episodes**2 / 3)  # Welch-Satterthwaite: 3.99
    half = 100 * stats.t.ppf(0.975, freedom) * np.sqrt(seeds + episodes)  # a printed table has 2.776 for four
    assert paper_table.difference(sft, ppo) == f"+37.5 [{37.5 - half:+.1f}, {37.5 + half:+.1f}]"
    assert paper_table.difference(sft, ppo[:1]) == "+25.0, one training seed"


def test_where_the_seeds_are_all_the_spread_three_have_two_degrees_of_freedom():
    """Student's t with two degrees of freedom: 4.303"""
    sft, all_or_none = rows("0" * 40), rows("0" * 40, "1" * 40, "1" * 40)
    assert paper_table.difference(sft, all_or_none) == f"+66.7 [{200 / 3 - 4.3027 * 100 / 3:+.1f}, {200 / 3 + 4.3027 * 100 / 3:+.1f}]"
    assert paper_table.difference(sft, rows("1" * 40, "1" * 40)) == "+100.0, all alike"


@pytest.mark.parametrize("spread", [0.1, 1.0])  # between the training seeds, in logits, beside 1.5 between the episodes
def test_the_interval_holds_the_truth_as_often_as_it_says(spread):
    """Two methods that are equally good, three training seeds each. With 1.96 in place of Student's t it would be 83 % at the larger spread."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        episodes, seeds = rng.normal(0.5, 1.5, 100), rng.normal(0, spread, (2, 3, 1))
        outcomes = rng.random((2, 3, 100)) < 1 / (1 + np.exp(-episodes - seeds))
        a, b = (rows(*("".join(map(str, once)) for once in method)) for method in outcomes.astype(int))
        low, high = map(float, re.findall(r"[+-][\d.]+(?=[,\]])", paper_table.difference(a, b)))
        held += low <= 0 <= high
    assert held / 500 > 0.9


def test_the_overview_keeps_budgets_apart_and_gives_no_mean_of_an_incomplete_group():
    grids = [env_id for env_id in paper_table.TASKS if paper_table.TASKS[env_id].grid]
    tasks = {env_id + ", turned": {"IPI": rows("1100", env_id=env_id)} for env_id in grids if "Eggplant" not in env_id}
    tasks |= {"PickCube-v1": {"SFT": rows("10"), "PPO": rows("1110", "1100")}, "PickCube-v1, long": {"PPO": rows("10", "11", "11")}}
    lines = {(cells := line.strip("| ").split(" | "))[0]: dict(zip(paper_table.SHOWN, cells[1:])) for line in paper_table.overview(tasks).splitlines()[2:]}
    assert lines["PickCube-v1"]["SFT"] == "50.0 (1 seed)" and lines["PickCube-v1"]["PPO"] == "62.5 ± 17.7 (2 seeds)"
    assert lines["PickCube-v1, long"]["PPO"] == "83.3 ± 28.9" and lines["PickCube-v1, long"]["SFT"] == "not run"
    assert lines["SimplerEnv mean without PutEggplant, turned"]["IPI"] == "50.0 (1 seed)"
    assert set(lines["SimplerEnv mean"].values()) == set(lines["ManiSkill3 mean"].values()) == {"not run"} and "SimplerEnv mean, turned" not in lines


def test_budgets_of_one_imitation_are_compared_over_the_seeds_that_both_have():
    methods, budgets = {"SFT": rows("0101"), "PPO": rows("1101", "1111")}, {"lambda-1": {"PPO": rows("0001", "0011", "1111"), "STA-PPO": rows("1111", "1111")}}
    lines = paper_table.table("PickCube-v1", methods, budgets).splitlines()
    difference = paper_table.difference(methods["PPO"], budgets["lambda-1"]["PPO"][:2])
    assert difference.startswith("-50.0 ") and f"| PPO, lambda-1 - PPO | {difference}, 2 seeds |" in lines
    assert f"| STA-PPO, lambda-1 - PPO | {paper_table.difference(methods['PPO'], budgets['lambda-1']['STA-PPO'])} |" in lines
    assert len([line for line in lines if "lambda-1" in line]) == 2


def test_tasks_taken_as_one_hold_the_methods_and_seeds_that_all_have():
    tasks = {"carrot": {"PPO": rows("10", "11"), "IPI": rows("11")}, "spoon": {"PPO": rows("00", "01", "11")}}
    assert paper_table.together(tasks, ["carrot", "spoon"]) == {"PPO": [{"seed": 1, "successes": "1000"}, {"seed": 2, "successes": "1101"}]}
    assert paper_table.together(tasks, ["carrot", "not run"]) == {}


def test_a_stage_row_by_hand():
    """Two stages; two roll-outs finish the first after 3 and after 1 steps, the quicker one fails, a third never gets through."""
    roll = lambda stage, distance, success: {"stage": torch.tensor(stage), "distance": torch.tensor(distance), "success": success, "init_seed": 0}  # noqa: E731
    rollouts = [roll([0, 0, 0, 1], [0.2, 0.2, 0.2, 0.5], True), roll([0, 1, 1, 1], [0.5, 0.9, 0.9, 0.9], False), roll([0, 0, 0, 0], [0.7] * 4, False)]
    reach, place = (mechanism.stage_row(k, 2, [(rollouts, mechanism.build_stage_pairs(rollouts, 2))]) for k in range(2))
    assert reach["rollouts"] == 3 and place["rollouts"] == 2
    # reach: the first roll-out wins by completion against the third, as the second does, and by cost, slower, against the second (0.2 < 0.5 a step)
    assert [reach[key] for key in ("completed", "cost", "won", "lost", "slower")] == [2, 1, 3, 1, 1]
    assert reach["corr_mean"] == round(np.corrcoef([0.2, 0.5, 0.7], [1, 0, 0])[0, 1], 3) and reach["corr_sum"] == round(
        np.corrcoef([0.6, 0.5, 2.8], [1, 0, 0])[0, 1], 3)  # fmt: skip
    assert reach["bare"] == reach["offset"] == [None, None]  # nobody enters it, all begin there
    # place: phi = sigmoid(1 - d) / sigmoid(1) falls from d = 0.2 to 0.5 and from 0.5 to 0.9, k + phi rises
    phi = (1 + np.exp(-1)) / (1 + np.exp(np.array([[0.2, 0.5], [0.5, 0.9]]) - 1))
    falls = np.mean(phi[:, 1] - phi[:, 0])
    assert np.allclose(place["bare"], [1, falls], atol=1e-3) and np.allclose(place["offset"], [0, 1 + falls], atol=1e-3)


def test_of_two_rows_of_one_run_the_newer_one_counts(tmp_path):
    file = tmp_path / "rows.jsonl"
    paper_table.merge(file, [{"seed": 2, "x": 0}, {"seed": 1, "x": 0}], "seed")
    merged = paper_table.merge(file, [{"seed": 1, "x": 1}], "seed")
    assert merged == [{"seed": 1, "x": 1}, {"seed": 2, "x": 0}] == [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_counts_the_env_steps_of_the_policies_before_it_and_orders_its_episodes(tmp_path):
    for name, steps, before in (("ppo", 50, "tpo"), ("tpo", 30, "none")):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint/args.json").write_text(json.dumps({"env_steps": steps, "checkpoint": str(tmp_path / before)}))
    (tmp_path / "ppo/results.json").write_text(json.dumps({"episodes": [{"seed": 2, "success_once": True}, {"seed": 1, "success_once": False}]}))
    halves = ("charts/success_once", "losses/explained_variance", "losses/advantage_std", "stage/0_reached")
    tags = {**dict.fromkeys(halves, 0.5), "time/rollout": 3, "time/update": 1}
    with SummaryWriter(tmp_path / "ppo") as writer:
        for step in (10, 20):
            for tag, value in tags.items():
                writer.add_scalar(tag, value, step)
    row = paper_table.row_of(tmp_path / "ppo")
    assert row["env_steps"] == 80 and row["successes"] == "01" and [point[:2] for point in row["curve"]] == [[10, 4.0], [20, 8.0]]


@pytest.mark.parametrize(("states", "shared"), [(16, {"SFT", "TPO", "STA-TPO", "STA-TPO-sum"}), (64, {"SFT"})])
def test_which_runs_a_budget_takes_from_its_imitations(states, shared):
    line = next(line for line in (ROOT / "benchmark/paper_table.sh").read_text().splitlines() if line.startswith("budget()"))
    methods = ["SFT", "TPO", "STA-TPO", "STA-TPO-sum", "SFT-TPO-PPO", "PPO", "STA-PPO", "IPI", "IPI-sum"]
    script = f"STATES={states} NAME=own IMITATION=paper; {line}; for m in {' '.join(methods)}; do budget $m; done"
    budgets = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {method for method, budget in zip(methods, budgets, strict=True) if budget == "paper"} == shared
