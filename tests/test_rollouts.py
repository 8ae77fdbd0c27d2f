"""What the scripts take from the simulator: PPO's buffer, roll-outs for pairs, demonstrations."""
import functools
import json
import math

import h5py
import numpy as np
import pytest
import torch
from conftest import STATS, TASK, call, differing, needs_assets, prompt, scalars, tensors

import sft
import sta_ppo
import sta_tpo
import stare_utils
import vla
from stare_utils import ScriptedExpert

ACTIVE, K = ~vla.constant_dims(STATS["action"]), len(TASK.stages)


@pytest.fixture
def ppo(checkpoint, envs, tmp_path, monkeypatch):
    """sta_ppo.main with the shared simulators, so without their start; returns the run folder."""
    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(sta_ppo, "make_envs", lambda *args, **kwargs: envs)
    monkeypatch.setattr(envs, "play", functools.partial(stare_utils.StageEnv.play, envs))  # all envs at once, by `step`, which tests record

    def run(name, updates=1, steps=20, *args):
        call(sta_ppo, "--checkpoint", checkpoint, "--num-envs", 2, "--num-steps", steps, "--num-minibatches", 2, "--total-timesteps", 2 * steps * updates,
             "--critic-warmup", 0, "--num-eval-episodes", 0, "--no-cuda", "--output-dir", tmp_path / name, *args)  # fmt: skip
        return tmp_path / name

    return run


@pytest.mark.parametrize("silent", ["", "reach,transport"])
def test_ppo_shapes_and_bootstraps_with_the_true_next_state(silent, ppo, envs, checkpoint, monkeypatch):
    """Env 0 acts as the expert and succeeds, env 1 waits until it is truncated; the roll-out goes on into their next episodes."""
    trace, seen, heads, step, reset, expert = [], {}, [], envs.step, envs.reset, ScriptedExpert(envs)
    sample_action, compute_gae = sta_ppo.sample_action, sta_ppo.compute_gae

    def record_reset(seed=None):
        trace[:] = [reset(seed)]
        return trace[0]

    def record_step(actions):
        trace.append(step(actions))
        return trace[-1]

    def act(model, inputs, active, **kwargs):
        bins = vla.tokenize_actions(torch.cat([expert.act()[:1], torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]])]), STATS["action"])
        return bins, *sample_action(model, inputs, active)[1:]

    def record_gae(*args):
        seen.update(zip(("rewards", "values", "next_values", "terminated", "done"), args))
        seen["head"] = {name: value.clone() for name, value in heads[0].state_dict().items()}
        return compute_gae(*args)

    class RandomHead(sta_ppo.ValueHead):  # its last layer begins at zero, which would hide the bootstrap
        def __init__(self, width):
            super().__init__(width)
            torch.nn.init.normal_(self.layers[-1].weight)
            heads.append(self)

    for name, value in (("sample_action", act), ("compute_gae", record_gae), ("ValueHead", RandomHead)):
        monkeypatch.setattr(sta_ppo, name, value)
    monkeypatch.setattr(envs, "reset", record_reset)
    monkeypatch.setattr(envs, "step", record_step)
    run = ppo("run", 1, 36, "--shaping-weight", 0.5, "--gamma", 0.9, "--silent-stages", silent)

    head = RandomHead(64)
    head.load_state_dict(seen["head"])
    model, processor, _ = sta_ppo.load_policy(str(checkpoint), torch.device("cpu"))

    @torch.no_grad()
    def value(obs):
        return head(model(**prompt(processor, obs), logits_to_keep=1).last_hidden_state[:, -1])

    def potential(infos):
        of_silent = torch.tensor([name in silent.split(",") for name in (*TASK.stages, "done")])[infos["stage"]]
        return infos["potential"] * ~of_silent + infos["stage"] * of_silent

    infos = trace[0][1]
    assert silent or all(torch.equal(potential(step[-1]), step[-1]["potential"]) for step in trace)
    for t, (obs, reward, terminated, truncated, next_infos) in enumerate(trace[1:37]):
        done = terminated | truncated
        assert torch.equal(seen["terminated"][t], terminated) and torch.equal(seen["done"][t], done)
        phi, v = potential(next_infos), value(obs)
        if done.any():
            phi[done], v[done] = potential(next_infos["final_info"])[done], value(next_infos["final_obs"])[done]
        expected = reward + 0.5 * (0.9 * phi * ~terminated - potential(infos))
        assert torch.allclose(seen["rewards"][t], expected, atol=1e-6), t
        assert torch.allclose(seen["next_values"][t], v, atol=1e-4), t
        infos = next_infos
    assert seen["terminated"].any(0).tolist() == [True, False] and seen["done"][29, 1]  # both kinds of ending were there
    assert (seen["values"][1:] - seen["next_values"][:-1])[seen["done"][:-1]].abs().min() > 1e-3  # and were no ordinary steps
    # The sum of r' over each first episode telescopes: what the shaping adds is Phi at its end, 0 where it is terminal, less Phi at its beginning
    ends, phi = seen["done"].long().argmax(0), potential(trace[0][1])
    last = potential(trace[ends[1] + 1][-1]["final_info"])[1]
    returns = 0.9 ** ends[0] - 0.5 * phi[0], 0.5 * (0.9 ** (ends[1] + 1) * last - phi[1])
    assert scalars(run)["charts/shaped_return"] == pytest.approx([sum(returns).item() / 2], abs=1e-5)


