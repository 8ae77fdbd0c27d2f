"""The docs say what the scripts do: metrics are listed both ways, links point at the lines that they quote, every flag of a command exists."""
import re
import sys

import pytest
from conftest import ROOT, scalars

sys.path.insert(0, str(ROOT / "benchmark"))
import links

import eval as evaluation
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
    logged = {re.sub(r"^stage/\d_[a-z]+_", "stage/{k}_{name}_", key) for key in scalars(request.getfixturevalue(script))}
    # only the last run of the chain is evaluated; what an evaluation logs is the same in all three scripts
    evaluated = {key for key in scalars(request.getfixturevalue("ppo_run")) if key.startswith("eval/")} | {"time/eval"}
    assert logged | evaluated == documented(column)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_at_the_lines_that_they_quote(page):
    """Else: python benchmark/links.py"""
    assert links.relinked(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_flags_in_the_docs_exist(page):
    scripts = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
    for name, line in re.findall(r"python (sft|sta_tpo|sta_ppo|eval)\.py([^`\n#]*)", page.read_text()):
        for flag in re.findall(r"--([a-z-]+)", line):
            if flag == "help":
                continue
            field = flag.removeprefix("no-").replace("-", "_")
            assert field in scripts[name].Args.__dataclass_fields__, f"{name}.py --{flag}"
