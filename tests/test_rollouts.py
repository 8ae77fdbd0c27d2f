"""What the scripts take from the simulator: PPO's buffer, roll-outs for pairs, demonstrations."""

import dataclasses
import functools
import json
import math

import h5py
import numpy as np
import pytest
import torch
from conftest import (
    STATS,
    TASK,
    call,
    differing,
    needs_assets,
    prompt,
    record_steps,
    scalars,
    tensors,
)

import sft
import sta_ppo
import sta_tpo
import vla
import world.demos
from plumbing.checkpoint import load_policy, load_separator, read_state
from world.demos import collect_demos, read_demos
from world.envs import StageEnv
from world.tasks import TASKS, TRAIN_SEEDS, UserError
from world.vector import ScriptedExpert

ACTIVE = ~vla.constant_dims(STATS["action"])
K = len(TASK.stages)
CPU = torch.device("cpu")
TPO_ARGS = {"num_envs": 2, "num_initial_states": 2, "rollouts_per_state": 3}


class AllAtOnce:
    """The shared simulators as sta_ppo.py sees them here: all envs move at once.

    They move by `step` and begin by `reset`, which tests record. They are never closed.
    """

    def __init__(self, envs):
        self.envs = envs
        self.num_envs = envs.num_envs
        self.halves = [slice(0, envs.num_envs)]

    def reset(self, seed=None):
        return self.envs.reset(seed)

    def send(self, half, actions):
        self.arrived = self.envs.step(actions)

    def receive(self, half):
        return self.arrived

    def close(self):
        pass


@pytest.fixture
def ppo(checkpoint, envs, tmp_path, monkeypatch):
    """sta_ppo.main with the shared simulators, so without their start; returns the run folder."""
    monkeypatch.setattr(sta_ppo, "make_envs", lambda *args, **kwargs: AllAtOnce(envs))

    def run(name, updates=1, steps=20, *args):
        numbers = ("--num-steps", steps, "--total-timesteps", 2 * steps * updates)
        flags = "--num-envs 2 --num-minibatches 2 --critic-warmup 0 --num-eval-episodes 0 --no-cuda"
        folders = ("--checkpoint", checkpoint, "--output-dir", tmp_path / name)
        call(sta_ppo, *folders, *flags.split(), *numbers, *args)
        return tmp_path / name

    return run


@pytest.fixture
def tpo_envs(envs, monkeypatch):
    """The shared simulators as those of sta_tpo.py, which must not close them."""
    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(sta_tpo, "make_envs", lambda *args, **kwargs: envs)
    return envs


def sample(checkpoint, folder, **args):
    """sta_tpo.py's roll-outs of a checkpoint, sampled and read."""
    model, processor, _ = load_policy(str(checkpoint), CPU)
    codec = vla.Codec(processor, TASK.instruction, STATS, model.config.n_action_bins, CPU)
    size = processor.image_size
    files = sta_tpo.collect_rollouts(folder, model, codec, ACTIVE, size, sta_tpo.Args(**args))
    return sta_tpo.read_rollouts(files)


def expert_and_dropper(envs):
    """A policy, as tokens, whose env 0 acts as the expert and whose env 1 drops the cube.

    Env 1 acts as the expert up to the last stage, lets the cube fall there, and waits.
    """
    expert = ScriptedExpert(envs)
    steps_since_drop = 0

    def act(stage: torch.Tensor) -> torch.Tensor:
        nonlocal steps_since_drop
        if steps_since_drop or int(stage[1]) == K - 1:
            steps_since_drop += 1
        actions = expert.act()
        if steps_since_drop:
            # The arm rises first, because an arm at rest would make it a success.
            actions[1] = torch.tensor([0, 0, steps_since_drop < 5, 0, 0, 0, 1])
        return vla.tokenize_actions(actions, STATS["action"])

    return act


# ---- PPO's buffer ----
def record_ppo(envs, monkeypatch):
    """Records a roll-out of sta_ppo.py that acts as `expert_and_dropper`.

    Returns `trace`: what the last reset returned and then every step; `seen`: what the advantages
    are computed from, and `head`, the value head's weights at that moment; and the class of that
    value head, whose last layer is random.
    """
    trace = []
    seen = {}
    heads = []
    step, reset = envs.step, envs.reset
    sample_action, compute_gae = sta_ppo.sample_action, sta_ppo.compute_gae
    policy = expert_and_dropper(envs)

    def record_reset(seed=None):
        trace[:] = [reset(seed)]
        return trace[0]

    def record_step(actions):
        trace.append(step(actions))
        return trace[-1]

    def act(model, inputs, active, **kwargs):
        return policy(trace[-1][-1]["stage"]), *sample_action(model, inputs, active)[1:]

    def record_gae(*args):
        seen.update(zip(("rewards", "values", "next_values", "terminated", "done"), args))
        seen["head"] = {name: value.clone() for name, value in heads[0].state_dict().items()}
        return compute_gae(*args)

    class RandomHead(sta_ppo.ValueHead):
        """The value head's last layer begins at zero, which would hide the bootstrap."""

        def __init__(self, width):
            super().__init__(width)
            torch.nn.init.normal_(self.last.weight)
            heads.append(self)

    monkeypatch.setattr(sta_ppo, "sample_action", act)
    monkeypatch.setattr(sta_ppo, "compute_gae", record_gae)
    monkeypatch.setattr(sta_ppo, "ValueHead", RandomHead)
    monkeypatch.setattr(envs, "reset", record_reset)
    monkeypatch.setattr(envs, "step", record_step)
    return trace, seen, RandomHead