def test_shaping_weight_0_is_plain_ppo_bit_for_bit_and_the_default_is_not(ppo):
    sparse, zero, stare = ppo("sparse", 1, 20, "--reward", "sparse"), ppo("zero", 1, 20, "--shaping-weight", 0), ppo("stare")
    assert differing(sparse / "checkpoint", zero / "checkpoint") == []
    assert differing(sparse / "checkpoint", stare / "checkpoint")


def test_chunks_and_gradient_checkpointing_change_no_gradient(ppo):
    one = ("--update-epochs", 1, "--num-minibatches", 1)
    whole, parts = (scalars(ppo(name, 1, 20, *one, *flags)) for name, flags in (("whole", ()), ("parts", ("--chunk-size", 7, "--gradient-checkpointing"))))
    for key in ("grad_norm", "policy_loss", "value_loss", "entropy", "approx_kl", "first_ratio", "advantage_std"):
        assert parts[f"losses/{key}"] == pytest.approx(whole[f"losses/{key}"], rel=1e-4, abs=1e-6), key
    assert whole["losses/grad_norm"][0] > 1e-3


@pytest.mark.slow
def test_an_episode_of_dense_reward_goes_on_after_success_and_pays_1_at_most(checkpoint, tmp_path, monkeypatch):
    seen, gae = {}, sta_ppo.compute_gae

    def record(rewards, *args):
        seen.update(rewards=rewards, terminated=args[2], done=args[3])
        return gae(rewards, *args)

    monkeypatch.setattr(sta_ppo, "compute_gae", record)
    call(sta_ppo, "--checkpoint", checkpoint, "--reward", "dense", "--num-envs", 2, "--num-steps", 50, "--num-minibatches", 2, "--total-timesteps", 100,
         "--num-eval-episodes", 0, "--no-cuda", "--output-dir", tmp_path / "run")  # fmt: skip
    rewards, (paid,) = seen["rewards"], scalars(tmp_path / "run")["charts/episodic_return"]
    assert not seen["terminated"].any() and seen["done"][-1].all()
    assert (rewards > 0).all() and (rewards.sum(0) < 1).all() and paid == pytest.approx(50 * rewards.sum(0).mean().item(), rel=1e-4)


def test_learned_stages_shape_the_reward_and_the_simulator_s_potential_is_not_read(ppo, envs, checkpoint, monkeypatch):
    """With LoRA and a KL to the first policy beside it: the reference is the model without its adapter."""
    seen, potentials, step, reset, shape = [], [], envs.step, envs.reset, sta_ppo.shape_rewards

    def blind(infos):
        infos["potential"] = torch.full_like(infos["potential"], torch.nan)

    def blind_reset(seed=None):
        obs, infos = reset(seed)
        blind(infos)
        seen.append(obs)
        return obs, infos

    def blind_step(actions):
        obs, *rest, infos = step(actions)
        blind(infos)
        blind(infos.get("final_info", {"potential": torch.zeros(2)}))
        seen.append(obs)
        return obs, *rest, infos

    def shape_and_record(rewards, phi, next_phi, *args):
        potentials.append((phi.clone(), next_phi.clone()))
        return shape(rewards, phi, next_phi, *args)

    monkeypatch.setattr(envs, "reset", blind_reset)
    monkeypatch.setattr(envs, "step", blind_step)
    monkeypatch.setattr(sta_ppo, "shape_rewards", shape_and_record)
    folder, separator = vla.load_separator(checkpoint / "checkpoint", "PickCube-v1", torch.device("cpu"))
    model, processor, _ = sta_ppo.load_policy(folder, torch.device("cpu"))
    hidden_of = torch.no_grad()(lambda obs: model(**prompt(processor, obs), logits_to_keep=1).last_hidden_state[:, -1])
    separator.bias.data = -separator.weight @ hidden_of(reset(1)[0]).mean(0)  # an untrained one would see one stage everywhere
    monkeypatch.setattr(vla, "load_separator", lambda *args: (folder, separator))
    run = ppo("run", 2, 20, "--stage-source", "learned", "--kl-coef", 0.5, "--lora-rank", 2, "--learning-rate", 0.01, "--no-anneal-lr")
    labels = [separator(hidden_of(obs)).argmax(-1).float() for obs in seen[1:22]]  # after the reset of the first roll-out
    assert len(torch.cat(labels).unique()) > 1
    for t, (phi, next_phi) in enumerate(potentials[:20]):
        assert torch.equal(phi, labels[t]) and torch.equal(next_phi, labels[t + 1])  # 20 steps of 30: no episode ends
    curves = scalars(run)
    assert all(abs(ratio - 1) < 1e-4 for ratio in curves["losses/first_ratio"]) and curves["losses/kl_to_start"][1] > 1e-4
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    with pytest.raises(stare_utils.UserError, match="--lora-rank = 2, not 0"):
        ppo("run", 4, 20, "--resume")


