"""The model: sampling and teacher forcing agree, a checkpoint is the whole policy, imitation learns."""
import json
import types

import h5py
import numpy as np
import pytest
import torch
from conftest import STATS, call, frames, prompt, tiny_model, write_demos
from PIL import Image

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
import vla

ACTIVE = ~vla.constant_dims(STATS["action"])
RAGGED = ["pick up the red cube and move it to the green ball", "push it", "lift the peg", "push it"]


def two_towers():
    """OpenVLA's architecture, shrunken: DINOv2 and SigLIP towers, padded vocabulary, no proprioception."""
    torch.manual_seed(0)
    text = dict(vocab_size=512 + 256 + 64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
    config = vla.OpenVLAConfig(text, list(vla.TOWERS), image_sizes=[28, 28], vit_overrides={"width": 32, "blocks": 2, "heads": 2, "mlp": 64})
    model, small = vla.OpenVLAForActionPrediction(config).eval(), vla.tiny_processor(RAGGED)
    model.language_model.lm_head.weight.data *= 10
    images = vla.PrismaticImageProcessor([[3, 28, 28]] * 2, [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3])
    return model, vla.PrismaticProcessor(images, small.tokenizer, small.prompt)


@pytest.mark.parametrize("make", [tiny_model, two_towers])
@pytest.mark.parametrize("greedy", [False, True])
def test_rollout_and_update_give_an_action_the_same_probability(make, greedy):
    """The ratio of PPO's first minibatch is 1: decoding with a cache equals one teacher-forced pass, whatever the lengths of the instructions."""
    model, processor = make()
    obs = frames(4)
    inputs = prompt(processor, obs, RAGGED)
    assert (inputs["attention_mask"] == 0).any()
    torch.manual_seed(3)
    bins, logprob, hidden = sta_ppo.sample_action(model, inputs, ACTIVE, greedy=greedy)
    with torch.no_grad():
        newlogprob, entropy, newhidden, best = sta_ppo.action_logprob(model, inputs, bins, ACTIVE)
    assert ((newlogprob - logprob).exp() - 1).abs().max() < 1e-4 and (newhidden - hidden).abs().max() < 1e-4
    assert logprob.shape == entropy.shape == (4,) and logprob.dtype == newlogprob.dtype == torch.float32
    assert (logprob < -1).all() and (entropy > 0).all()
    assert not greedy or torch.equal(best[:, ACTIVE], bins[:, ACTIVE])
    with torch.no_grad():  # OpenVLA's numbering: the last id of the actions is bin 0
        end, first = model.config.action_id_end, model(**inputs, logits_to_keep=1).logits[:, -1]
    assert not greedy or torch.equal(end - 1 - bins[:, 0], end - 256 + first[:, end - 256 : end].argmax(-1))


def test_float32_is_float32_on_a_gpu():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_an_instruction_has_the_same_probability_beside_a_longer_one():
    model, processor = tiny_model()
    obs, bins = frames(4), torch.randint(0, 256, (4, 7))
    with torch.no_grad():
        together = sta_ppo.action_logprob(model, prompt(processor, obs, RAGGED), bins, ACTIVE)[0]
        alone = [sta_ppo.action_logprob(model, prompt(processor, {k: v[i : i + 1] for k, v in obs.items()}, [RAGGED[i]]), bins[i : i + 1], ACTIVE)[0]
                 for i in range(4)]  # fmt: skip
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_constant_dimensions_keep_one_bin_and_count_in_no_probability():
    model, processor = tiny_model()
    inputs = prompt(processor, frames(3))
    torch.manual_seed(0)
    bins, logprob, _ = sta_tpo.sample_action(model, inputs, ACTIVE)
    other = torch.where(ACTIVE, bins, 7)
    assert (bins[:, ~ACTIVE] == 128).all()
    with torch.no_grad():
        none = sta_tpo.action_logprob(model, inputs, other, ~ACTIVE & False)
        last = torch.tensor([False] * 6 + [True])
        whole, rest = (sta_tpo.action_logprob(model, inputs, bins, active) for active in (ACTIVE, ACTIVE & ~last))
        alone = sta_tpo.action_logprob(model, inputs, bins, last)
    assert (none[0] == 0).all() and (none[1] == 0).all()
    assert torch.allclose(whole[0], rest[0] + alone[0], atol=1e-5) and torch.allclose(whole[1], rest[1] + alone[1], atol=1e-5)


def test_a_token_s_distribution_covers_the_action_bins_alone():
    model, processor = tiny_model()
    inputs, first = prompt(processor, {name: value.expand(256, *value.shape[1:]) for name, value in frames(1).items()}), torch.tensor([True] + [False] * 6)
    bins = torch.full((256, 7), 128)
    bins[:, 0] = torch.arange(256)
    with torch.no_grad():
        logprob, entropy, _, _ = sta_ppo.action_logprob(model, inputs, bins, first)
    assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert entropy[0].item() == pytest.approx(-(logprob.exp() * logprob).sum().item(), abs=1e-4)
    torch.manual_seed(0)
    sampled, its_logprob, _ = sta_ppo.sample_action(model, inputs, first)
    assert torch.allclose(its_logprob, logprob[sampled[:, 0]], atol=1e-4)
    # the mean of 256 log-probabilities is minus the entropy, within five of its deviations
    deviation = ((logprob.exp() * logprob.square()).sum() - entropy[0].square()).sqrt() / 16
    assert abs(its_logprob.mean() + entropy[0]) < 5 * deviation


def test_a_checkpoint_gives_identical_actions(checkpoint, tmp_path):
    model, processor = tiny_model()
    loaded, its_processor, folder = evaluation.load_policy(str(checkpoint), torch.device("cpu"))
    sft.save_checkpoint(tmp_path, loaded, its_processor, {}, {})
    again, again_processor, _ = sta_ppo.load_policy(str(tmp_path / "checkpoint"), torch.device("cpu"))
    assert loaded.config.norm_stats == again.config.norm_stats == {"PickCube-v1": STATS} and folder == checkpoint / "checkpoint"
    results = []
    for policy, proc in ((model, processor), (loaded, its_processor), (again, again_processor)):
        torch.manual_seed(0)
        bins, logprob, hidden = sta_ppo.sample_action(policy, prompt(proc, frames(4)), ACTIVE)
        results.append([vla.detokenize_actions(bins, STATS["action"]), logprob, hidden])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_lora_is_trained_alone_switched_off_and_merged_into_checkpoints(tmp_path):
    model, processor = tiny_model()
    inputs, bins = prompt(processor, frames(3)), torch.randint(0, 256, (3, 7))
    logprob = lambda model: sta_ppo.action_logprob(model, inputs, bins, ACTIVE)[0]  # noqa: E731
    before, weights = logprob(model), sum(p.numel() for p in model.parameters())
    vla.add_lora(model, 4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(logprob(model), before) and all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) < weights / 10 and not any("lm_head" in name for name in trained)
    for p in trained.values():
        p.data += 0.05 * torch.randn_like(p)
    after = logprob(model)
    with vla.lora_off(model):
        assert torch.equal(logprob(model), before)
    assert (after - before).abs().max() > 0.1 and torch.equal(logprob(model), after)
    sft.save_checkpoint(tmp_path, model, processor, {}, {})
    loaded, _, _ = sta_ppo.load_policy(str(tmp_path), torch.device("cpu"))
    assert torch.allclose(logprob(loaded), after, atol=1e-4) and sum(p.numel() for p in loaded.parameters()) == weights


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(lora_rank, monkeypatch):
    gradients, calls, mlp = [], [], vla.MLP.forward
    monkeypatch.setattr(vla.MLP, "forward", lambda self, x: [calls.append(1), mlp(self, x)][1])
    for checkpointing in (False, True):
        model, processor = two_towers()
        params = vla.prepare_training(model, lora_rank, checkpointing)
        inputs, bins = prompt(processor, frames(3)), torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
        calls.clear()
        sta_ppo.action_logprob(model.train(), inputs, bins, ACTIVE)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        assert len(calls) == 2 * (1 + checkpointing)  # two towers of two blocks, of which the last is not run
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].any()