def episode_row(trace, seen, potential, i: int, begin: int, end: int) -> dict[str, float]:
    """What the log must say about env i's episode of the steps begin + 1 to end, at gamma 0.9."""
    states = [trace[t][-1] for t in range(begin + 1, end + 1)]
    final = trace[end + 1][-1]["final_info"]
    labels = [int(infos["stage"][i]) for infos in states]
    won = bool(seen["terminated"][end, i])
    T = end - begin
    # The sum of r' telescopes: the shaping adds Phi at the end, less Phi at the beginning. Phi is 0
    # at a terminal end.
    total = 0.9 ** (T - 1) if won else 0.5 * 0.9**T * potential(final)[i]
    paid = (seen["rewards"][begin + 1 : end + 1, i] - won_at_end(T, won)).tolist()
    row = {
        "charts/success_once": won,
        "charts/success_at_end": won,
        "charts/episodic_return": won,
        "charts/shaped_return": float(total - 0.5 * potential(states[0])[i]),
        "charts/episodic_length": T,
        "charts/furthest_stage": K if won else max(labels),
    }
    for k, stage in enumerate(TASK.stage_table):
        costs = []
        for infos, label in zip(states, labels):
            if label == k:
                costs.append(float(infos["stage_distance"][i]) / stage.length)
        row[f"stage/{k}_{stage.name}_reached"] = won or max(labels) > k
        row[f"stage/{k}_{stage.name}_steps"] = len(costs)
        row[f"stage/{k}_{stage.name}_paid"] = sum(paid[t] for t in range(T) if labels[t] == k)
        row[f"stage/{k}_{stage.name}_cost"] = np.mean(costs or np.nan)
    return row


def won_at_end(T: int, won: bool) -> torch.Tensor:
    """The env's own rewards (T,) of an episode."""
    return torch.tensor([0.0] * (T - 1) + [float(won)])


def potential_of(infos, silent: str) -> torch.Tensor:
    """Phi of states, which is k in a silent stage."""
    is_silent = [name in silent.split(",") for name in (*TASK.stages, "done")]
    of_silent = torch.tensor(is_silent)[infos["stage"]]
    return infos["potential"] * ~of_silent + infos["stage"] * of_silent


def check_logged_means(run, rows: list[dict]) -> None:
    """The run has logged the means of these episodes once, without the numbers they lack."""
    curves = scalars(run)
    for key in rows[0]:
        mean = np.nanmean([row[key] for row in rows])
        assert curves[key] == pytest.approx([mean], abs=1e-5), key


@pytest.mark.parametrize(("silent", "whole"), [("", 1), ("reach,transport", 2)])
def test_ppo_shapes_and_bootstraps_with_the_true_next_state(
    silent, whole, ppo, envs, checkpoint, monkeypatch
):
    """Env 0 succeeds twice, env 1 is truncated; the roll-out goes on into their next episodes.

    The first episode of each env counts. Where PPO takes the horizon to be 19 steps, the first two
    count.
    """
    horizon = 38 if whole == 1 else 19
    monkeypatch.setitem(TASKS, "PickCube-v1", dataclasses.replace(TASK, max_episode_steps=horizon))
    trace, seen, RandomHead = record_ppo(envs, monkeypatch)
    run = ppo("run", 1, 38, "--shaping-weight", 0.5, "--gamma", 0.9, "--silent-stages", silent)

    head = RandomHead(64)
    head.load_state_dict(seen["head"])
    model, processor, _ = load_policy(str(checkpoint), CPU)

    @torch.no_grad()
    def value(obs):
        hidden = model(**prompt(processor, obs), logits_to_keep=1).last_hidden_state[:, -1]
        return head(hidden, torch.zeros(len(hidden)))

    potential = functools.partial(potential_of, silent=silent)
    infos = trace[0][1]
    if not silent:
        assert all(torch.equal(potential(step[-1]), step[-1]["potential"]) for step in trace)
    for t, (obs, reward, terminated, truncated, next_infos) in enumerate(trace[1:39]):
        done = terminated | truncated
        assert torch.equal(seen["terminated"][t], terminated) and torch.equal(seen["done"][t], done)
        phi, v = potential(next_infos), value(obs)
        if done.any():
            phi[done] = potential(next_infos["final_info"])[done]
            v[done] = value(next_infos["final_obs"])[done]
        expected = reward + 0.5 * (0.9 * phi * ~terminated - potential(infos))
        assert torch.allclose(seen["rewards"][t], expected, atol=1e-6), t
        assert torch.allclose(seen["next_values"][t], v, atol=1e-4), t
        infos = next_infos
    # Both kinds of ending were there, and they were no ordinary steps.
    assert seen["terminated"].any(0).tolist() == [True, False] and seen["done"][29, 1]
    jumps = (seen["values"][1:] - seen["next_values"][:-1])[seen["done"][:-1]]
    assert jumps.abs().min() > 1e-3

    rows = []
    for i in range(2):
        ends = [-1, *seen["done"][:, i].nonzero()[:, 0].tolist()]
        for begin, end in list(zip(ends, ends[1:]))[:whole]:
            rows.append(episode_row(trace, seen, potential, i, begin, end))
    furthest = [row["charts/furthest_stage"] for row in rows]
    assert len(rows) == 1 + whole and furthest == [K] * whole + [K - 1]
    check_logged_means(run, rows)


