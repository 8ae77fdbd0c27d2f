"""A test bed on the real tasks: PPO of a policy that sees the simulator's state, not images.

    python benchmark/state_policy.py --env-id StackCube-v1 --stage-reward gain --seed 1

Without pictures an env step takes less time, and the policy need not learn to see. So the forms of
the stage reward can be compared over more env steps on a CPU. Task, horizon,
stages, stage reward, advantages and loss are those of sta_ppo.py. The policy is cloned from a few
episodes of the scripted expert. It is no vision-language-action model: LOG.md has the results.
Letters: T steps of a roll-out, N envs, D numbers of an observation, A numbers of an action.
"""

import os
import sys
from pathlib import Path
from typing import Literal

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import tyro
from point_mass import EVERY_ENV, Agent, build_optimizer, fit, rewards, update

import sta_ppo
from world.demos import ClumsyExpert
from world.tasks import TRAIN_SEEDS, get_task
from world.vector import ScriptedExpert, make_envs

T = 100


def see(obs: dict, info: dict) -> torch.Tensor:
    """(N, D): where object and goal are, the turn that the tool lacks, and the proprioception."""
    return torch.cat([10 * info["geometry"], 10 * obs["proprio"][:, :3], obs["proprio"][:, 3:]], 1)


def demonstrations(envs, num_demos: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (S, D) and labels (S, A) of successful episodes of a clumsy expert."""
    rng = np.random.default_rng(seed)
    mistakes = {"speed": 0.7, "noise": 0.1, "slip": 0.02, "pause": 0, "twist": 0}
    expert = ClumsyExpert(ScriptedExpert(envs), rng, **mistakes)
    obs, info = envs.reset(seed=seed)
    episodes = [[] for _ in range(envs.num_envs)]
    kept = []
    while len(kept) < num_demos:
        x = see(obs, info)
        action, label = expert.act(info["elapsed_steps"])
        obs, _, terminated, _, info = envs.step(action)
        for i, episode in enumerate(episodes):
            episode.append((x[i], label[i]))
        for i in info["_final_info"].nonzero()[:, 0].tolist():
            if terminated[i]:
                kept.append(episodes[i])
            episodes[i] = []
            expert.begin_episode(i)
    rows = [row for episode in kept[:num_demos] for row in episode]
    return tuple(torch.stack(column) for column in zip(*rows))


class Rollout:
    """Plays on in the envs, T steps at a time."""

    def __init__(self, envs, agent: Agent, stage_reward: sta_ppo.StageReward, seed: int):
        self.envs = envs
        self.agent = agent
        self.stage_reward = stage_reward
        self.stage_of = sta_ppo.RuleStages(envs.task.stages, "", torch.device("cpu"))
        self.obs, self.info = envs.reset(seed=seed)
        stage, self.phi = self.stage_of(self.obs, self.info)
        every = torch.ones(envs.num_envs, dtype=torch.bool)
        stage_reward.begin(EVERY_ENV, every, stage)

    def see(self, obs: dict, info: dict) -> torch.Tensor:
        """(N, D + 1): the observation and the critic's time."""
        return torch.cat([see(obs, info), self.stage_reward.clock(info)[:, None]], 1)

    @torch.no_grad()
    def play(self) -> tuple[list[torch.Tensor], list[list[bool]]]:
        """Returns (T, N, ...) tensors, and of each ended episode which stages it completed."""
        rows = []
        completed = []
        num_stages = len(self.envs.task.stages)
        for _ in range(T):
            x = self.see(self.obs, self.info)
            actions = self.agent.actions(x)
            action = actions.sample()
            logprob = actions.log_prob(action).sum(1)
            obs, env_reward, success, truncated, info = self.envs.step(action.clamp(-1, 1))
            stage, phi = self.stage_of(obs, info)
            next_stage, next_phi = sta_ppo.true_next(stage, phi, info, self.stage_of)
            done = success | truncated
            # The true next state of an ended episode is its final observation.
            next_x = self.see(obs, info)
            if done.any():
                final = self.see(info["final_obs"], info["final_info"])
                next_x = torch.where(done[:, None], final, next_x)
                furthest = info["final_info"]["furthest_stage"][done]
                completed += (furthest[:, None] > torch.arange(num_stages)).tolist()
            paid = self.stage_reward(EVERY_ENV, self.phi, next_phi, next_stage, success)
            self.stage_reward.begin(EVERY_ENV, done, stage)
            terminated = done if self.stage_reward.horizon_ends else success
            value = self.agent.values(x)
            next_value = self.agent.values(next_x)
            rows.append(
                (x, action, logprob, value, env_reward + paid, next_value, terminated, done)
            )
            self.obs = obs
            self.info = info
            self.phi = phi
        return [torch.stack(column) for column in zip(*rows)], completed


def main(
    env_id: str = "StackCube-v1",
    stage_reward: Literal["sparse", "shaping", "gain", "progress", "paced"] = "gain",
    seed: int = 1,
    num_steps: int = 300_000,
    num_demos: int = 20,
    num_envs: int = 8,
    log_std: float = -2.0,
    gae_lambda: float = 0.95,
) -> None:
    """Prints what share of the last 500 training episodes completed each stage.

    log_std: of the sampled actions at first. exp(-2) is a seventh of the largest action.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    args, paying = rewards(stage_reward, get_task(env_id), num_envs, gae_lambda)
    envs = make_envs(env_id, num_envs, 0, render=False)
    states, labels = demonstrations(envs, num_demos, seed)
    agent = Agent(fit(states, labels, num_updates=2000), log_std)
    optimizer = build_optimizer(agent)
    rollout = Rollout(envs, agent, paying, seed * 1_000_003 % TRAIN_SEEDS)
    recent = []
    batch = T * num_envs
    for steps in range(0, num_steps, batch):
        rows, completed = rollout.play()
        # Two roll-outs warm the critic up.
        update(agent, optimizer, rows, args, train_policy=steps >= 2 * batch)
        recent = (recent + completed)[-500:]
        if (steps + batch) % (8 * batch) == 0:
            shares = " ".join(f"{share:.3f}" for share in np.mean(recent, 0))
            name = f"{env_id} {stage_reward} lambda {gae_lambda} seed {seed}"
            print(f"{name} step {steps + batch} {shares}", flush=True)
    envs.close()


if __name__ == "__main__":
    tyro.cli(main)
