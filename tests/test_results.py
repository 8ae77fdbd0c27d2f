"""The pages say what the rows in docs/*.jsonl say, and the figures follow from rows by hand."""

import json
import os
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

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def rows(*successes, env_id="PickCube-v1"):
    """One row per training seed, from its episodes' successes."""
    found = []
    for seed, once in enumerate(successes, 1):
        row = {
            "env_id": env_id,
            "seed": seed,
            "successes": once,
            "success_once": once.count("1") / len(once),
            "success_at_end": 0.0,
            "stage_reach_rate": [0.0] * 4,
            "env_steps": 0,
            "wall_s": 0.0,
        }
        found.append(row)
    return found


def cells_of(markdown):
    """A table's cells by row and column."""
    table = []
    for line in markdown.splitlines():
        table.append([cell.strip(" *") for cell in line.split("|")[1:-1]])
    columns = table[0][1:]
    return {line[0]: dict(zip(columns, line[1:], strict=True)) for line in table[2:]}


# ---- the pages ----


def test_the_pages_hold_what_the_rows_say(tmp_path, monkeypatch):
    """If it fails: python benchmark/paper_table.py, and benchmark/mechanism.py."""
    pages = ["README.md", "docs/results.md", "docs/tables.md"]
    pages += ["docs/results.jsonl", "docs/mechanism.jsonl"]
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    for script in (paper_table, mechanism):
        monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
        script.main([])
    for page in pages:
        assert (tmp_path / page).read_bytes() == (ROOT / page).read_bytes(), page
    # Coordinates may differ in the last digit, so the marks are counted.
    for picture in ("docs/results.svg", "docs/summary.svg"):
        drawn = (tmp_path / picture).read_text().count("<use ")
        shipped = (ROOT / picture).read_text().count("<use ")
        assert drawn == shipped > 0


@pytest.mark.parametrize(("page", "least"), [(README, 5), (RESULTS, 40)], ids=["README", "results"])
def test_intervals_and_deviations_stand_in_the_tables(page, least):
    tables = (ROOT / "docs/tables.md").read_text()
    figures = re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]|[\d.]+ ± [\d.]+\b", page)
    assert len(figures) >= least
    assert [figure for figure in figures if figure not in tables] == []


def test_every_number_in_brackets_is_such_an_interval():
    """Otherwise the test above would not see it."""
    for page in (README, RESULTS):
        brackets = re.findall(r"\[[+-]?[\d.]+, ?[+-]?[\d.]+\]", page)
        seen = re.findall(r"[+-][\d.]+ (\[[+-][\d.]+, [+-][\d.]+\])", page)
        assert brackets == seen


@pytest.mark.parametrize(("page", "most"), [(README, 600), (RESULTS, 1500)])
def test_pages_are_short(page, most):
    assert len(page.split()) <= most


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "results"])
def test_the_front_table_has_no_empty_cell(page):
    """A cell is a success rate and the number of its training seeds."""
    table = cells_of(page.split("<!-- table -->\n")[1].split("\n<!-- /table -->")[0])
    assert len(table) >= 7
    for row in table.values():
        assert list(row) == list(paper_table.FRONT)
        for cell in row.values():
            assert re.fullmatch(r"[\d.]+( ± [\d.]+)? \(\d\)", cell)


# ---- tables ----


def front_tasks():
    """Every method of README's table on SimplerEnv's three tasks, two seeds of PPO."""
    tasks = {}
    for env_id in paper_table.THREE:
        methods = {method: rows("1100", env_id=env_id) for method in paper_table.FRONT.values()}
        methods["PPO"] = rows("1100", "1110", env_id=env_id)
        tasks[f"{env_id}, clean-fast"] = methods
    return tasks


def test_the_front_table_shows_seeds_and_the_mean_of_a_whole_group():
    table = cells_of(paper_table.front(front_tasks(), spread=False))
    assert list(table) == [*paper_table.THREE, "SimplerEnv, mean"]
    assert table[paper_table.THREE[0]]["PPO"] == "62.5 (2)"
    assert table["SimplerEnv, mean"] == {
        "SFT": "50.0 (1)",
        "STA-TPO": "50.0 (1)",
        "PPO": "62.5 (2)",
        "STA-PPO": "50.0 (1)",
        "IPI": "50.0 (1)",
    }
    table = cells_of(paper_table.front(front_tasks(), spread=True))
    assert table[paper_table.THREE[0]]["PPO"] == "62.5 ± 17.7 (2)"


