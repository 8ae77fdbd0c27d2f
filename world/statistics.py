"""What the logs say about finished episodes. Nothing here is learned from."""

import math

import numpy as np
import torch

from stare_utils import Stage, State, Tensor


class EpisodeStatistics:
    """Sums over each env's present episode, and a row for each finished one that counts.

    Episodes count by whole rounds. A round begins with fresh episodes in all envs, and only the
    first `episodes_per_env` of each env count: those that fit in, however long they take. Without
    this rule a round would report its quick episodes, which are the successes.
    """

    def __init__(
        self, stage_table: tuple[Stage, ...], num_envs: int, gamma: float, num_moved: int = 0
    ):
        """stage_table: the K stages of the task. gamma: discounts the shaped return.

        num_moved: how many of the last envs begin in later stages. They count nowhere.
        """
        self.num_counted = num_envs - num_moved
        K = len(stage_table)
        self.stage_names = [stage.name for stage in stage_table]
        self.lengths = torch.tensor([stage.length for stage in stage_table])
        self.gamma = gamma
        self.returns = torch.zeros(num_envs)
        self.shaped_returns = torch.zeros(num_envs)
        self.steps = torch.zeros(num_envs, K)
        # Sums of d_k / L_k over the steps in stage k.
        self.costs = torch.zeros(num_envs, K)
        # What the stage reward has paid for the steps in stage k.
        self.paid = torch.zeros(num_envs, K)
        # The stage in which each env acts now, K at success.
        self.stage = torch.zeros(num_envs, dtype=torch.long)
        # gamma to the power of each env's present step.
        self.discounts = torch.ones(num_envs)
        # How many more episodes of each env count in this round.
        self.left = torch.zeros(num_envs, dtype=torch.long)
        self.rows: list[dict[str, float]] = []
        # The rows of the latest rounds, which the logged means are over.
        self.recent: list[dict[str, float]] = []

    def begin_round(self, episodes_per_env: int) -> None:
        """All envs were reset. 0 episodes per env: a resumed run waits for the next round."""
        self.left[: self.num_counted] = episodes_per_env
        self.rows = []
        for sums in self.sums():
            sums.zero_()

    def sums(self) -> tuple[Tensor, ...]:
        """The sums that begin at 0 with each episode, one row per env."""
        return self.returns, self.shaped_returns, self.steps, self.costs, self.paid

    def observe(self, half: slice, info: State) -> None:
        """Counts the states that the policy acts in next. info: of the envs in `half`."""
        K = len(self.stage_names)
        self.stage[half] = info["stage"].cpu()
        member = torch.nn.functional.one_hot(self.stage[half], K + 1)[:, :K]
        distance = info["stage_distance"].cpu()[:, None] / self.lengths
        self.steps[half] += member
        self.costs[half] += member * distance
        self.discounts[half] = self.gamma ** info["elapsed_steps"].cpu()

    def step(
        self, half: slice, env_rewards: Tensor, rewards: Tensor, paid: Tensor, info: State
    ) -> None:
        """Adds what a step has paid, and writes a row for each episode that it has ended.

        env_rewards, rewards: (n,), the env's own, and those that PPO learns from. paid: (n,), the
        share of the stage reward in them. info: of the envs in `half`.
        Call it before `observe`, which counts the states that come after the step.
        """
        self.returns[half] += env_rewards.cpu()
        self.shaped_returns[half] += self.discounts[half] * rewards.cpu()
        K = len(self.stage_names)
        member = torch.nn.functional.one_hot(self.stage[half], K + 1)[:, :K]
        self.paid[half] += member * paid.cpu()[:, None]
        for j in info["_final_info"].nonzero()[:, 0].tolist():
            i = half.start + j
            if self.left[i] > 0:
                ended = {name: values[j] for name, values in info["final_info"].items()}
                self.rows.append(self.row(i, ended))
            self.left[i] -= 1
            for sums in self.sums():
                sums[i] = 0

    def row(self, i: int, ended: State) -> dict[str, float]:
        """The row of env i's episode. ended: the infos of its last state."""
        K = len(self.stage_names)
        furthest = int(ended["furthest_stage"])
        row = {
            "charts/success_once": float(furthest == K),
            "charts/success_at_end": float(ended["success"]),
            "charts/episodic_return": float(self.returns[i]),
            "charts/shaped_return": float(self.shaped_returns[i]),
            "charts/episodic_length": float(ended["elapsed_steps"]),
            "charts/furthest_stage": float(furthest),
        }
        for k, name in enumerate(self.stage_names):
            row[f"stage/{k}_{name}_reached"] = float(furthest > k)
            row[f"stage/{k}_{name}_steps"] = float(self.steps[i, k])
            row[f"stage/{k}_{name}_paid"] = float(self.paid[i, k])
            # NaN where the stage was never entered.
            row[f"stage/{k}_{name}_cost"] = float(self.costs[i, k] / self.steps[i, k])
        return row

    def end_round(self, rows: list[list[dict]], round_size: int) -> None:
        """Keeps the latest whole rounds, enough of them for 100 episodes.

        rows: those of each process of a job. round_size: how many rows a round of the job has.
        """
        for share in rows:
            self.recent = self.recent + share
        rounds = math.ceil(100 / round_size)
        self.recent = self.recent[-round_size * rounds :]

    def means(self) -> dict[str, float]:
        """The mean of each number over the latest rounds, without the episodes that lack it."""
        means = {}
        for key in self.recent[0] if self.recent else ():
            known = [row[key] for row in self.recent if not math.isnan(row[key])]
            if known:
                means[key] = float(np.mean(known))
        return means
