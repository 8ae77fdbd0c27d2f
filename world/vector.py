"""Vectorised environments: many StageEnvs, and the scripted expert that solves them.

On a GPU ManiSkill simulates all envs in one batch, which is one `StageEnv`. On a CPU each env is a
process of its own. `make_envs` gives either, and both have the same methods.
Letters: N envs, A numbers of an action.
"""

import functools
import gc
import math
import multiprocessing
import os
import signal
import sys
import unittest.mock
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch

from stare_utils import State, Tensor
from world.assets import IMAGE_SIZE, check_world
from world.envs import StageEnv
from world.tasks import Task, UserError, get_task


# ---- what an env process sends ----
def info_fields(task: Task) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The infos of one env, in order: name -> (shape, dtype). See StageEnv for what they are."""
    fields = {
        "stage": ((), torch.long),
        "stage_distance": ((), torch.float32),
        "distances": ((len(task.stages),), torch.float32),
        "potential": ((), torch.float32),
        "furthest_stage": ((), torch.long),
        "success": ((), torch.bool),
        "seed": ((), torch.long),
        "elapsed_steps": ((), torch.long),
        "geometry": ((8,), torch.float32),
    }
    for name in task.report:
        fields[name] = ((), torch.float32)
    return fields


def pack_infos(infos: State, fields: dict) -> np.ndarray:
    """Infos of one env as one row of numbers, (F,) float64, which holds every seed exactly."""
    assert infos.keys() == fields.keys(), "info_fields names what StageEnv.infos returns"
    return np.concatenate([infos[name].numpy().ravel() for name in fields], dtype=np.float64)


def unpack_infos(rows: Tensor, fields: dict) -> State:
    """The infos of n envs from their rows (n, F)."""
    infos = {}
    start = 0
    for name, (shape, dtype) in fields.items():
        stop = start + math.prod(shape)
        infos[name] = rows[:, start:stop].reshape(-1, *shape).to(dtype)
        start = stop
    return infos


def process_space(task: Task, render: bool, image_size: int) -> gym.spaces.Dict:
    """What an env process writes into shared memory at each step.

    The entries whose names begin with "final_" are of the env's last ended episode.
    """
    num_infos = sum(math.prod(shape) for shape, _ in info_fields(task).values())
    spaces = {
        "proprio": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
        "infos": gym.spaces.Box(-np.inf, np.inf, (num_infos,), np.float64),
    }
    if render:
        spaces["rgb"] = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    final = {f"final_{name}": space for name, space in spaces.items()}
    return gym.spaces.Dict(spaces | final)


# ---- one env in a process ----
class NoEnv(gym.Env):
    """Stands for an env in the script itself, where gymnasium looks at the spaces alone."""

    def __init__(self, task: Task, render: bool = True, image_size: int = IMAGE_SIZE, **kwargs):
        """kwargs: of StageEnv. Those without a name here change no space."""
        self.observation_space = process_space(task, render, image_size)
        self.action_space = gym.spaces.Box(-1, 1, (len(task.arm.limit),), np.float32)


class ProcessEnv(NoEnv):
    """A single StageEnv as gymnasium's AsyncVectorEnv wants it: numpy, without the batch axis."""

    def __init__(self, env_id: str, index: int, seed: int, **kwargs):
        """index: which of the N envs this is. kwargs: of StageEnv."""
        super().__init__(get_task(env_id), **kwargs)
        # The env processes are the parallelism.
        torch.set_num_threads(1)
        # Ctrl-C and torchrun's SIGTERM go to the script's whole process group.
        # The script alone decides what they end, so this process leaves the group.
        os.setpgrp()
        # Where the script is gone, this process ends without a message.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        # ManiSkill calls it. It would open a CUDA context, and nothing here runs on CUDA.
        torch.cuda.synchronize = do_nothing
        # The garbage collector need not look again and again at what the imports have made.
        gc.freeze()
        self.index = index
        self.env = StageEnv(env_id, 1, "cpu", seed, **kwargs)
        self.fields = info_fields(self.env.task)
        # Before the first episode has ended these are zeros.
        self.final = {}
        for name, space in self.observation_space.items():
            if name.startswith("final_"):
                self.final[name] = np.zeros(space.shape, space.dtype)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begins an episode, see StageEnv. options: gymnasium's, unused."""
        obs, infos = self.env.reset(seed)
        return self.arrays(obs, infos) | self.final, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One step, see StageEnv. action: (A,)."""
        action = torch.as_tensor(action)[None]
        obs, reward, terminated, truncated, infos = self.env.step(action)
        # Whether an episode has ended follows from the two booleans.
        if infos.pop("_final_info"):
            final = self.arrays(infos.pop("final_obs"), infos.pop("final_info"))
            self.final = {f"final_{name}": array for name, array in final.items()}
        seen = self.arrays(obs, infos) | self.final
        return seen, float(reward), bool(terminated), bool(truncated), {}

    def arrays(self, obs: State, infos: State) -> dict[str, np.ndarray]:
        """Observation and infos of the env without the batch axis."""
        row = {name: x[0].numpy() for name, x in obs.items()}
        row["infos"] = pack_infos(infos, self.fields)
        return row

    def save_where(self, wanted: list[bool]) -> dict | None:
        """The present state, see StageEnv.save, as arrays. wanted: (N) of all envs."""
        # Each tensor that is sent as such would keep a file open in the script.
        return change_leaves(self.env.save(), to_array) if wanted[self.index] else None

    def go_to(self, targets: list[int | dict | None]) -> tuple[dict, dict] | None:
        """Begins an episode, or goes back to a saved state. targets: (N) of all envs.

        Returns observation and infos as arrays.
        """
        target = targets[self.index]
        if target is None:
            return None
        if isinstance(target, dict):
            seen = self.env.restore(change_leaves(target, to_tensor))
        else:
            seen = self.env.reset(target)
        return change_leaves(seen, to_array)

    def expert_action(self, slip: Tensor) -> np.ndarray:
        """The expert's action (A,). slip: (N,) of all envs."""
        return self.env.expert_action(slip[self.index, None])[0].numpy()

    def set_next_seed(self, seeds: list[int]) -> None:
        """The seed of the next episode. seeds: (N) of all envs."""
        self.env.set_next_seeds([seeds[self.index]])

    def close(self) -> None:
        """Ends the simulator."""
        self.env.close()