def test_ppo_resumes_from_a_checkpoint_between_fresh_starts(ppo, capsys):
    """Episodes of 50 steps begin anew every third update of 20 steps; the last update of a run need not be such a one."""
    ppo("run", 1)
    before = tensors(ppo("run", 1, 20, "--resume") / "checkpoint")
    assert "other settings" not in capsys.readouterr().out
    assert any(not torch.equal(before[name], value) for name, value in tensors(ppo("run", 2, 20, "--resume") / "checkpoint").items())
    assert "--total-timesteps 40 -> 80" in capsys.readouterr().out
    with pytest.raises(stare_utils.UserError, match="num_steps \\* processes = 40, not 20"):
        ppo("run", 4, 10, "--resume")
    with pytest.raises(stare_utils.UserError, match="was begun from .*, not from /another"):
        ppo("run", 4, 20, "--resume", "--checkpoint", "/another")


def test_rollouts_begin_in_the_state_they_are_named_after_and_a_stopped_collection_goes_on(checkpoint, envs, tmp_path, monkeypatch):
    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(sta_tpo, "make_envs", lambda *args, **kwargs: envs)
    model, processor, _ = sta_tpo.load_policy(str(checkpoint), torch.device("cpu"))
    arguments = (tmp_path / "rollouts", model, processor, ACTIVE, STATS, sta_tpo.Args(num_envs=2, num_initial_states=2, rollouts_per_state=3))
    rollouts = sta_tpo.read_rollouts(sta_tpo.collect_rollouts(*arguments))
    starts = {}
    for rollout in rollouts:
        starts.setdefault(rollout["init_seed"], []).append(rollout)
        assert len(rollout["stage"]) == len(rollout["bins"]) == len(rollout["rgb"]) == len(rollout["distance"]) == 30 and not rollout["success"]
        assert rollout["stage"].min() >= 0 and rollout["stage"].max() < K and (rollout["distance"] >= 0).all()
    assert [len(group) for group in starts.values()] == [3, 3] and all(0 <= seed < stare_utils.TRAIN_SEEDS for seed in starts)
    obs, infos = envs.reset(seed=list(starts))
    lengths = torch.tensor([stage.length for stage in TASK.stage_table])
    for i, group in enumerate(starts.values()):
        for rollout in group:
            assert torch.equal(rollout["rgb"][0], obs["rgb"][i]) and torch.equal(rollout["proprio"][0], obs["proprio"][i])
            assert torch.allclose(rollout["distance"][0], infos["stage_distance"][i] / lengths[infos["stage"][i]])
        assert not torch.equal(group[0]["bins"], group[1]["bins"])
    # the recorded tokens are what was done
    first = [group[0] for group in starts.values()]
    for t in range(1, 4):
        obs, *_ = envs.step(vla.detokenize_actions(torch.stack([rollout["bins"][t - 1] for rollout in first]), STATS["action"]))
        assert torch.equal(obs["proprio"], torch.stack([rollout["proprio"][t] for rollout in first]))

    files = sorted((tmp_path / "rollouts").iterdir())
    kept = {file: file.stat().st_mtime_ns for file in files[2:]}
    for file in files[:2]:
        file.unlink()
    sta_tpo.collect_rollouts(*arguments)
    assert sorted((tmp_path / "rollouts").iterdir()) == files and all(file.stat().st_mtime_ns == written for file, written in kept.items())


