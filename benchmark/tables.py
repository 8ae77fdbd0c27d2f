"""Tables of docs/tasks.md and docs/sft.md from rows, nothing typed by hand.

python benchmark/tables.py
    writes the tables again between their markers, from docs/{expert,sft,separator}.jsonl
python benchmark/tables.py runs/*__200
    first adds the results of these runs to docs/sft.jsonl
"""

import json
import os
import sys
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
from plumbing.report import wilson

DOCS = Path(__file__).parent.parent / "docs"


def lines_of(name: str) -> list[dict]:
    """All rows of docs/NAME.jsonl."""
    return [json.loads(line) for line in (DOCS / f"{name}.jsonl").read_text().splitlines()]


def rows(name: str) -> list[dict]:
    """Rows of docs/NAME.jsonl. Of two rows about the same thing the later one counts."""
    found = {}
    for row in lines_of(name):
        words = tuple(row.get("instructions", ()))
        found[row["env_id"], row.get("seed"), row["ood"], words, row["method"]] = row
    return list(found.values())


def percent(share: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f} %"


def success(row: dict) -> str:
    """success_once in percent with its 95 % interval."""
    num_episodes = row["num_episodes"]
    low, high = wilson(row["success_once"] * num_episodes, num_episodes)
    return f"{percent(row['success_once'])} [{100 * low:.1f}, {100 * high:.1f}]"


def table(header: str, lines: list[list]) -> str:
    """A Markdown table. header: its first line. lines: the cells of each other line."""
    columns = header.count("|") - 1
    text = [header, "|" + "---|" * columns]
    text += ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join(text)


def expert() -> str:
    """The scripted expert per task."""
    lines = []
    for row in rows("expert"):
        if row["ood"] != "none":
            continue
        length = f"{row['mean_length']} ({row['max_episode_steps']})"
        entry = ", ".join(f"{name} {d}" for name, d in row["entry_distance"].items())
        lines.append([row["env_id"], success(row), row["num_episodes"], length, entry])
    header = "| env id | success_once [95 %] | episodes | mean steps (horizon) |"
    return table(f"{header} median d at entry |", lines)


def sft() -> str:
    """Imitation per task."""
    lines = []
    for row in rows("sft"):
        if row["ood"] != "none" or row["instructions"]:
            continue
        cells = [
            row["env_id"],
            success(row),
            percent(row["success_at_end"]),
            row["num_episodes"],
            ", ".join(percent(rate, 0) for rate in row["stage_reach_rate"]),
            f"{row['wall_s']:.0f}",
        ]
        lines.append(cells)
    header = "| env id | success_once [95 %] | at the end | episodes |"
    return table(f"{header} stages completed | training s |", lines)


def ood() -> str:
    """Policies and the expert out of distribution."""
    found = {}
    for row in rows("sft") + rows("expert"):
        kind = "other words" if row.get("instructions") else row["ood"]
        found.setdefault((row["env_id"], row["method"]), {})[kind] = success(row)
    kinds = ("none", "position", "camera", "lighting", "other words")
    lines = []
    for (env_id, method), cells in found.items():
        if len(cells) > 1:
            lines.append([env_id, method, *(cells.get(kind, "") for kind in kinds)])
    header = "| env id | policy | as trained | position | camera | lighting | other words |"
    return table(header, lines)


def separator() -> str:
    """The learned separator against the rules."""
    lines = []
    for row in lines_of("separator"):
        read = row["separator"]
        cells = [
            row["env_id"],
            success(row),
            percent(read["causal_accuracy"]),
            percent(read["viterbi_accuracy"]),
            f"{read['boundary_error']:.2f}",
            percent(read["boundary_missed"]),
            read["num_steps"],
        ]
        lines.append(cells)
    header = "| env id | success_once [95 %] | causal | Viterbi |"
    text = table(f"{header} boundary error, steps | boundaries missed | steps |", lines)
    caption = "`benchmark/separator.sh`: 40 greedy episodes of one SFT policy per task."
    return f"{text}\n\n{caption}"


def add_results(runs: list[str]) -> None:
    """Adds the results of runs to docs/sft.jsonl, without their episodes."""
    files = [file for run in runs for file in Path(run).glob("results*.json")]
    with open(DOCS / "sft.jsonl", "a") as output:
        for file in sorted(files):
            row = json.loads(file.read_text())
            row.pop("episodes")
            output.write(json.dumps(row) + "\n")


def write(page: Path, mark: str, text: str) -> None:
    """Puts a text between a page's two marks."""
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- /{mark} -->")[2]
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{after}")


def main(runs: list[str]) -> None:
    add_results(runs)
    write(DOCS / "tasks.md", "expert", expert())
    write(DOCS / "tasks.md", "sft", sft())
    write(DOCS / "tasks.md", "ood", ood())
    write(DOCS / "sft.md", "separator", separator())


if __name__ == "__main__":
    main(sys.argv[1:])