def test_a_task_without_one_of_the_methods_has_no_row_and_its_group_no_mean():
    tasks = front_tasks()
    del tasks[f"{paper_table.THREE[1]}, clean-fast"]["STA-PPO"]
    table = cells_of(paper_table.front(tasks, spread=False))
    assert list(table) == [paper_table.THREE[0], paper_table.THREE[2]]


def test_the_overview_keeps_budgets_apart_and_gives_no_mean_of_an_incomplete_group():
    tasks = {
        "PickCube-v1": {"SFT": rows("10"), "PPO": rows("1110", "1100")},
        "PickCube-v1, long": {"PPO": rows("10", "11", "11")},
    }
    for env_id in paper_table.THREE:
        tasks[f"{env_id}, turned"] = {"IPI": rows("1100", env_id=env_id)}
    lines = cells_of(paper_table.overview(tasks))
    assert lines["PickCube-v1"]["SFT"] == "50.0 (1 seed)"
    assert lines["PickCube-v1"]["PPO"] == "62.5 ± 17.7 (2 seeds)"
    assert lines["PickCube-v1, long"]["PPO"] == "83.3 ± 28.9"
    assert lines["PickCube-v1, long"]["SFT"] == "not run"
    assert lines["SimplerEnv mean without PutEggplant, turned"]["IPI"] == "50.0 (1 seed)"
    assert set(lines["SimplerEnv mean"].values()) == {"not run"}
    assert set(lines["ManiSkill3 mean"].values()) == {"not run"}
    assert "SimplerEnv mean, turned" not in lines


def test_budgets_of_one_imitation_are_compared_over_the_seeds_that_both_have():
    methods = {"SFT": rows("0101"), "PPO": rows("1101", "1111")}
    other = {"PPO": rows("0001", "0011", "1111"), "STA-PPO": rows("1111", "1111")}
    lines = paper_table.table("PickCube-v1", methods, {"lambda-1": other}).splitlines()
    ppo = paper_table.difference(methods["PPO"], other["PPO"][:2])
    assert ppo.startswith("-50.0 ")
    assert f"| PPO, lambda-1 - PPO | {ppo}, 2 seeds |" in lines
    sta_ppo = paper_table.difference(methods["PPO"], other["STA-PPO"])
    assert f"| STA-PPO, lambda-1 - PPO | {sta_ppo} |" in lines
    assert len([line for line in lines if "lambda-1" in line]) == 2


def test_a_budget_takes_the_imitation_that_it_begins_with():
    tasks = {
        "PickCube-v1": {"SFT": rows("10"), "STA-TPO": rows("11"), "PPO": rows("01")},
        "PickCube-v1, lambda-0.5": {"PPO": rows("00")},
        "PickCube-v1, wide": {"STA-TPO": rows("01")},
    }
    same = paper_table.share_imitations(tasks)
    assert same["PickCube-v1"].keys() == {"lambda-0.5", "wide"}
    assert tasks["PickCube-v1, lambda-0.5"] == {
        "SFT": rows("10"),
        "STA-TPO": rows("11"),
        "PPO": rows("00"),
    }
    # Its own preference step has more roll-outs.
    assert tasks["PickCube-v1, wide"] == {"SFT": rows("10"), "STA-TPO": rows("01")}


def test_tasks_taken_as_one_hold_the_methods_and_seeds_that_all_have():
    tasks = {
        "carrot": {"PPO": rows("10", "11"), "IPI": rows("11")},
        "spoon": {"PPO": rows("00", "01", "11")},
    }
    assert paper_table.together(tasks, ["carrot", "spoon"]) == {
        "PPO": [{"seed": 1, "successes": "1000"}, {"seed": 2, "successes": "1101"}]
    }
    assert paper_table.together(tasks, ["carrot", "not run"]) == {}


def test_the_figure_draws_a_shared_pair_of_rows_once():
    methods = {"SFT": rows("0101"), "STA-TPO": rows("1101", "0111")}
    tasks = {"PickCube-v1": methods, "PickCube-v1, lambda-0.5": dict(methods)}
    (line,) = paper_table.differences(tasks, [("SFT", "STA-TPO")])
    assert line[0] == "PickCube, mean cost (2)"
    assert line[1] == 25


# ---- differences ----