def test_ppo_pays_what_a_step_gains_and_goes_on_at_the_horizon(ppo, envs, monkeypatch):
    """Env 0 succeeds, where Phi is K. Env 1 is truncated, where V is bootstrapped."""
    task = dataclasses.replace(TASK, max_episode_steps=38)
    monkeypatch.setitem(TASKS, "PickCube-v1", task)
    trace, seen, _ = record_ppo(envs, monkeypatch)
    ppo("run", 1, 38, *"--shaping-weight 0.5 --gamma 0.9 --stage-reward gain".split())
    endings = torch.stack([step[2] for step in trace[1:39]])
    assert torch.equal(seen["terminated"], endings)
    assert not torch.equal(endings, seen["done"]), "no episode was truncated"
    for t, (_, env_reward, _, _, infos) in enumerate(trace[1:39]):
        done = seen["done"][t]
        phi = infos["potential"].clone()
        if done.any():
            phi[done] = infos["final_info"]["potential"][done]
        paid = 0.5 * (phi - trace[t][-1]["potential"])
        assert torch.allclose(seen["rewards"][t], env_reward + paid, atol=1e-6), t


@pytest.mark.parametrize("form", ["progress", "paced"])
def test_ppo_pays_by_progress_or_pace_and_ends_at_the_horizon(
    form, ppo, envs, checkpoint, monkeypatch
):
    """Env 0 succeeds, env 1 is truncated. The critic sees the time."""
    pace = (4.0, 3.0, 5.0, 2.0)
    task = dataclasses.replace(TASK, max_episode_steps=38, pace=pace)
    monkeypatch.setitem(TASKS, "PickCube-v1", task)
    trace, seen, RandomHead = record_ppo(envs, monkeypatch)
    run = ppo("run", 1, 38, *f"--shaping-weight 0.5 --gamma 0.9 --stage-reward {form}".split())
    head = RandomHead(64)
    # The first update moves the clock's weight away from 0.
    head.load_state_dict(seen["head"])
    assert len(tensors(run / "checkpoint")["value_head.safetensors/clock_weight"].unique()) > 1
    assert torch.equal(seen["terminated"], seen["done"])
    endings = torch.stack([step[2] for step in trace[1:39]])
    assert not torch.equal(endings, seen["done"]), "no episode was truncated"

    furthest = trace[0][1]["stage"] % K
    steps = torch.zeros(2)
    for t, (_, env_reward, _, _, infos) in enumerate(trace[1:39]):
        before = trace[t][-1]
        done = seen["done"][t]
        stage, phi = infos["stage"].clone(), infos["potential"].clone()
        if done.any():
            stage[done] = infos["final_info"]["stage"][done]
            phi[done] = infos["final_info"]["potential"][done]
        paid = 0.5 * (0.9 * phi - before["potential"])
        if form == "paced":
            steps += 1
            completes = stage > furthest
            expert_steps = torch.tensor([*pace, 1.0])[furthest]
            paid = torch.where(completes, 0.5 / (1 + steps / expert_steps), 0.0)
            furthest = torch.where(completes, stage, furthest)
            steps[completes] = 0
        furthest[done] = infos["stage"][done] % K
        steps[done] = 0
        assert torch.allclose(seen["rewards"][t], env_reward + paid, atol=1e-6), t


def test_shaping_weight_0_is_plain_ppo_bit_for_bit_and_the_default_is_not(ppo):
    sparse = ppo("sparse", 1, 20, "--reward", "sparse")
    zero = ppo("zero", 1, 20, "--shaping-weight", 0, "--stage-reward", "progress")
    stare = ppo("stare")
    default = ppo("default", 1, 20, "--shaping-weight", 1 / K)
    assert differing(sparse / "checkpoint", zero / "checkpoint") == []
    assert differing(sparse / "checkpoint", stare / "checkpoint")
    assert differing(default / "checkpoint", stare / "checkpoint") == []