def test_lora_of_a_bfloat16_model_is_float32_and_merged_with_one_rounding(tmp_path):
    assert {p.dtype for p in vla.prepare_training(two_towers()[0].bfloat16(), 0, False)} == {torch.float32}  # without LoRA all of it is
    model, processor = two_towers()
    model = model.bfloat16()
    params = vla.prepare_training(model, 2, False)
    assert {p.dtype for p in params} == {torch.float32} and next(model.projector.fc1.base_layer.parameters()).dtype == torch.bfloat16
    torch.manual_seed(0)
    for p in params:
        p.data = 0.05 * torch.randn_like(p)
    layer = model.projector.fc1
    sta_ppo.action_logprob(model, prompt(processor, frames(2)), torch.full((2, 7), 128), ACTIVE)[0].sum().backward()
    x = torch.randn(2, layer.in_features).bfloat16()
    low = [part["default"].weight.bfloat16() for part in (layer.lora_A, layer.lora_B)]  # what they compute is bfloat16, what they learn is not
    assert torch.equal(layer(x), layer.base_layer(x) + x @ low[0].T @ low[1].T) and all(p.grad.dtype == torch.float32 for p in params if p.grad is not None)
    merged = (layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    sft.save_checkpoint(tmp_path, model, processor, {}, {})
    loaded = sta_ppo.load_policy(str(tmp_path), torch.device("cpu"))[0]
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.projector.fc1.weight, merged) and not torch.equal(merged, layer.weight)