def test_a_paired_difference_adds_the_spread_of_seeds_and_of_episodes():
    sft = rows("0101")
    ppo = rows("1101", "1111")
    # ppo - sft is 1 0 0 0 and 1 0 1 0.
    # The means of the seeds are 0.25 and 0.5, of the episodes 1, 0, 0.5 and 0.
    seeds = 0.03125 / 2
    episodes = 0.229166667 / 4
    # Welch-Satterthwaite: 3.99
    freedom = (seeds + episodes) ** 2 / (seeds**2 / 1 + episodes**2 / 3)
    # A printed table has 2.776 for four.
    half = 100 * stats.t.ppf(0.975, freedom) * np.sqrt(seeds + episodes)
    assert paper_table.difference(sft, ppo) == f"+37.5 [{37.5 - half:+.1f}, {37.5 + half:+.1f}]"
    assert paper_table.difference(sft, ppo[:1]) == "+25.0, one training seed"


def test_three_seeds_whose_spread_is_everything_have_two_degrees_of_freedom():
    """Student's t with two degrees of freedom: 4.303."""
    sft = rows("0" * 40)
    all_or_none = rows("0" * 40, "1" * 40, "1" * 40)
    low = 200 / 3 - 4.3027 * 100 / 3
    high = 200 / 3 + 4.3027 * 100 / 3
    assert paper_table.difference(sft, all_or_none) == f"+66.7 [{low:+.1f}, {high:+.1f}]"
    assert paper_table.difference(sft, rows("1" * 40, "1" * 40)) == "+100.0, all alike"


# between the training seeds, in logits; between the episodes it is 1.5
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(spread):
    """Two equally good methods, three training seeds each.

    With 1.96 in place of Student's t the interval would hold it in 83 % at the larger spread.
    """
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        episodes = rng.normal(0.5, 1.5, 100)
        seeds = rng.normal(0, spread, (2, 3, 1))
        outcomes = rng.random((2, 3, 100)) < 1 / (1 + np.exp(-episodes - seeds))
        first, second = (
            rows(*("".join(map(str, once)) for once in method)) for method in outcomes.astype(int)
        )
        text = paper_table.difference(first, second)
        low, high = map(float, re.findall(r"[+-][\d.]+(?=[,\]])", text))
        held += low <= 0 <= high
    assert held / 500 > 0.9


# ---- rows ----


