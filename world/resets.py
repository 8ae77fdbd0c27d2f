"""Training episodes that begin in a later stage.

Letters: N envs, n of one half of them, K stages.
"""

from collections import deque

import numpy as np
import torch

from stare_utils import State, Tensor
from world.vector import StageVectorEnv, last_states

# States that are kept per stage, the latest ones.
POOL_SIZE = 32


class StageResets:
    """Envs of which the last few begin their episodes where some episode has entered a stage.

    The stage is drawn, and one that is seldom completed more often. Until a later stage has been
    entered, these envs begin as all others do. The methods are those of StageVectorEnv.
    """

    def __init__(self, envs: StageVectorEnv, num_moved: int, seed: int):
        """num_moved: how many envs begin in later stages. seed: of what is drawn."""
        self.envs = envs
        self.num_envs = envs.num_envs
        self.halves = envs.halves
        self.moved = range(envs.num_envs - num_moved, envs.num_envs)
        self.rng = np.random.default_rng(seed)
        self.furthest = torch.zeros(envs.num_envs, dtype=torch.long)
        # Per stage: states in which it was entered, how often it was begun, and completed. The last
        # entry of `begun` is success.
        self.pools = [deque(maxlen=POOL_SIZE) for _ in range(envs.num_stages)]
        self.begun = np.zeros(envs.num_stages + 1)
        self.completed = np.zeros(envs.num_stages)

    def reset(self, seed: int | list[int] | None = None) -> tuple[State, State]:
        """Begins episodes in all envs. seed: of those that begin as usual."""
        obs, infos = self.envs.reset(seed)
        every = slice(0, self.num_envs)
        self.begin(every, torch.ones(self.num_envs, dtype=torch.bool), obs, infos)
        return obs, infos

    def send(self, half: slice, actions: Tensor) -> None:
        """Begins a step, see StageVectorEnv."""
        self.envs.send(half, actions)

    def receive(self, half: slice) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """Waits for a step, see StageVectorEnv."""
        obs, reward, terminated, truncated, infos = self.envs.receive(half)
        ended, stage, _ = last_states(infos)
        self.keep(half, stage, ended)
        self.begin(half, ended, obs, infos)
        return obs, reward, terminated, truncated, infos

    def keep(self, half: slice, stage: Tensor, ended: Tensor) -> None:
        """Keeps the states in which a stage is entered. stage: (n,) of the last states."""
        enters = stage > self.furthest[half]
        wanted = [False] * self.num_envs
        # After the end of an episode there is no state to go on from.
        wanted[half] = (enters & ~ended).tolist()
        saved = self.envs.save_where(wanted)
        for j in enters.nonzero()[:, 0].tolist():
            i = half.start + j
            # A stage that is skipped counts nowhere.
            self.completed[self.furthest[i]] += 1
            self.begun[stage[j]] += 1
            if saved[i]:
                self.pools[stage[j]].append(saved[i])
        self.furthest[half] = torch.maximum(self.furthest[half], stage)

    def begin(self, half: slice, begins: Tensor, obs: State, infos: dict) -> None:
        """Moves those of the last envs that begin an episode.

        begins: (n,) bool, of the envs in `half`. obs, infos: of the same, changed in place.
        """
        targets = [None] * self.num_envs
        for j in begins.nonzero()[:, 0].tolist():
            if half.start + j in self.moved:
                targets[half.start + j] = self.draw()
        self.envs.go_to(targets, obs, infos, half.start)
        for j in begins.nonzero()[:, 0].tolist():
            # An episode that begins in success, which is stage K, begins in stage 0.
            stage = infos["stage"][j] % self.envs.num_stages
            self.furthest[half.start + j] = stage
            self.begun[stage] += 1

    def draw(self) -> dict | None:
        """A state in which a stage was entered. None: there is none yet."""
        stages = [k for k, pool in enumerate(self.pools) if pool]
        if not stages:
            return None
        failed = np.array([1 - self.completed[k] / self.begun[k] for k in stages])
        # A stage that is always completed is drawn too, so that it is not forgotten.
        chances = failed + 0.05
        k = self.rng.choice(stages, p=chances / chances.sum())
        return self.pools[k][self.rng.integers(len(self.pools[k]))]

    def close(self) -> None:
        """Ends the simulators."""
        self.envs.close()
