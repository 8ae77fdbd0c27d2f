"""A test bed for the forms of the stage reward: a point mass picks a ball up and carries it.

    python benchmark/point_mass.py --stage-reward gain --seed 1

A policy is cloned from a few episodes of an expert, and then trained by PPO. Stages, stage reward,
advantages and loss are the real ones: PickCube's stage table and sta_ppo.py's functions. A million
env steps take about a minute on one core. A point mass is not a robot: this says which form to try
first. LOG.md has the results.
Letters: T steps of a roll-out, N envs, D numbers of an observation.
"""

import os
import sys
from pathlib import Path
from typing import Literal

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import tyro
from torch import nn

import sta_ppo
from stare_utils import stage_signals
from world.tasks import TASKS, Task, norm

TASK = TASKS["PickCube-v1"]
K = len(TASK.stages)
HORIZON = TASK.max_episode_steps
# Metres: how far an action of 1 moves the tool.
STEP = 0.05
EVERY_ENV = slice(None)


class PointMass:
    """The tool is a point. It holds the object where it closes within 12 mm of it."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.tool = torch.zeros(num_envs, 3)
        self.object = torch.zeros(num_envs, 3)
        self.start = torch.zeros(num_envs, 3)
        self.goal = torch.zeros(num_envs, 3)
        self.opening = torch.zeros(num_envs)
        self.speed = torch.zeros(num_envs)
        self.elapsed = torch.zeros(num_envs)
        self.held = torch.zeros(num_envs, dtype=torch.bool)
        self.reset(torch.ones(num_envs, dtype=torch.bool))

    def reset(self, which: torch.Tensor) -> None:
        """New episodes in the envs where `which` (N,) is true."""
        n = int(which.sum())
        ground = torch.full((n, 1), 0.02)
        height = 0.02 + 0.25 * torch.rand(n, 1)
        self.tool[which] = torch.tensor([0, 0, 0.17]) + 0.02 * torch.randn(n, 3)
        self.object[which] = torch.cat([0.2 * torch.rand(n, 2) - 0.1, ground], 1)
        self.goal[which] = torch.cat([0.2 * torch.rand(n, 2) - 0.1, height], 1)
        self.start[which] = self.object[which]
        self.opening[which] = 0.08
        self.speed[which] = 0
        self.elapsed[which] = 0
        self.held[which] = False

    def observe(self) -> torch.Tensor:
        """(N, D)."""
        places = [self.object - self.tool, self.goal - self.object, self.tool]
        fingers = torch.stack([self.opening / 0.08, self.held.float()], 1)
        return torch.cat([*(10 * place for place in places), fingers], 1)

    def signals(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stage, the potential and success, (N,) each."""
        state = {
            "object": self.object,
            "object_start": self.start,
            "grasped": self.held,
            "opening": self.opening,
            "width": torch.full_like(self.opening, 0.04),
            "speed": self.speed,
            "to_grip": norm(self.tool - self.object),
            "to_goal": norm(self.object - self.goal),
        }
        success = self.held & (state["to_goal"] < 0.025) & (self.speed < 0.2)
        found = stage_signals(TASK.stage_table, state, success, "sigmoid", "offset")
        return found["stage"], found["potential"], success

    def step(self, action: torch.Tensor) -> None:
        """action: (N, 4), how the tool moves, and the gripper: negative closes."""
        action = action.clamp(-1, 1)
        move = STEP * action[:, :3]
        tool = self.tool + move
        tool[:, 2] = tool[:, 2].clamp(min=0.005)
        close = action[:, 3] < 0
        self.held = close & (self.held | (norm(tool - self.object) < 0.012))
        # A tool that comes from the side pushes the object away.
        aside = norm((tool - self.object)[:, :2])
        bumped = ~self.held & (aside > 0.015) & (aside < 0.03) & (tool[:, 2] < 0.05)
        self.object[bumped, :2] += move[bumped, :2]
        self.object[self.held] = tool[self.held]
        self.object[~self.held, 2] = 0.02
        self.tool = tool
        self.speed = norm(move) / STEP
        self.opening = torch.where(close, 0.0, 0.08)
        self.elapsed += 1

    def expert(self) -> torch.Tensor:
        """(N, 4): from above to the object, then to the goal, at 0.7 of the largest step."""
        aside = norm((self.object - self.tool)[:, :2])
        above = self.object.clone()
        above[:, 2] += (4 * (aside - 0.005)).clamp(0, 0.08)
        target = torch.where(self.held[:, None], self.goal, above)
        near = norm(self.object - self.tool) < 0.012
        grip = torch.where(self.held | near, -1.0, 1.0)
        move = 0.7 * ((target - self.tool) / STEP).clamp(-1, 1)
        return torch.cat([move, grip[:, None]], 1)


def network(inputs: int, outputs: int, scale: float) -> nn.Sequential:
    """Two hidden layers. scale: of the last layer's first weights."""
    layers = [nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()]
    last = nn.Linear(128, outputs)
    last.weight.data *= scale
    last.bias.data.zero_()
    return nn.Sequential(*layers, last)


def clone(num_demos: int) -> nn.Sequential:
    """A policy fitted to episodes of the expert, whose executed actions are noisy."""
    env = PointMass(num_demos)
    live = torch.ones(num_demos, dtype=torch.bool)
    states = []
    labels = []
    for _ in range(HORIZON):
        label = env.expert()
        states.append(env.observe()[live])
        labels.append(label[live])
        env.step(label + 0.1 * torch.randn_like(label))
        live &= ~env.signals()[2]
    return fit(torch.cat(states), torch.cat(labels), num_updates=300)