def test_a_separator_is_found_along_the_chain_of_checkpoints(checkpoint, tmp_path):
    source = checkpoint / "checkpoint"  # a checkpoint, or the run folder that holds it
    for name in ("tpo", "ppo1", "ppo2", "ppo3", "ppo"):
        (tmp_path / name).mkdir()
        sta_ppo.save_checkpoint(tmp_path / name, *tiny_model(), {"checkpoint": str(source)}, {})
        source = tmp_path / name
    folder, separator = vla.load_separator(tmp_path / "ppo/checkpoint", "PickCube-v1", torch.device("cpu"))
    assert folder == checkpoint / "checkpoint" and separator.weight.shape == (4, 64) and not separator.weight.requires_grad
    circle = json.dumps({"checkpoint": str(tmp_path / "ppo")})
    for env_id, args in (("PushCube-v1", None), ("PickCube-v1", "{}"), ("PickCube-v1", "[]"), ("PickCube-v1", '{"checkpoint": null}'), ("PickCube-v1", circle)):
        if args:
            (tmp_path / "ppo/checkpoint/args.json").write_text(args)
        assert vla.load_separator(tmp_path / "ppo/checkpoint", env_id, torch.device("cpu")) is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_separator_is_kept_where_the_demonstrations_of_every_task_have_labels(labelled, tmp_path):
    paths = [write_demos(tmp_path / f"{task}.h5", task) for task in ("PickCube-v1", "PushCube-v1")]
    for path in paths[: 1 + labelled]:
        with h5py.File(path, "a") as file:
            file["traj_0/stage"], file["traj_1/stage"] = np.zeros(6, int), np.zeros(9, int)
    call(sft, "--env-id", "PickCube-v1,PushCube-v1", "--demo-path", f"{paths[0]},{paths[1]}", "--num-updates", 2, "--batch-size", 4,
         "--num-eval-episodes", 0, "--output-dir", tmp_path / "run", "--no-cuda")  # fmt: skip
    assert (tmp_path / "run/checkpoint/separator.safetensors").exists() == labelled


def test_a_separator_is_measured_against_the_rules():
    """Two episodes of three stages: one read right but for one step and a boundary two steps late, one that begins in success, which
    is no stage, and never enters what is read."""
    sure = lambda labels: torch.where(torch.nn.functional.one_hot(torch.tensor(labels), 3) == 1, 0.9, 0.05).log()  # noqa: E731
    first = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), sure([0, 0, 1, 1, 1, 1, 2, 2]), torch.tensor([False] * 7 + [True])
    second = torch.tensor([3, 0, 0]), sure([0, 0, 1]), torch.tensor([False] * 3)
    found = evaluation.compare_separator([first, second], 3)
    assert found["num_steps"] == 10 and found["causal_accuracy"] == pytest.approx(6 / 10)
    assert found["viterbi_accuracy"] == pytest.approx(7 / 10)  # success after the last stage's beginning is in its segment
    assert found["boundary_error"] == pytest.approx((0 + 2) / 2) and found["boundary_missed"] == pytest.approx(1 / 3)