def test_episodes_are_counted_by_whole_rounds(ppo):
    """A round is two updates of 30 steps here, because the task's horizon is 50.

    Episodes end after 30, as quick successes would. So the first update alone has seen some end,
    and had it been logged, it would have reported these alone.
    """
    curves = scalars(ppo("run", 3, 30))
    keys = ("losses/entropy", "charts/success_once", "stage/0_reach_steps")
    assert [len(curves[key]) for key in keys] == [3, 2, 2]
    assert len(read_state(ppo("cut", 1, 30) / "checkpoint")["recent"]) == 0


def test_a_critic_that_says_nothing_explains_nothing(ppo):
    curves = scalars(ppo("run", 1, 20, "--reward", "sparse"))
    assert curves["losses/explained_variance"] == [0]


def test_target_kl_ends_the_epochs(ppo):
    stopped = ppo("stopped", 1, 20, "--update-epochs", 3, "--target-kl", 0)
    one = ppo("one", 1, 20, "--update-epochs", 1)
    assert differing(stopped / "checkpoint", one / "checkpoint") == []


def test_a_resumed_adapter_is_the_trained_one(ppo, checkpoint):
    lora = ("--lora-rank", 2, "--num-minibatches", 1)
    trained = tensors(ppo("run", 1, 20, *lora, "--learning-rate", 0.01) / "checkpoint")
    kept = tensors(ppo("run", 2, 20, *lora, "--learning-rate", 0, "--resume") / "checkpoint")
    start = tensors(checkpoint / "checkpoint")
    policy = [name for name in trained if name.startswith("model.")]
    assert all(torch.equal(trained[name], kept[name]) for name in policy)
    assert not all(torch.equal(trained[name], start[name]) for name in policy)


# ---- PPO's update ----
def record_updates(monkeypatch):
    """Records of each update of sta_ppo.py what it learns from: its buffer and its batch."""
    buffers = []
    batches = []
    gae, normalize = sta_ppo.compute_gae, sta_ppo.normalize

    def record_gae(*args):
        advantages, returns = gae(*args)
        buffer = {"advantages": advantages, "returns": returns, "values": args[1]}
        buffers.append({name: x.flatten().clone() for name, x in buffer.items()})
        return advantages, returns

    def record_stages(advantages, stages):
        # It calls itself for each stage.
        buffers[-1].setdefault("stages", stages)
        return normalize(advantages, stages)

    def record_batch(losses, output, batch):
        batches.append({name: x.clone() for name, x in batch.items()})

    monkeypatch.setattr(sta_ppo, "compute_gae", record_gae)
    monkeypatch.setattr(sta_ppo, "normalize", record_stages)
    monkeypatch.setattr(sta_ppo, "refuse_nan", record_batch)
    return buffers, batches


def flatten(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads])


UPDATE = (
    "--update-epochs 2 --num-minibatches 1 --kl-coef 0.3 --vf-coef 50 --max-grad-norm 1e9 "
    "--learning-rate 3e-4"
)


def policy_numbers(logprob, old, reference, A) -> dict[str, torch.Tensor]:
    """The policy's losses and what is logged about them, by the formulas of the docstring."""
    logratio = logprob - old
    ratio = logratio.exp()
    return {
        "policy_loss": -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).mean(),
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
        "kl_to_start": (logprob - reference).square().mean() / 2,
    }