def fit(states: torch.Tensor, labels: torch.Tensor, num_updates: int) -> nn.Sequential:
    """A policy fitted to labels (S, A) at states (S, D)."""
    policy = network(states.shape[1], labels.shape[1], 1.0)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(num_updates):
        batch = torch.randint(len(states), (128,))
        loss = (policy(states[batch]) - labels[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


class Agent(nn.Module):
    """A Gaussian policy, and a critic that also sees the time where the horizon ends the task."""

    def __init__(self, policy: nn.Sequential, log_std: float):
        super().__init__()
        self.policy = policy
        self.log_std = nn.Parameter(torch.full((policy[-1].out_features,), log_std))
        self.critic = network(policy[0].in_features + 1, 1, 0.01)

    def actions(self, x: torch.Tensor) -> torch.distributions.Normal:
        """The distribution of the actions. x: (B, D + 1), whose last number is the time."""
        return torch.distributions.Normal(self.policy(x[:, :-1]), self.log_std.exp())

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """(B,)."""
        return self.critic(x)[:, 0]


def build_optimizer(agent: Agent) -> torch.optim.Adam:
    """Adam with two groups: the policy, and the critic with its own learning rate."""
    groups = [
        {"params": [*agent.policy.parameters(), agent.log_std], "lr": 1e-4},
        {"params": agent.critic.parameters(), "lr": 1e-3},
    ]
    return torch.optim.Adam(groups)


def rewards(
    form: str, task: Task, num_envs: int, gae_lambda: float
) -> tuple[sta_ppo.Args, sta_ppo.StageReward]:
    """sta_ppo.py's arguments and stage reward. form: of --stage-reward, or "sparse"."""
    weight = 1 / len(task.stages)
    if form == "sparse":
        # With weight 0 every form pays nothing.
        form = "shaping"
        weight = 0.0
    args = sta_ppo.Args(stage_reward=form, num_envs=num_envs, gamma=0.97, gae_lambda=gae_lambda)
    return args, sta_ppo.StageReward(args, task, weight, torch.device("cpu"))


@torch.no_grad()
def roll_out(env: PointMass, agent: Agent, stage_reward: sta_ppo.StageReward) -> tuple:
    """Two episodes' steps of each env. Returns (T, N, ...) tensors and the successes."""

    def see() -> torch.Tensor:
        """(N, D + 1): the observation and the time."""
        clock = stage_reward.clock({"elapsed_steps": env.elapsed})
        return torch.cat([env.observe(), clock[:, None]], 1)

    every = torch.ones(env.num_envs, dtype=torch.bool)
    env.reset(every)
    stage_reward.begin(EVERY_ENV, every, env.signals()[0])
    rows = []
    successes = []
    for _ in range(2 * HORIZON):
        x = see()
        _, phi, _ = env.signals()
        actions = agent.actions(x)
        action = actions.sample()
        logprob = actions.log_prob(action).sum(1)
        env.step(action)
        stage, next_phi, success = env.signals()
        reward = success + stage_reward(EVERY_ENV, phi, next_phi, stage, success)
        done = success | (env.elapsed >= HORIZON)
        terminated = done if stage_reward.horizon_ends else success
        next_value = agent.values(see())
        rows.append((x, action, logprob, agent.values(x), reward, next_value, terminated, done))
        successes += success[done].tolist()
        env.reset(done)
        stage_reward.begin(EVERY_ENV, done, env.signals()[0])
    return [torch.stack(column) for column in zip(*rows)], successes


def update(agent: Agent, optimizer: torch.optim.Adam, rows: list, args, train_policy: bool):
    """Four epochs of PPO. train_policy: false while the critic warms up."""
    x, action, logprob, value, reward, next_value, terminated, done = rows
    advantage, returns = sta_ppo.compute_gae(
        reward, value, next_value, terminated, done, args.gamma, args.gae_lambda
    )
    advantage = sta_ppo.normalize(advantage.flatten(), None)
    x, action = x.flatten(0, 1), action.flatten(0, 1)
    logprob, returns = logprob.flatten(), returns.flatten()
    for _ in range(4):
        for mb in torch.randperm(len(x)).split(len(x) // 8):
            logratio = agent.actions(x[mb]).log_prob(action[mb]).sum(1) - logprob[mb]
            policy_loss = sta_ppo.ppo_loss(logratio, advantage[mb], clip_coef=0.2)
            value_loss = 0.5 * (agent.values(x[mb]) - returns[mb]).square().mean()
            loss = train_policy * policy_loss + 0.5 * value_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
            optimizer.step()


def main(
    stage_reward: Literal["sparse", "shaping", "gain", "progress", "paced"] = "gain",
    seed: int = 1,
    num_steps: int = 1_000_000,
    num_demos: int = 4,
    log_std: float = -1.4,
    gae_lambda: float = 0.95,
    num_envs: int = 64,
) -> None:
    """Prints success over the last 500 training episodes, from 4 demonstrations near 0 at first.

    log_std: of the sampled actions at first. exp(-1.4) is a quarter of the largest action.
    num_envs: each plays two episodes between updates.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    args, paying = rewards(stage_reward, TASK, num_envs, gae_lambda)
    agent = Agent(clone(num_demos), log_std)
    optimizer = build_optimizer(agent)
    env = PointMass(num_envs)
    batch = 2 * HORIZON * num_envs
    recent = []
    steps = 0
    while steps < num_steps:
        rows, successes = roll_out(env, agent, paying)
        # Two roll-outs warm the critic up.
        update(agent, optimizer, rows, args, train_policy=steps >= 2 * batch)
        steps += batch
        recent = (recent + successes)[-500:]
        # Every eighth roll-out.
        if steps % (8 * batch) == 0:
            share = sum(recent) / len(recent)
            print(f"{stage_reward} seed {seed} step {steps} success {share:.3f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