def test_of_two_rows_of_one_run_the_newer_one_counts(tmp_path):
    file = tmp_path / "rows.jsonl"
    paper_table.merge(file, [{"seed": 2, "x": 0}, {"seed": 1, "x": 0}], "seed")
    merged = paper_table.merge(file, [{"seed": 1, "x": 1}], "seed")
    assert merged == [{"seed": 1, "x": 1}, {"seed": 2, "x": 0}]
    assert merged == [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_counts_the_env_steps_of_all_policies_and_orders_its_episodes(tmp_path):
    for name, steps, before in (("ppo", 50, "tpo"), ("tpo", 30, "none")):
        args = {"env_steps": steps, "checkpoint": str(tmp_path / before)}
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint/args.json").write_text(json.dumps(args))
    episodes = [{"seed": 2, "success_once": True}, {"seed": 1, "success_once": False}]
    (tmp_path / "ppo/results.json").write_text(json.dumps({"episodes": episodes}))
    tags = {
        "charts/success_once": 0.5,
        "losses/explained_variance": 0.5,
        "losses/advantage_std": 0.5,
        "stage/0_reached": 0.5,
        "time/rollout": 3,
        "time/update": 1,
    }
    with SummaryWriter(tmp_path / "ppo") as writer:
        for step in (10, 20):
            for tag, value in tags.items():
                writer.add_scalar(tag, value, step)
    row = paper_table.row_of(tmp_path / "ppo")
    assert row["env_steps"] == 80
    assert row["successes"] == "01"
    assert row["curve"] == [[10, 4.0, *[0.5] * 4], [20, 8.0, *[0.5] * 4]]


def test_a_row_names_its_table_also_where_the_method_is_given_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_table, "DOCS", tmp_path)
    result = {"method": "STA-PPO", "env_id": "PickCube-v1", "seed": 1, "episodes": []}
    (tmp_path / "results.json").write_text(json.dumps(result))
    paper_table.read_tasks([f"{tmp_path}=IPI@flagship", f"{tmp_path}=PPO@deciding", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    tables = {row["method"]: row.get("table") for row in rows}
    assert tables == {"IPI@flagship": "flagship", "PPO@deciding": "deciding", "STA-PPO": None}


@pytest.mark.parametrize(
    ("states", "shared"), [(16, {"SFT", "TPO", "STA-TPO", "STA-TPO-sum"}), (64, {"SFT"})]
)
def test_which_runs_a_budget_takes_from_its_imitations(states, shared):
    driver = (ROOT / "benchmark/paper_table.sh").read_text()
    (function,) = re.findall(r"^budget\(\) \{\n.*?^\}", driver, re.M | re.S)
    methods = ["SFT", "TPO", "STA-TPO", "STA-TPO-sum", "SFT-TPO-PPO", "PPO", "STA-PPO", "IPI"]
    script = f"STATES={states} NAME=own IMITATION=paper\n{function}\n"
    script += f"for m in {' '.join(methods)}; do budget $m; done"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    budgets = dict(zip(methods, run.stdout.split(), strict=True))
    assert {method for method in methods if budgets[method] == "paper"} == shared


@pytest.mark.parametrize(
    ("table", "methods", "names"),
    [
        ("flagship", "STA-TPO IPI PPO", ["SFT", "STA-TPO-sum", "IPI-sum", "PPO"]),
        (
            "deciding",
            "TPO STA-PPO-shaping STA-PPO-gain",
            ["SFT", "TPO-sum", "STA-PPO", "STA-PPO-gain"],
        ),
    ],
)
def test_the_driver_names_its_rows_as_the_tables_do(tmp_path, table, methods, names):
    """-sum is the summed cost, STA-PPO is `shaping`, and NAME the budget and the folders' end."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    run = subprocess.run(
        [ROOT / "benchmark/table.sh", table, "PickCube-v1"],
        env={**os.environ, "PYTHON": str(python), "NAME": "own", "METHODS": methods, "SEEDS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"--method (\S+)", run.stdout) == [f"{name}@own" for name in names]
    assert set(names) <= set(paper_table.METHODS)
    folders = re.findall(r"--output-dir (\S+)", run.stdout)
    assert folders and all(folder.endswith("__1__own") for folder in folders)


# ---- mechanism.py ----


def test_a_stage_row_by_hand():
    """Two stages, three roll-outs.

    Two roll-outs finish the first stage, after 3 steps and after 1. The quicker one fails.
    The third never finishes it.
    """

    def roll(stage, distance, success):
        labels = torch.tensor(stage)
        return {
            "stage": labels,
            "distance": torch.tensor(distance),
            "success": success,
            "init_seed": 0,
        }

    rollouts = [
        roll([0, 0, 0, 1], [0.1, 0.1, 0.1, 0.5], True),
        roll([0, 1, 1, 1], [0.5, 0.9, 0.9, 0.9], False),
        roll([0, 0, 0, 0], [0.7] * 4, False),
    ]
    pairs = mechanism.build_stage_pairs(rollouts, 2)
    reach = mechanism.stage_row(0, 2, [(rollouts, pairs)])
    place = mechanism.stage_row(1, 2, [(rollouts, pairs)])
    assert reach["rollouts"] == 3
    assert place["rollouts"] == 2
    # Both that finish win by completion against the third.
    # The slower one wins by cost against the quicker one: 3 * 0.1 < 0.5, so sum and mean agree.
    counts = [reach[key] for key in ("completed", "cost", "won", "lost", "slower")]
    assert counts == [2, 1, 3, 1, 1]
    mean = np.corrcoef([0.1, 0.5, 0.7], [1, 0, 0])[0, 1]
    total = np.corrcoef([0.3, 0.5, 2.8], [1, 0, 0])[0, 1]
    assert reach["corr_mean"] == round(mean, 3)
    assert reach["corr_sum"] == round(total, 3)
    # All begin in reach, so nobody enters it.
    assert reach["bare"] == [None, None]
    assert reach["offset"] == [None, None]
    # In place phi = sigmoid(1 - d) / sigmoid(1) falls as d rises to 0.5 and 0.9. k + phi rises.
    distances = np.array([[0.1, 0.5], [0.5, 0.9]])
    phi = (1 + np.exp(-1)) / (1 + np.exp(distances - 1))
    change = np.mean(phi[:, 1] - phi[:, 0])
    assert np.allclose(place["bare"], [1, change], atol=1e-3)
    assert np.allclose(place["offset"], [0, 1 + change], atol=1e-3)
