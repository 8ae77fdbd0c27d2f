"""How much signal a policy gradient has, before any step is taken.

    python benchmark/gradient_snr.py --run runs/PickCube-v1__sta_tpo__1__... \
        --gae-lambda 0.95 0.8 0.5 --shaping-weight 0.25 0

The same gradient is computed from two disjoint halves of the initial states of STA-TPO's
roll-outs. This is done for several lambda of GAE and several shaping weights w. It prints
cosine: between the two halves' gradients of mean(A log pi);
to 0.95: the cosine with the other half's gradient at the largest lambda, whose bias is the least;
explained variance: of the critic, which is fitted on one half and used on the other.
A direction with less noise and no bias has both cosines higher.
Letters: S steps of all roll-outs, D hidden width.
"""

import json
import os
import sys
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import tyro

import vla
from plumbing.checkpoint import load_policy
from sta_ppo import ValueHead, compute_gae, normalize
from sta_tpo import action_logprob, read_rollouts
from stare_utils import shape_rewards, stage_potential
from world.tasks import get_task

GAMMA = 0.99
# Steps per forward and backward pass.
CHUNK = 256


def following(x: torch.Tensor) -> torch.Tensor:
    """The next entry of each entry. The last one is its own."""
    return torch.cat([x[1:], x[-1:]])


def rollout_advantages(
    rollout: dict, values: torch.Tensor, gae_lambda: float, weight: float
) -> torch.Tensor:
    """GAE (T,) of a roll-out under values (T,).

    A failed roll-out is bootstrapped with its last state's value, because the final one is not
    recorded.
    """
    end = torch.tensor([False] * (len(values) - 1) + [True])
    terminated = end & rollout["success"]
    distance = rollout["distance"].float()
    phi = rollout["stage"] + stage_potential(distance, torch.tensor(1.0))
    rewards = shape_rewards(terminated.float(), phi, following(phi), terminated, GAMMA, weight)
    # (T,) -> (T, 1): one env
    columns = [x[:, None] for x in (rewards, values, following(values), terminated, end)]
    advantages, _ = compute_gae(*columns, GAMMA, gae_lambda)
    return advantages[:, 0]


def advantages_of(
    rollouts: list[dict], values: torch.Tensor, gae_lambda: float, weight: float
) -> torch.Tensor:
    """GAE (S,) of all roll-outs under values (S,)."""
    parts = values.split([len(rollout["stage"]) for rollout in rollouts])
    advantages = []
    for rollout, v in zip(rollouts, parts, strict=True):
        advantages.append(rollout_advantages(rollout, v, gae_lambda, weight))
    return torch.cat(advantages)