@pytest.mark.parametrize("by_stage", [False, True])
def test_the_gradients_of_an_update_are_those_of_plain_autograd(
    by_stage, ppo, checkpoint, monkeypatch
):
    """The real main, in three updates of two epochs each, against the docstring's loss.

    The loss is written here a second time. What main logs about it is compared too.
    """
    normalize = sta_ppo.normalize
    seen = record_steps(monkeypatch)
    buffers, batches = record_updates(monkeypatch)
    by = ["--stage-advantage"] if by_stage else []
    curves = scalars(ppo("run", 3, 20, *UPDATE.split(), *by))
    assert len(seen) == 6 and curves["charts/learning_rate"] == pytest.approx([3e-4, 2e-4, 1e-4])
    start, processor, _ = load_policy(str(checkpoint), CPU)
    model, _, _ = load_policy(str(checkpoint), CPU)
    head = sta_ppo.ValueHead(64)
    params = [*model.parameters(), *head.parameters()]
    for update, (buffer, batch) in enumerate(zip(buffers, batches, strict=True)):
        advantages, returns, values, stages = buffer.values()
        assert (stages is not None) == by_stage
        assert not by_stage or len(stages) == len(advantages)
        inputs = prompt(processor, batch)
        A = normalize(advantages, stages)
        rows = []
        with torch.no_grad():
            reference = sta_ppo.action_logprob(start, inputs, batch["bins"], ACTIVE)[0]
        for epoch, (_, state) in enumerate(seen[2 * update : 2 * update + 2]):
            for p, (value, _) in zip(params, state, strict=True):
                p.data.copy_(value)
                p.grad = None
            logprob, entropy, hidden, _ = sta_ppo.action_logprob(
                model, inputs, batch["bins"], ACTIVE
            )
            if epoch == 0:
                old = logprob.detach()
            v_loss = (head(hidden, torch.zeros(len(hidden))) - returns).square().mean() / 2
            row = policy_numbers(logprob, old, reference, A)
            row |= {"value_loss": v_loss, "entropy": entropy.mean()}
            (row["policy_loss"] + 50 * v_loss + 0.3 * row["kl_to_start"]).backward()
            mine = flatten([p.grad for p in params])
            theirs = flatten([grad for _, grad in state])
            assert (mine - theirs).norm() < 1e-4 * mine.norm(), (update, epoch)
            row["grad_norm"] = mine.norm()
            rows.append({name: x.item() for name, x in row.items()})
        expected = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        expected["advantage_std"] = advantages.std().item()
        expected["explained_variance"] = 1 - ((returns - values).var() / returns.var()).item()
        found = {name: curves[f"losses/{name}"][update] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert 0 < row["clipfrac"] < 1 and row["kl_to_start"] > 1e-4 and values.var() > 0


def test_chunks_and_gradient_checkpointing_change_no_gradient(ppo):
    one = ("--update-epochs", 1, "--num-minibatches", 1)
    whole = scalars(ppo("whole", 1, 20, *one))
    parts = scalars(ppo("parts", 1, 20, *one, "--chunk-size", 7, "--gradient-checkpointing"))
    names = "grad_norm policy_loss value_loss entropy approx_kl first_ratio advantage_std"
    for name in names.split():
        expected = pytest.approx(whole[f"losses/{name}"], rel=1e-4, abs=1e-6)
        assert parts[f"losses/{name}"] == expected, name
    assert whole["losses/grad_norm"][0] > 1e-3


@pytest.mark.slow
def test_an_episode_of_dense_reward_goes_on_after_success_and_pays_1_at_most(
    checkpoint, tmp_path, monkeypatch
):
    seen = {}
    gae = sta_ppo.compute_gae

    def record(rewards, *args):
        seen.update(rewards=rewards, terminated=args[2], done=args[3])
        return gae(rewards, *args)

    monkeypatch.setattr(sta_ppo, "compute_gae", record)
    flags = (
        "--reward dense --num-envs 2 --num-steps 50 --num-minibatches 2 --total-timesteps 100 "
        "--num-eval-episodes 0 --no-cuda"
    )
    run = tmp_path / "run"
    call(sta_ppo, "--checkpoint", checkpoint, *flags.split(), "--output-dir", run)
    rewards = seen["rewards"]
    (paid,) = scalars(run)["charts/episodic_return"]
    assert not seen["terminated"].any() and seen["done"][-1].all()
    assert (rewards > 0).all() and (rewards.sum(0) < 1).all()
    assert paid == pytest.approx(50 * rewards.sum(0).mean().item(), rel=1e-4)


# ---- PPO with learned stages, and resumed ----
def blind(envs, monkeypatch) -> list[dict]:
    """Makes the potentials that the simulators report NaN. Returns the observations, recorded."""
    seen = []
    step, reset = envs.step, envs.reset

    def hide(infos):
        infos["potential"] = torch.full_like(infos["potential"], torch.nan)

    def blind_reset(seed=None):
        obs, infos = reset(seed)
        hide(infos)
        seen.append(obs)
        return obs, infos

    def blind_step(actions):
        obs, *rest, infos = step(actions)
        hide(infos)
        if "final_info" in infos:
            hide(infos["final_info"])
        seen.append(obs)
        return obs, *rest, infos

    monkeypatch.setattr(envs, "reset", blind_reset)
    monkeypatch.setattr(envs, "step", blind_step)
    return seen


def test_learned_stages_shape_the_reward_and_the_simulator_s_potential_is_not_read(
    ppo, envs, checkpoint, monkeypatch
):
    """With LoRA and a KL to the first policy: the reference is the model without its adapter."""
    potentials = []
    reset, shape = envs.reset, sta_ppo.shape_rewards
    seen = blind(envs, monkeypatch)

    def shape_and_record(rewards, phi, next_phi, *args):
        potentials.append((phi.clone(), next_phi.clone()))
        return shape(rewards, phi, next_phi, *args)

    monkeypatch.setattr(sta_ppo, "shape_rewards", shape_and_record)
    folder, separator = load_separator(checkpoint / "checkpoint", "PickCube-v1", CPU)
    model, processor, _ = load_policy(folder, CPU)

    @torch.no_grad()
    def hidden_of(obs):
        return model(**prompt(processor, obs), logits_to_keep=1).last_hidden_state[:, -1]

    # An untrained separator would see one stage everywhere.
    separator.bias.data = -separator.weight @ hidden_of(reset(1)[0]).mean(0)
    monkeypatch.setattr(sta_ppo, "require_separator", lambda *args: (folder, separator))
    # Inside an update of one minibatch nothing moves away from the roll-out's policy.
    flags = (
        "--stage-source learned --kl-coef 0.5 --lora-rank 2 --learning-rate 0.01 --no-anneal-lr "
        "--update-epochs 1 --num-minibatches 1"
    )
    run = ppo("run", 2, 20, *flags.split())
    labels = [separator(hidden_of(obs)).argmax(-1).float() for obs in seen[:21]]
    assert len(torch.cat(labels).unique()) > 1
    # No episode ends, because these are 20 steps of 30.
    for t, (phi, next_phi) in enumerate(potentials[:20]):
        assert torch.equal(phi, labels[t]) and torch.equal(next_phi, labels[t + 1])
    curves = scalars(run)
    assert all(abs(ratio - 1) < 1e-4 for ratio in curves["losses/first_ratio"])
    assert curves["losses/kl_to_start"][1] > 1e-2
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    with pytest.raises(UserError, match="--lora-rank = 2, not 0"):
        ppo("run", 4, 20, "--resume")


def test_ppo_resumes_from_a_checkpoint_between_fresh_starts(ppo, capsys):
    """Episodes of 50 steps begin again every third update of 20 steps.

    The last update of a run need not be such a one.
    """
    ppo("run", 1)
    before = tensors(ppo("run", 1, 20, "--resume") / "checkpoint")
    assert "other settings" not in capsys.readouterr().out
    after = tensors(ppo("run", 2, 20, "--resume") / "checkpoint")
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert "--total-timesteps 40 -> 80" in capsys.readouterr().out
    with pytest.raises(UserError, match="num_steps \\* processes = 40, not 20"):
        ppo("run", 4, 10, "--resume")
    with pytest.raises(UserError, match="was begun from .*, not from /another"):
        ppo("run", 4, 20, "--resume", "--checkpoint", "/another")


# ---- STA-TPO's roll-outs ----
def test_rollouts_begin_in_the_state_they_are_named_after_and_a_stopped_collection_goes_on(
    checkpoint, tpo_envs, tmp_path
):
    folder = tmp_path / "rollouts"
    starts = {}
    for rollout in sample(checkpoint, folder, **TPO_ARGS):
        starts.setdefault(rollout["init_seed"], []).append(rollout)
        arrays = [rollout[name] for name in ("stage", "bins", "rgb", "distance")]
        assert [len(array) for array in arrays] == [30] * 4 and not rollout["success"]
        assert rollout["stage"].min() >= 0 and rollout["stage"].max() < K
        assert (rollout["distance"] >= 0).all()
    assert [len(group) for group in starts.values()] == [3, 3]
    assert all(0 <= seed < TRAIN_SEEDS for seed in starts)
    obs, infos = tpo_envs.reset(seed=list(starts))
    lengths = torch.tensor([stage.length for stage in TASK.stage_table])
    for i, group in enumerate(starts.values()):
        distance = infos["stage_distance"][i] / lengths[infos["stage"][i]]
        for rollout in group:
            assert torch.equal(rollout["rgb"][0], obs["rgb"][i])
            assert torch.equal(rollout["proprio"][0], obs["proprio"][i])
            assert torch.allclose(rollout["distance"][0], distance)
        assert not torch.equal(group[0]["bins"], group[1]["bins"])
    # The recorded tokens are what was done.
    first = [group[0] for group in starts.values()]
    for t in range(1, 4):
        bins = torch.stack([rollout["bins"][t - 1] for rollout in first])
        obs, *_ = tpo_envs.step(vla.detokenize_actions(bins, STATS["action"]))
        recorded = torch.stack([rollout["proprio"][t] for rollout in first])
        assert torch.equal(obs["proprio"], recorded)

    files = sorted(folder.iterdir())
    kept = {file: file.stat().st_mtime_ns for file in files[2:]}
    for file in files[:2]:
        file.unlink()
    sample(checkpoint, folder, **TPO_ARGS)
    assert sorted(folder.iterdir()) == files
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())