def test_demonstrations_are_what_the_simulator_did_and_their_labels_are_clean(sft_run, envs):
    episodes = json.loads((sft_run / "demos_PickCube-v1.json").read_text())["episodes"][:2]
    with h5py.File(sft_run / "demos_PickCube-v1.h5") as file:
        demos = [{name: file[f"traj_{i}"][name][:] for name in ("actions", "expert_actions", "obs/proprio", "success")} for i in range(2)]
        frames = [file[f"traj_{i}/obs/sensor_data/base_camera/rgb"][:] for i in range(2)]
    for demo, rgb, episode in zip(demos, frames, episodes):
        length = episode["elapsed_steps"]
        assert len(demo["actions"]) == length and len(rgb) == len(demo["obs/proprio"]) == length + 1
        assert demo["success"].tolist() == [False] * (length - 1) + [True]
        moved = demo["actions"] != demo["expert_actions"]
        slip = demo["actions"][:, -1] != demo["expert_actions"][:, -1]
        assert moved[:, :3].any() and not moved[~slip, 3:].any() and not moved[:, 3:5].any()  # noise on the motion alone
        demo["still"] = ~demo["expert_actions"][:, :-1].any(-1)
        assert not moved[demo["still"]].any()  # a pause is both played and the label
    assert any(moved[:, -1].any() for moved in (demo["actions"] != demo["expert_actions"] for demo in demos))  # a wrong stage was played, the label is right
    assert 0.05 < np.concatenate([demo["still"] for demo in demos]).mean() < 0.6
    obs, _ = envs.reset(seed=[episode["episode_seed"] for episode in episodes])
    free = [True, True]  # until the gripper closes the replay is exact; after an auto-reset the solver's contacts are so to some 1e-4 only
    for t in range(min(29, *(episode["elapsed_steps"] - 1 for episode in episodes))):
        labels, speed = ScriptedExpert(envs).act(), sft.Args().demo_speed
        labels[:, :3] = labels[:, :3].clamp(-speed, speed)
        for i, demo in enumerate(demos):
            free[i] &= demo["actions"][t, -1] > 0
            assert np.allclose(obs["proprio"][i], demo["obs/proprio"][t], atol=5e-3), (i, t)
            if free[i]:
                assert np.array_equal(obs["proprio"][i], demo["obs/proprio"][t]) and np.array_equal(obs["rgb"][i], frames[i][t]), (i, t)
                dims = slice(-1, None) if demo["still"][t] else slice(None)  # in a pause the hand alone is the expert's
                assert np.allclose(labels[i, dims], demo["expert_actions"][t, dims], atol=1e-6), (i, t)
        obs, *_ = envs.step(torch.from_numpy(np.stack([demo["actions"][t] for demo in demos])))


def test_a_twist_turns_the_tool_to_either_side_where_a_demonstration_begins_and_labels_stay_clean(envs, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "make_envs", lambda *args, **kwargs: envs)
    monkeypatch.setattr(envs, "close", lambda: None)
    args, before = sft.Args(seed=2, num_envs=2, num_demos=6, demo_twist=4, demo_speed=1.0, demo_noise=0.0, demo_slip=0.0, demo_pause=0.0), torch.get_rng_state()
    sft.collect_demos(tmp_path / "demos.h5", "PickCube-v1", args, 128)
    assert torch.equal(torch.get_rng_state(), before)  # who makes demonstrations begins to train as who reads them, the other processes of a job
    with h5py.File(tmp_path / "demos.h5") as file:
        demos = [(group["actions"][:], group["expert_actions"][:]) for group in file.values()]
    twisted = [(actions != labels).any(1) for actions, labels in demos]
    assert not any(differs[4:].any() for differs in twisted) and any(differs[:4].any() for differs in twisted)
    sides = set()
    for (actions, labels), differs in zip(demos, twisted, strict=True):
        steps = int(differs.nonzero()[0].max(initial=-1)) + 1
        assert np.array_equal(np.delete(actions, 5, 1), np.delete(labels, 5, 1))  # the rest goes on meanwhile
        assert len(set(actions[:steps, 5])) <= 1 and (abs(actions[:steps, 5]) == 1).all()
        sides |= set(actions[:steps, 5])
    assert sides == {-1.0, 1.0}


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1")])
def test_a_recorded_state_of_an_arm_that_follows_a_target_shows_the_turn_that_it_lacks(env_id, monkeypatch):
    """A file of states holds no target: the tool's own pose must stand for it, which is a step or two behind, not the target of the reset."""
    env, other = (stare_utils.StageEnv(env_id, 1, "cpu", seed, render=False) for seed in range(2))
    monkeypatch.setattr(other, "observation", lambda obs: {})
    for e in (env, other):
        e.reset(seed=[5])
    turns = []
    for _ in range(8):
        env.step(env.expert_action(torch.zeros(1, dtype=torch.long)))
        other.observe_state(env.base.get_state_dict())
        turns.append([float(e.state["yaw_error"]) for e in (env, other)])
    assert abs(turns[0][0]) > 1 and max(abs(a - b) for a, b in turns) < 0.3