def fit_critic(hidden: torch.Tensor, returns: torch.Tensor, steps: torch.Tensor) -> ValueHead:
    """A value head that is regressed on returns (S,) at some steps. hidden: (S, D)."""
    torch.manual_seed(1)
    head = ValueHead(hidden.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    for _ in range(300):
        mb_inds = steps[torch.randint(len(steps), (512,))]
        optimizer.zero_grad()
        values = head(hidden[mb_inds], torch.zeros(len(mb_inds)))
        (values - returns[mb_inds]).square().mean().backward()
        optimizer.step()
    return head


def fit_values(
    rollouts: list[dict],
    hidden: torch.Tensor,
    half: torch.Tensor,
    gae_lambda: float,
    weight: float,
) -> torch.Tensor:
    """V (S,) by three rounds of regression on lambda-returns.

    hidden: (S, D). half: (S,) bool. The critic of each half gives the values of the other half.
    """
    values = torch.zeros(len(hidden))
    for _ in range(3):
        returns = advantages_of(rollouts, values, gae_lambda, weight) + values
        new_values = torch.zeros(len(hidden))
        for side in (half, ~half):
            head = fit_critic(hidden, returns, side.nonzero()[:, 0])
            other = hidden[~side]
            new_values[~side] = head(other, torch.zeros(len(other))).detach()
        values = new_values
    return values


class Policy:
    """The policy of a run of sta_tpo.py, at the steps of the run's roll-outs."""

    def __init__(self, run: Path, rollouts: list[dict]):
        device = torch.device("cpu")
        # The first line of the file names the policy that made the roll-outs.
        source = (run / "source.txt").read_text().split("\n")[0]
        self.model, processor, _ = load_policy(source, device)
        settings = json.loads((run / "checkpoint/args.json").read_text())
        env_id = settings["env_id"]
        stats = self.model.config.norm_stats[env_id]
        self.active = ~vla.constant_dims(stats["action"])
        instruction = get_task(env_id).instruction
        n_bins = self.model.config.n_action_bins
        self.codec = vla.Codec(processor, instruction, stats, n_bins, device)
        self.data = {}
        for name in ("rgb", "proprio", "bins"):
            self.data[name] = torch.cat([rollout[name] for rollout in rollouts])

    def forward(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B,) of the actions at steps (B,), and hidden states (B, D)."""
        obs = {name: values[steps] for name, values in self.data.items()}
        inputs = self.codec.inputs(obs)
        logprob, _, hidden, _ = action_logprob(self.model, inputs, obs["bins"], self.active)
        return logprob, hidden

    @torch.no_grad()
    def hidden(self) -> torch.Tensor:
        """The hidden states (S, D) of all steps, normalised."""
        chunks = torch.arange(len(self.data["bins"])).split(CHUNK)
        hidden = torch.cat([self.forward(steps)[1] for steps in chunks])
        return (hidden - hidden.mean(0)) / hidden.std(0)

    def gradient(self, advantages: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The gradient of -mean(A log pi) over some steps, as one vector. advantages: (S,)."""
        self.model.zero_grad()
        for chunk in steps.split(CHUNK):
            logprob, _ = self.forward(chunk)
            (-(logprob * advantages[chunk]).sum() / len(steps)).backward()
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return torch.cat(grads)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of the angle between two vectors."""
    return torch.cosine_similarity(a, b, 0).item()


def main(
    run: str,
    gae_lambda: tuple[float, ...] = (0.95, 0.8, 0.5),
    shaping_weight: tuple[float, ...] = (0.25,),
) -> None:
    """run: the folder of a run of sta_tpo.py."""
    rollouts = read_rollouts(sorted((Path(run) / "rollouts").glob("*.npz")))
    policy = Policy(Path(run), rollouts)
    # Every second initial state belongs to the first half.
    seeds = sorted({rollout["init_seed"] for rollout in rollouts})
    halves = []
    for rollout in rollouts:
        is_first = seeds.index(rollout["init_seed"]) % 2 == 0
        halves.append(torch.full((len(rollout["stage"]),), is_first))
    half = torch.cat(halves)
    hidden = policy.hidden()
    print(f"{len(rollouts)} roll-outs, {len(seeds)} initial states, {len(half)} steps")
    for w in shaping_weight:
        # The gradients of both halves at the largest lambda.
        unbiased = None
        for lam in sorted(gae_lambda, reverse=True):
            values = fit_values(rollouts, hidden, half, lam, w)
            advantages = advantages_of(rollouts, values, lam, w)
            normalized = normalize(advantages, None)
            a = policy.gradient(normalized, half.nonzero()[:, 0])
            b = policy.gradient(normalized, (~half).nonzero()[:, 0])
            unbiased = unbiased or (a, b)
            across = (cosine(a, unbiased[1]) + cosine(b, unbiased[0])) / 2
            explained = 1 - (advantages.var() / (advantages + values).var()).item()
            print(
                f"w {w:.2f} lambda {lam:.2f}: cosine {cosine(a, b):+.3f}, "
                f"to {max(gae_lambda)} {across:+.3f}, explained variance {explained:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
