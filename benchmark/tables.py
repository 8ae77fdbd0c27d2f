"""Tables of docs/tasks.md and docs/sft.md from rows, nothing typed by hand.

    python benchmark/tables.py                   # writes the pages anew between their markers, from docs/{expert,sft,separator}.jsonl
    python benchmark/tables.py runs/*__200       # first appends the results of these runs to docs/sft.jsonl
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import wilson

DOCS = Path(__file__).parent.parent / "docs"


def rows(name: str) -> list[dict]:
    """Result rows of docs/NAME.jsonl; of two about the same thing the later one counts."""
    found = {}
    for line in (DOCS / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["env_id"], row.get("seed"), row["ood"], tuple(row.get("instructions", ())), row["method"]] = row
    return list(found.values())


def success(row: dict) -> str:
    """success_once in per cent with its 95 % interval."""
    low, high = wilson(row["success_once"] * row["num_episodes"], row["num_episodes"])
    return f"{100 * row['success_once']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def expert() -> str:
    lines = ["| env id | success_once [95 %] | episodes | mean steps (horizon) | median d at entry |", "|---|---|---|---|---|"]
    for row in rows("expert"):
        if row["ood"] == "none":
            n, entry = row["num_episodes"], ", ".join(f"{name} {d}" for name, d in row["entry_distance"].items())
            lines.append(f"| {row['env_id']} | {success(row)} | {n} | {row['mean_length']} ({row['max_episode_steps']}) | {entry} |")
    return "\n".join(lines)


def sft() -> str:
    lines = ["| env id | success_once [95 %] | at the end | episodes | stages completed | training s |", "|---|---|---|---|---|---|"]
    for row in rows("sft"):
        if row["ood"] == "none" and not row["instructions"]:
            n, reach = row["num_episodes"], ", ".join(f"{100 * rate:.0f} %" for rate in row["stage_reach_rate"])
            lines.append(f"| {row['env_id']} | {success(row)} | {100 * row['success_at_end']:.1f} % | {n} | {reach} | {row['wall_s']:.0f} |")
    return "\n".join(lines)


def ood() -> str:
    table = {}
    for row in rows("sft") + rows("expert"):
        kind = "other words" if row.get("instructions") else row["ood"]
        table.setdefault((row["env_id"], row["method"]), {})[kind] = success(row)
    kinds = ("none", "position", "camera", "lighting", "other words")
    lines = ["| env id | policy | as trained | position | camera | lighting | other words |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {env_id} | {method} | " + " | ".join(cells.get(kind, "") for kind in kinds) + " |"
                              for (env_id, method), cells in table.items() if len(cells) > 1])  # fmt: skip


def separator() -> str:
    lines = ["| env id | success_once [95 %] | causal | Viterbi | boundary error, steps | boundaries missed | steps |", "|---|---|---|---|---|---|---|"]
    for line in (DOCS / "separator.jsonl").read_text().splitlines():
        row = json.loads(line)
        read = row["separator"]
        lines.append(f"| {row['env_id']} | {success(row)} | {100 * read['causal_accuracy']:.1f} % | {100 * read['viterbi_accuracy']:.1f} % | "
                     f"{read['boundary_error']:.2f} | {100 * read['boundary_missed']:.1f} % | {read['num_steps']} |")  # fmt: skip
    return "\n".join([*lines, "", "`benchmark/separator.sh`: 40 greedy episodes of one SFT policy per task."])


def main(runs: list[str]) -> None:
    with open(DOCS / "sft.jsonl", "a") as file:
        for path in sorted(path for run in runs for path in Path(run).glob("results*.json")):
            row = json.loads(path.read_text())
            row.pop("episodes")
            file.write(json.dumps(row) + "\n")
    for file, name, table in (("tasks", "expert", expert), ("tasks", "sft", sft), ("tasks", "ood", ood), ("sft", "separator", separator)):
        page = DOCS / f"{file}.md"
        before, _, rest = page.read_text().partition(f"<!-- {name} -->\n")
        page.write_text(f"{before}<!-- {name} -->\n{table()}\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