def test_a_rollout_keeps_the_stages_and_distances_of_its_segments_and_its_own_success(
    checkpoint, tpo_envs, tmp_path, monkeypatch
):
    """Env 1 begins where success holds already, and later loses the cube.

    Its episode begins in the first stage. After the loss the distance stays that of the furthest
    stage.
    """
    trace = []
    step, reset = tpo_envs.step, tpo_envs.reset
    policy = expert_and_dropper(tpo_envs)

    def record(found):
        infos = found[-1]
        trace.append({name: infos[name].clone() for name in ("stage", "distances")})
        if len(trace) == 1:
            infos["stage"][1] = K
            trace[0]["stage"][1] = K
        return found

    def act(*args):
        return policy(trace[-1]["stage"]), None, None

    monkeypatch.setattr(tpo_envs, "reset", lambda seed: record(reset(seed)))
    monkeypatch.setattr(tpo_envs, "step", lambda actions: record(step(actions)))
    monkeypatch.setattr(sta_tpo, "sample_action", act)
    folder = tmp_path / "rollouts"
    rollouts = sample(checkpoint, folder, num_envs=2, num_initial_states=1, rollouts_per_state=2)
    assert [rollout["success"] for rollout in rollouts] == [True, False]
    assert len(rollouts[0]["stage"]) < len(rollouts[1]["stage"]) == 30
    for i, rollout in enumerate(rollouts):
        stages = [int(infos["stage"][i]) for infos in trace[: len(rollout["stage"])]]
        if i == 1:
            stages[0] = 0
        assert rollout["stage"].tolist() == stages and max(stages) == K - 1
        distances = []
        for t, k in enumerate(np.maximum.accumulate(stages)):
            distances.append(trace[t]["distances"][i, k].item() / TASK.stage_table[k].length)
        assert rollout["distance"].tolist() == pytest.approx(distances)
    # Env 1 fell back.
    assert min(stages[-5:]) < K - 1