def change_leaves(x: object, change: Callable) -> object:
    """A nest of dicts and tuples, in which change(leaf) stands for each leaf."""
    if isinstance(x, dict):
        return {name: change_leaves(value, change) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(change_leaves(value, change) for value in x)
    return change(x)


def to_array(x: object) -> object:
    """A tensor as an array; anything else as it is."""
    return x.numpy() if isinstance(x, Tensor) else x


def to_tensor(x: object) -> object:
    """An array as a tensor; anything else as it is."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def do_nothing() -> None:
    """Stands for torch.cuda.synchronize in a process without CUDA."""


class Processes(gym.vector.AsyncVectorEnv):
    """The env processes of one half of a StageVectorEnv."""

    def close(self, **kwargs) -> None:
        """Ends the processes at once.

        gymnasium's own `close` waits for what they compute. Where a process is gone, it fails or
        waits for ever.
        """
        self.closed = True
        for process in self.processes:
            process.kill()


def make_process_env(env_id: str, index: int, seed: int, kwargs: dict) -> gym.Env:
    """What gymnasium calls in each env process, and once per half in the script itself."""
    # The script has no parent process, and needs no simulator to know the spaces.
    if multiprocessing.parent_process() is None:
        return NoEnv(get_task(env_id), **kwargs)
    return ProcessEnv(env_id, index, seed, **kwargs)


def put_row(rows: State, i: int, new: dict[str, np.ndarray]) -> None:
    """Replaces row i of each tensor. new: of one env."""
    for name, value in new.items():
        rows[name][i] = torch.from_numpy(value[0:1])[0]


# ---- many envs in processes ----
class StageVectorEnv:
    """N StageEnvs on a CPU, each in a process, with the methods of one StageEnv of N.

    The processes form two halves that can take turns with a policy: one half simulates while the
    policy acts for the other half. A roll-out of T steps does that by

        for t in range(T + 1):
            for half in envs.halves:
                if t > 0:
                    obs, reward, terminated, truncated, infos = envs.receive(half)
                if t < T:
                    envs.send(half, actions)

    Every method raises UserError where an env process has died, and ends all of them.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, **kwargs):
        """seed: env i's first episode has the seed + i. kwargs: of StageEnv."""
        self.task = get_task(env_id)
        self.num_stages = len(self.task.stages)
        self.num_envs = num_envs
        self.halves = [slice(0, num_envs // 2), slice(num_envs // 2, num_envs)]
        if num_envs == 1:
            self.halves = [slice(0, 1)]

        # Env processes are forked from a clean server process, which imports these once.
        multiprocessing.set_forkserver_preload(["world.vector", "mani_skill.envs"])
        self.fields = info_fields(self.task)
        self.parts = []
        for half in self.halves:
            makers = []
            for i in range(half.start, half.stop):
                args = (env_id, i, seed + i, kwargs)
                makers.append(functools.partial(make_process_env, *args))
            self.parts.append(self.start(makers))
        self.single_action_space = self.parts[0].single_action_space

    def start(self, makers: list[Callable[[], gym.Env]]) -> Processes:
        """Starts the env processes of one half."""
        # A new process imports the running script again, if that has a file or a module name.
        # That would take longer than everything else that the process needs.
        # So the script has neither while the processes start.
        script = vars(sys.modules["__main__"])
        without_origin = {"__file__": None, "__spec__": None}
        # A StageEnv begins its next episode itself.
        autoreset = gym.vector.AutoresetMode.DISABLED
        with unittest.mock.patch.dict(script, without_origin):
            return self.ask(Processes, makers, context="forkserver", autoreset_mode=autoreset)

    def reset(self, seed: int | list[int] | None = None) -> tuple[State, State]:
        """Begins episodes in all envs. Returns observations and infos.

        seed: s gives env i the seed s + i, a list is taken as it is. None: each env's next seed.
        """
        if isinstance(seed, int):
            seed = [seed + i for i in range(self.num_envs)]
        # All processes begin before the first one is waited for.
        for part, half in zip(self.parts, self.halves):
            self.ask(part.reset_async, None if seed is None else seed[half])
        results = []
        for part in self.parts:
            arrays, _ = self.ask(part.reset_wait)
            results.append(self.unpack(arrays, ""))
        return self.join(results)

    def step(self, actions: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """One step of all envs. actions: (N, A) in the env's own units.

        Returns observation, reward (N,), terminated (N,), truncated (N,), infos.
        """
        for half in self.halves:
            self.send(half, actions[half])
        return self.join([self.receive(half) for half in self.halves])

    def send(self, half: slice, actions: Tensor) -> None:
        """Begins a step of the envs in `half`, which compute until `receive` asks for its result.

        half: one of `halves`. actions: (n, A) of its n envs.
        """
        part = self.parts[self.halves.index(half)]
        # The policy may have computed the actions on a GPU.
        self.ask(part.step_async, actions.cpu().numpy())

    def receive(self, half: slice) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """Waits for the step that `send` began. Returns what `step` does, of the envs in `half`."""
        part = self.parts[self.halves.index(half)]
        arrays, reward, terminated, truncated, _ = self.ask(part.step_wait)
        # gymnasium returns rewards as float64.
        reward = torch.from_numpy(reward).float()
        terminated = torch.from_numpy(terminated)
        truncated = torch.from_numpy(truncated)
        obs, infos = self.unpack(arrays, "")
        infos["_final_info"] = terminated | truncated
        if infos["_final_info"].any():
            infos["final_obs"], infos["final_info"] = self.unpack(arrays, "final_")
        return obs, reward, terminated, truncated, infos

    def unpack(self, arrays: dict[str, np.ndarray], prefix: str) -> tuple[State, State]:
        """Observations and infos of n envs from what their processes wrote under names + prefix."""
        obs = {}
        for name in ("proprio", "rgb"):
            if prefix + name in arrays:
                obs[name] = torch.from_numpy(arrays[prefix + name])
        rows = torch.from_numpy(arrays[prefix + "infos"])
        return obs, unpack_infos(rows, self.fields)

    def set_next_seeds(self, seeds: list[int]) -> None:
        """The seeds (N) of the episodes that begin when the present ones end."""
        self.call("set_next_seed", seeds)

    def save_where(self, wanted: list[bool]) -> list[dict | None]:
        """The present states of the envs where `wanted` (N) is true, see StageEnv.save."""
        return self.call_some("save_where", wanted, wanted)

    def go_to(
        self,
        targets: list[int | dict | None],
        obs: State,
        infos: State,
        first: int = 0,
    ) -> None:
        """Moves some envs to other states, and overwrites their rows of `obs` and `infos`.

        targets: (N). A seed begins an episode, a dict is of `save_where`, None leaves an env alone.
        first: the number of the env that the first row is of.
        """
        moves = [target is not None for target in targets]
        for i, seen in enumerate(self.call_some("go_to", targets, moves)):
            if seen:
                put_row(obs, i - first, seen[0])
                put_row(infos, i - first, seen[1])

    def call_some(self, name: str, argument, needed: list[bool]) -> list:
        """As `call`, but halves in which no env is needed are not asked: they may be at work.

        needed: (N). Returns N results, None of those that were not asked.
        """
        asked = [any(needed[half]) for half in self.halves]
        for part, is_asked in zip(self.parts, asked):
            if is_asked:
                self.ask(part.call_async, name, argument)
        results = []
        for part, half, is_asked in zip(self.parts, self.halves, asked):
            nothing = [None] * (half.stop - half.start)
            results += self.ask(part.call_wait) if is_asked else nothing
        return results

    def expert_action(self, slip: Tensor) -> Tensor:
        """The expert's actions (N, A), see StageEnv. slip: (N,) long."""
        return torch.from_numpy(np.stack(self.call("expert_action", slip)))

    def close(self) -> None:
        """Ends all processes at once."""
        for part in self.parts:
            part.close()

    def call(self, name: str, argument) -> list:
        """Calls a method of every ProcessEnv with one argument. Returns their N results."""
        return self.call_some(name, argument, [True] * self.num_envs)

    def ask(self, method: Callable, *inputs, **kwargs):
        """Calls a method of a half. All processes end where it raises.

        Raises UserError where a process is gone.
        """
        try:
            return method(*inputs, **kwargs)
        except Exception as error:
            # The other processes may be at work on results that nobody will ask for.
            self.close()
            # A closed pipe means that the process at its other end is gone.
            if not isinstance(error, (EOFError, ConnectionError)):
                raise
            raise UserError(
                "an env process died (memory full, or killed): lower --num-envs (and raise "
                "sta_ppo.py's --num-steps by as much); a training run goes on with --resume and "
                "its --output-dir"
            ) from None

    def join(self, parts: list):
        """The halves' tuples, dicts and tensors as those of all envs.

        None stands for what a half lacks, as `final_obs` where none of its episodes has ended. It
        becomes zeros.
        """
        # At least one half has it, and tells its type.
        like = next(part for part in parts if part is not None)
        if isinstance(like, tuple):
            return tuple(self.join(list(column)) for column in zip(*parts))
        if isinstance(like, dict):
            dicts = [part or {} for part in parts]
            names = dict.fromkeys(name for part in dicts for name in part)
            return {name: self.join([part.get(name) for part in dicts]) for name in names}
        rows = []
        for part, half in zip(parts, self.halves):
            if part is None:
                part = like.new_zeros(half.stop - half.start, *like.shape[1:])
            rows.append(part)
        return torch.cat(rows)


# ---- what scripts use ----
def last_states(info: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Which episodes a step has ended (n,), and stage and success (n,) of the states it led to.

    info: of the step. Where it has ended an episode, it has led to the episode's last state.
    """
    ended = info["_final_info"]
    stage = info["stage"].clone()
    success = torch.zeros_like(ended)
    if ended.any():
        stage[ended] = info["final_info"]["stage"][ended]
        success[ended] = info["final_info"]["success"][ended]
    return ended, stage, success


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    terminate_on_success: bool = True,
    *,
    backend: str = "cpu",
    full_meshes: bool = False,
    **kwargs,
) -> StageEnv | StageVectorEnv:
    """N vectorised envs of a task. Their methods: see StageEnv.

    backend: "cpu" (one process per env) or "cuda" (ManiSkill's GPU simulation). kwargs: of
    StageEnv. On the CPU an explicitly seeded episode is a function of its seed. GPU simulation
    draws a whole batch from its first seed.
    Raises UserError on an unknown env id, num_envs < 1, missing assets, no renderer, or a dense
    reward where ManiSkill has none.
    """
    if num_envs < 1:
        raise UserError(f"--num-envs must be at least 1, not {num_envs}")
    # On the GPU some tasks cannot end an episode at success. Without that every task works.
    checked_backend = backend if terminate_on_success else "cpu"
    render = kwargs.get("render", True)
    reward = kwargs.get("reward", "sparse")
    check_world(env_id, full_meshes, render, checked_backend, reward)

    kwargs["terminate_on_success"] = terminate_on_success
    kwargs["full_meshes"] = full_meshes
    # ManiSkill takes no larger seeds.
    seed %= 2**32 - num_envs
    if backend == "cuda":
        return StageEnv(env_id, num_envs, backend, seed, **kwargs)
    return StageVectorEnv(env_id, num_envs, seed, **kwargs)


class ScriptedExpert:
    """Solves a task stage by stage from the simulator's state. envs: what make_envs returns."""

    def __init__(self, envs: StageEnv | StageVectorEnv):
        self.envs = envs

    def act(self, slip: Tensor | None = None) -> Tensor:
        """Actions (N, A) for the present states, as `envs.step` takes them.

        They are a function of the state alone, so the expert needs no reset.
        slip: (N,) long. The expert plays the stage that many after the present one, modulo K: 0 is
        right, and everything else is a mistake to recover from. None: the right stage everywhere.
        """
        if slip is None:
            slip = torch.zeros(self.envs.num_envs, dtype=torch.long)
        return self.envs.expert_action(slip)
