"""The docs say what the scripts do: metrics are listed both ways, links point at the lines that they quote, every flag of a command exists."""
import re
import sys

import pytest
from conftest import ROOT, scalars

sys.path.insert(0, str(ROOT / "benchmark"))
import links

import sft
import sta_ppo
import sta_tpo

PAGES = sorted((ROOT / "docs").glob("*.md"))


def documented(column: int) -> set[str]:
    """Keys of docs/metrics.md that have an x in this column."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {key for cells in rows if cells[column].strip() == "x" for key in re.findall("`(.*?)`", cells[0])}


@pytest.mark.parametrize(("column", "script"), [(1, "sft_run"), (2, "tpo_run"), (3, "ppo_run")])
def test_logged_metrics_are_the_documented_ones(column, script, request):
    run = request.getfixturevalue(script)
    logged = {re.sub(r"^stage/\d_[a-z]+_", "stage/{k}_{name}_", key) for key in scalars(run)}
    evaluated = {key for key in documented(column) if key.startswith("eval/")} | {"time/eval"}
    assert documented(column) >= evaluated  # the same lines of all three scripts log them; only the last run of the chain is evaluated
    assert logged == (documented(column) if script == "ppo_run" else documented(column) - evaluated)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_at_the_lines_that_they_quote(page):
    """Else: python benchmark/links.py"""
    assert links.relinked(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_flags_in_the_docs_exist(page):
    scripts = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo}
    for name, line in re.findall(r"python (sft|sta_tpo|sta_ppo)\.py([^`\n#]*)", page.read_text()):
        for flag in re.findall(r"--([a-z-]+)", line):
            field = flag.removeprefix("no-").replace("-", "_")
            assert field in scripts[name].Args.__dataclass_fields__, f"{name}.py --{flag}"