def test_processes_share_the_rollouts(tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    seen = []

    def progress(*args, **kwargs):
        seen.append(kwargs["total"])
        raise Enough

    monkeypatch.setattr(sta_tpo, "make_envs", lambda *args, **kwargs: None)
    monkeypatch.setattr(sta_tpo, "Progress", progress)
    args = sta_tpo.Args(num_initial_states=2, rollouts_per_state=3)
    threads = torch.get_num_threads()
    with pytest.raises(Enough):
        sta_tpo.collect_rollouts(tmp_path / "r", None, None, None, 128, args, 1, 2)
    torch.set_num_threads(threads)
    assert seen == [3]


def test_more_initial_states_begin_with_the_same_ones():
    few = sta_tpo.rollout_jobs(sta_tpo.Args(num_initial_states=3, rollouts_per_state=2))
    more = sta_tpo.rollout_jobs(sta_tpo.Args(num_initial_states=50, rollouts_per_state=2))
    assert more[:6] == few
    assert len(set(more)) == 100 and max(seed for seed, _ in more) < TRAIN_SEEDS


def test_verdicts_need_the_roll_outs_that_were_judged(tmp_path):
    args = sta_tpo.Args(num_initial_states=2, rollouts_per_state=2, preferences="pairs.jsonl")
    with pytest.raises(UserError, match="lacks roll-outs that were judged"):
        sta_tpo.collect_rollouts(tmp_path / "rollouts", None, None, None, 128, args)


# ---- demonstrations ----
def read_arrays(path, i: int, *names: str) -> dict[str, np.ndarray]:
    """The arrays of a file's demonstration i."""
    with h5py.File(path) as file:
        return {name: file[f"traj_{i}"][name][:] for name in names}


def read_pictures(path, i: int) -> np.ndarray:
    with h5py.File(path) as file:
        return file[f"traj_{i}/obs/sensor_data/base_camera/rgb"][:]


def test_demonstrations_are_what_the_simulator_did_and_their_labels_are_clean(sft_run, envs):
    path = sft_run / "demos_PickCube-v1.h5"
    episodes = json.loads(path.with_suffix(".json").read_text())["episodes"][:2]
    names = ("actions", "expert_actions", "obs/proprio", "success")
    demos = [read_arrays(path, i, *names) for i in range(2)]
    frames = [read_pictures(path, i) for i in range(2)]
    slipped = False
    for demo, rgb, episode in zip(demos, frames, episodes):
        length = episode["elapsed_steps"]
        assert len(demo["actions"]) == length
        assert len(rgb) == len(demo["obs/proprio"]) == length + 1
        assert demo["success"].tolist() == [False] * (length - 1) + [True]
        moved = demo["actions"] != demo["expert_actions"]
        slip = moved[:, -1]
        # The noise is on the motion alone.
        assert moved[:, :3].any() and not moved[~slip, 3:].any() and not moved[:, 3:5].any()
        demo["still"] = ~demo["expert_actions"][:, :-1].any(-1)
        # A pause is both played and the label.
        assert not moved[demo["still"]].any()
        slipped |= slip.any()
    # A wrong stage was played, and the label is right.
    assert slipped
    assert 0.05 < np.concatenate([demo["still"] for demo in demos]).mean() < 0.6

    obs, _ = envs.reset(seed=[episode["episode_seed"] for episode in episodes])
    speed = sft.Args().demo_speed
    # The replay is exact until the gripper closes. After an auto-reset the solver's contacts are
    # the same only to some 1e-4.
    free = [True, True]
    for t in range(min(29, *(episode["elapsed_steps"] - 1 for episode in episodes))):
        labels = ScriptedExpert(envs).act()
        labels[:, :3] = labels[:, :3].clamp(-speed, speed)
        for i, demo in enumerate(demos):
            free[i] &= demo["actions"][t, -1] > 0
            proprio = demo["obs/proprio"][t]
            assert np.allclose(obs["proprio"][i], proprio, atol=5e-3), (i, t)
            if free[i]:
                assert np.array_equal(obs["proprio"][i], proprio), (i, t)
                assert np.array_equal(obs["rgb"][i], frames[i][t]), (i, t)
                # In a pause only the gripper's command is the expert's.
                dims = slice(-1, None) if demo["still"][t] else slice(None)
                label = demo["expert_actions"][t, dims]
                assert np.allclose(labels[i, dims], label, atol=1e-6), (i, t)
        actions = np.stack([demo["actions"][t] for demo in demos])
        obs, *_ = envs.step(torch.from_numpy(actions))


def test_labels_and_frames_that_are_trained_on_are_those_before_the_action(sft_run, envs):
    path = sft_run / "demos_PickCube-v1.h5"
    names = ("actions", "expert_actions", "geometry", "stage", "obs/proprio")
    demos = [read_arrays(path, i, *names) for i in range(3)]
    _, proprio, actions, where, stage = read_demos(path, "PickCube-v1", 3)
    whole = {}
    for name in names:
        whole[name] = np.concatenate([demo[name][: len(demo["actions"])] for demo in demos])
    assert np.array_equal(actions, whole["expert_actions"])
    assert np.array_equal(proprio, whole["obs/proprio"])
    assert np.array_equal(where, whole["geometry"])
    assert np.array_equal(stage, whole["stage"])
    config = json.loads((sft_run / "checkpoint/config.json").read_text())
    stats = config["norm_stats"]["PickCube-v1"]
    assert stats["action"]["q01"] == [-1, -1, -1, 0, 0, -1, -1]
    assert stats["action"]["q99"] == [1, 1, 1, 0, 0, 1, 1]
    std = proprio.std(0).clamp(min=1e-3).tolist()
    assert stats["proprio"]["std"] == pytest.approx(std, rel=1e-4)
    # Where there is neither slip nor pause, there is noise at every other step.
    plain = whole["actions"][:, -1] == whole["expert_actions"][:, -1]
    plain &= whole["expert_actions"][:, :-1].any(1)
    equal = whole["actions"][plain, :3] == whole["expert_actions"][plain, :3]
    assert 0.15 < equal.all(1).mean() < 0.75

    episodes = json.loads(path.with_suffix(".json").read_text())["episodes"][:2]
    _, infos = envs.reset(seed=[episode["episode_seed"] for episode in episodes])
    for t in range(12):
        for i, demo in enumerate(demos[:2]):
            assert infos["stage"][i] == demo["stage"][t], (t, i)
            assert np.allclose(infos["geometry"][i], demo["geometry"][t], atol=5e-3), (t, i)
        actions = np.stack([demo["actions"][t] for demo in demos[:2]])
        *_, infos = envs.step(torch.from_numpy(actions))


def test_a_twist_turns_the_tool_to_either_side_where_a_demonstration_begins_and_labels_stay_clean(
    envs, tmp_path, monkeypatch
):
    monkeypatch.setattr(world.demos, "make_envs", lambda *args, **kwargs: envs)
    monkeypatch.setattr(envs, "close", lambda: None)
    before = torch.get_rng_state()
    path = tmp_path / "demos.h5"
    mistakes = {"speed": 1.0, "noise": 0.0, "slip": 0.0, "pause": 0.0, "twist": 4}
    collect_demos(path, "PickCube-v1", 6, 2, 2, **mistakes, image_size=128)
    # The process that makes demonstrations begins to train with the same random numbers as the
    # other processes of a job, which only read them.
    assert torch.equal(torch.get_rng_state(), before)
    with h5py.File(path) as file:
        demos = [(group["actions"][:], group["expert_actions"][:]) for group in file.values()]
    twisted = [(actions != labels).any(1) for actions, labels in demos]
    assert not any(differs[4:].any() for differs in twisted)
    assert any(differs[:4].any() for differs in twisted)
    sides = set()
    for (actions, labels), differs in zip(demos, twisted, strict=True):
        steps = int(differs.nonzero()[0].max(initial=-1)) + 1
        # Everything but the turn goes on meanwhile.
        assert np.array_equal(np.delete(actions, 5, 1), np.delete(labels, 5, 1))
        turns = actions[:steps, 5]
        assert len(set(turns)) <= 1 and (abs(turns) == 1).all()
        sides |= set(turns)
    assert sides == {-1.0, 1.0}


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1")])
def test_a_recorded_state_of_an_arm_that_follows_a_target_shows_the_turn_that_it_lacks(
    env_id, monkeypatch
):
    """A file of states holds no target, so the tool's own pose must stand for it.

    The pose is a step or two behind. The target of the last reset would be wrong.
    """
    env, other = (StageEnv(env_id, 1, "cpu", seed, render=False) for seed in range(2))
    monkeypatch.setattr(other, "observation", lambda obs: {})
    for e in (env, other):
        e.reset(seed=[5])
    turns = []
    for _ in range(8):
        env.step(env.expert_action(torch.zeros(1, dtype=torch.long)))
        other.observe_state(env.base.get_state_dict())
        turns.append([float(e.state["yaw_error"]) for e in (env, other)])
    assert abs(turns[0][0]) > 1 and max(abs(a - b) for a, b in turns) < 0.3