def test_a_save_that_dies_keeps_the_checkpoint_before(checkpoint, tmp_path):
    sft.save_checkpoint(tmp_path, *tiny_model(), {"n": 1}, {"step": 1, "script": "sft"})
    with pytest.raises(TypeError):  # not JSON: dies in the middle of the new folder
        sft.save_checkpoint(tmp_path, *tiny_model(), {"n": object()}, {"step": 2})
    assert sft.load_state(tmp_path, "sft")["step"] == 1
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # as if it died between the two renames
    assert sft.load_state(tmp_path, "sft")["step"] == 1 and (tmp_path / "checkpoint/model.safetensors").exists()


def test_imitation_lowers_cross_entropy_on_one_batch():
    model, processor = tiny_model()
    inputs, bins = prompt(processor, frames(8)), torch.randint(0, 256, (8, 7), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(25):
        loss = -sft.action_logprob(model, inputs, bins, ACTIVE)[0].mean() / ACTIVE.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5 * losses[0]
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []  # every weight of the tiny model is trained


def test_neighbouring_bins_begin_alike():
    model, _ = tiny_model()
    model.init_action_rows()
    end, rows = model.config.action_id_end, model.language_model.lm_head.weight
    actions = rows[end - 256 : end].flip(0)  # bin 0 first
    assert (actions[1:] - actions[:-1]).norm(dim=1).max() < 0.2 * (actions[0] - actions[-1]).norm()


def test_proprioception_is_normalised_and_clipped():
    _, processor = tiny_model()
    obs = frames(2)
    obs["proprio"][0, 0] = 100.0
    seen = processor(obs["rgb"], RAGGED[:2], obs["proprio"], {"mean": [1.0] * 8, "std": [2.0] * 8})["proprio"]
    assert torch.allclose(seen, ((obs["proprio"] - 1) / 2).clamp(-5, 5)) and seen.max() == 5


def test_each_tower_gets_the_picture_as_pillow_resizes_it_in_its_own_units():
    model, processor = two_towers()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((128, 128), Image.BILINEAR)
    seen = processor.image_processor.preprocess(torch.tensor(np.asarray(picture)[None]))["pixel_values"]
    small = torch.tensor(np.asarray(picture.resize((28, 28), Image.BICUBIC))).movedim(-1, 0) / 255
    for channels, mean, std in zip(seen[0].split(3), ([0.485, 0.456, 0.406], [0.5] * 3), ([0.229, 0.224, 0.225], [0.5] * 3)):
        expected = (small - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert (channels - expected).abs().max() < 2.5 / 255 / min(std)  # levels
    with torch.no_grad():
        towers, features = model.vision_backbone, model.vision_backbone(seen)
        assert torch.equal(features, torch.cat([towers.featurizer(seen[:, :3]), towers.fused_featurizer(seen[:, 3:])], -1))


def test_new_action_tokens_begin_alike_at_both_ends_and_the_context_has_room_for_them():
    model, _ = tiny_model()
    model.init_action_rows()
    rows = slice(model.config.action_id_end - 256, model.config.action_id_end)
    assert torch.equal(model.get_input_embeddings().weight[rows], model.language_model.lm_head.weight[rows])
    assert 1 + model.num_prefix() + model.text_room() + 7 == model.config.text_config.max_position_embeddings


def test_llama_s_prompt_ends_in_the_space_before_the_action():
    class Llama:
        def __call__(self, text, **kwargs):
            return {"input_ids": [5, 6]}

        def convert_tokens_to_ids(self, token):
            return 29871

    processor = types.SimpleNamespace(text_cache={}, tokenizer=Llama(), prompt="{instruction}")
    assert vla.PrismaticProcessor.prompt_ids(processor, "x") == [5, 6, 29871]


def test_a_policy_of_ours_keeps_its_units_under_another_task_s_key():
    model, _ = tiny_model()
    assert evaluation.task_stats(model, "PushCube-v1", "PickCube-v1") == STATS
    model.config.norm_stats["two arms"] = {"action": {"q01": [-1.0] * 14, "q99": [1.0] * 14}}
    with pytest.raises(evaluation.UserError, match="7 actions on PickCube-v1, PushCube-v1, not on two arms"):
        evaluation.task_stats(model, "PushCube-v1", "two arms")
