"""How much signal a policy gradient has, before any step is taken: the same gradient from two disjoint halves of the initial states of
STA-TPO's roll-outs (R roll-outs, S steps in all, D hidden width), for several lambda of GAE and shaping weights w.

    python benchmark/gradient_snr.py --run runs/PickCube-v1__sta_tpo__1__... --gae-lambda 0.95 0.8 0.5 --shaping-weight 0.25 0

cosine: between the two halves' gradients of mean(A log pi); cosine to 0.95: with the other half's gradient at lambda 0.95, whose bias is the least;
a direction that is cleaner and unbiased has both higher. The critic is fitted on one half and used on the other."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import stare_utils  # before torch  # isort: skip
import torch
import tyro

import vla
from sta_ppo import ValueHead, compute_gae, load_policy, normalize
from sta_tpo import action_logprob, read_rollouts


def advantages_of(rollouts: list[dict], values: torch.Tensor, gae_lambda: float, weight: float) -> torch.Tensor:
    """GAE (S,) of the roll-outs under values (S,). A failed roll-out is bootstrapped with its last state's value: the final one is not recorded."""
    parts = []
    for rollout, v in zip(rollouts, values.split([len(r["stage"]) for r in rollouts]), strict=True):
        end = torch.tensor([False] * (len(v) - 1) + [True])
        terminated = end & rollout["success"]
        phi = rollout["stage"] + stare_utils.stage_potential(rollout["distance"].float(), torch.tensor(1.0))
        following = lambda x: torch.cat([x[1:], x[-1:]])  # noqa: E731
        rewards = stare_utils.shape_rewards(*(x[:, None] for x in (terminated.float(), phi, following(phi), terminated)), 0.99, weight)
        parts.append(compute_gae(rewards, *(x[:, None] for x in (v, following(v), terminated, end)), 0.99, gae_lambda)[0][:, 0])
    return torch.cat(parts)


def fit_values(rollouts: list[dict], hidden: torch.Tensor, half: torch.Tensor, gae_lambda: float, weight: float) -> torch.Tensor:
    """V (S,) by three rounds of regression on lambda-returns, each half of the steps by the critic of the other."""
    values = torch.zeros(len(hidden))
    for _ in range(3):
        returns, new = advantages_of(rollouts, values, gae_lambda, weight) + values, torch.zeros(len(hidden))
        for side in (half, ~half):
            torch.manual_seed(1)
            head, steps = ValueHead(hidden.shape[1]), side.nonzero()[:, 0]
            optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
            for _ in range(300):
                mb = steps[torch.randint(len(steps), (512,))]
                optimizer.zero_grad()
                (head(hidden[mb]) - returns[mb]).square().mean().backward()
                optimizer.step()
            new[~side] = head(hidden[~side]).detach()
        values = new
    return values


def main(run: str, gae_lambda: tuple[float, ...] = (0.95, 0.8, 0.5), shaping_weight: tuple[float, ...] = (0.25,)) -> None:
    device = torch.device("cpu")
    model, processor, _ = load_policy((Path(run) / "source.txt").read_text().split("\n")[0], device)
    env_id = json.loads((Path(run) / "checkpoint/args.json").read_text())["env_id"]
    stats, task = model.config.norm_stats[env_id], stare_utils.get_task(env_id)
    active = ~vla.constant_dims(stats["action"])
    rollouts = read_rollouts(sorted((Path(run) / "rollouts").glob("*.npz")))
    seeds = sorted({r["init_seed"] for r in rollouts})
    half = torch.cat([torch.full((len(r["stage"]),), seeds.index(r["init_seed"]) % 2 == 0) for r in rollouts])
    rgb, proprio, bins = (torch.cat([r[name] for r in rollouts]) for name in ("rgb", "proprio", "bins"))

    def forward(steps: torch.Tensor):
        inputs = processor(rgb[steps], [task.instruction] * len(steps), proprio[steps], stats.get("proprio"), device)
        return action_logprob(model, inputs, bins[steps], active)

    def gradient(advantages: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        for mb in steps.split(256):
            (-(forward(mb)[0] * advantages[mb]).sum() / len(steps)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with torch.no_grad():
        hidden = torch.cat([forward(steps)[2] for steps in torch.arange(len(rgb)).split(256)])
    hidden = (hidden - hidden.mean(0)) / hidden.std(0)
    print(f"{len(rollouts)} roll-outs, {len(seeds)} initial states, {len(rgb)} steps")
    unbiased = {}
    for w in shaping_weight:
        for lam in sorted(gae_lambda, reverse=True):
            values = fit_values(rollouts, hidden, half, lam, w)
            advantages = advantages_of(rollouts, values, lam, w)
            a, b = (gradient(normalize(advantages, None), side.nonzero()[:, 0]) for side in (half, ~half))
            unbiased.setdefault(w, (a, b))
            cos = lambda x, y: torch.cosine_similarity(x, y, 0).item()  # noqa: E731
            across, explained = (cos(a, unbiased[w][1]) + cos(b, unbiased[w][0])) / 2, 1 - (advantages.var() / (advantages + values).var()).item()
            print(f"w {w:.2f} lambda {lam:.2f}: cosine {cos(a, b):+.3f}, to {max(gae_lambda)} {across:+.3f}, explained variance {explained:.2f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
