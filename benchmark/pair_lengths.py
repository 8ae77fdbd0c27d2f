"""Who wins a stage pair: the quicker or the slower roll-out?

    python benchmark/pair_lengths.py runs/*__sta-tpo__*__paper     # run folders of sta_tpo.py with their roll-outs

For each task, stage and reason over all these runs: pairs, mean steps of the winners' and of the losers' segments, and the share of pairs whose winner
took longer. Pairs as sta_tpo.py builds them with the run's own settings."""
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from sta_tpo import build_stage_pairs, read_rollouts, segment_rows
from stare_utils import get_task

found = defaultdict(list)
for run in map(Path, sys.argv[1:]):
    args = json.loads((run / "checkpoint/args.json").read_text())
    rollouts, task = read_rollouts(sorted((run / "rollouts").glob("[!t]*.npz"))), get_task(args["env_id"])
    K = len(task.stages)
    for pair in build_stage_pairs(rollouts, K, args["cost_margin"], args["max_pairs_per_stage"], cost_sum=args.get("cost_sum", False)):
        steps = [len(segment_rows(rollouts[pair[side]], pair["stage"], K, True)) for side in ("chosen", "rejected")]
        found[args["env_id"], pair["stage"], task.stages[pair["stage"]], pair["reason"]].append(steps)
print("| task | stage | won by | pairs | steps of the winner | of the loser | winner slower |\n|---|---|---|---|---|---|---|")
for (env_id, _, stage, reason), steps in sorted(found.items()):
    won, lost = (sum(column) / len(steps) for column in zip(*steps))
    print(f"| {env_id} | {stage} | {reason} | {len(steps)} | {won:.1f} | {lost:.1f} | {100 * sum(a > b for a, b in steps) / len(steps):.0f} % |")
