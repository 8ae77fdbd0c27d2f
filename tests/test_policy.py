"""The model.

Sampling and teacher forcing agree, a checkpoint is the whole policy, and imitation learns.
"""

import json
import types

import h5py
import numpy as np
import pytest
import torch
from conftest import STATS, call, frames, prompt, tiny_model, write_demos
from PIL import Image
from transformers import LlamaModel

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
import vla
from plumbing.checkpoint import load_policy, load_separator, save_checkpoint, task_stats
from plumbing.run import Run
from world.tasks import UserError

ACTIVE = ~vla.constant_dims(STATS["action"])
RAGGED = [
    "pick up the red cube and move it to the green ball",
    "push it",
    "lift the peg",
    "push it",
]
CPU = torch.device("cpu")


def two_towers():
    """OpenVLA's architecture, shrunken, and its processor.

    It has DINOv2's and SigLIP's towers, a padded vocabulary, and no proprioception.
    """
    torch.manual_seed(0)
    text = dict(
        vocab_size=512 + 256 + 64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    overrides = {"width": 32, "blocks": 2, "heads": 2, "mlp": 64}
    config = vla.OpenVLAConfig(
        text, list(vla.TOWERS), image_sizes=[28, 28], vit_overrides=overrides
    )
    model = vla.OpenVLAForActionPrediction(config).eval()
    small = vla.tiny_processor(RAGGED)
    model.language_model.lm_head.weight.data *= 10
    means = [[0.485, 0.456, 0.406], [0.5] * 3]
    stds = [[0.229, 0.224, 0.225], [0.5] * 3]
    images = vla.PrismaticImageProcessor([[3, 28, 28]] * 2, means, stds)
    return model, vla.PrismaticProcessor(images, small.tokenizer, small.prompt)


def random_bins(n: int) -> torch.Tensor:
    """Invented actions (n, 7), the same at each call."""
    return torch.randint(0, 256, (n, 7), generator=torch.Generator().manual_seed(0))


# ---- the probability of an action ----
@pytest.mark.parametrize("make", [tiny_model, two_towers])
@pytest.mark.parametrize("greedy", [False, True])
def test_rollout_and_update_give_an_action_the_same_probability(make, greedy):
    """The ratio of PPO's first minibatch is 1, whatever the lengths of the instructions.

    Decoding with a cache equals one teacher-forced pass.
    """
    model, processor = make()
    inputs = prompt(processor, frames(4), RAGGED)
    assert (inputs["attention_mask"] == 0).any()
    torch.manual_seed(3)
    bins, logprob, hidden = sta_ppo.sample_action(model, inputs, ACTIVE, greedy=greedy)
    with torch.no_grad():
        newlogprob, entropy, newhidden, best = sta_ppo.action_logprob(model, inputs, bins, ACTIVE)
    assert ((newlogprob - logprob).exp() - 1).abs().max() < 1e-4
    assert (newhidden - hidden).abs().max() < 1e-4
    assert logprob.shape == entropy.shape == (4,)
    assert logprob.dtype == newlogprob.dtype == torch.float32
    assert (logprob < -1).all() and (entropy > 0).all()
    if not greedy:
        return
    assert torch.equal(best[:, ACTIVE], bins[:, ACTIVE])
    # In OpenVLA's numbering the last id of the actions is bin 0.
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    end = model.config.action_id_end
    likeliest = end - 256 + logits[:, end - 256 : end].argmax(-1)
    assert torch.equal(end - 1 - bins[:, 0], likeliest)


def test_float32_is_float32_on_a_gpu():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_an_instruction_has_the_same_probability_beside_a_longer_one():
    model, processor = tiny_model()
    obs = frames(4)
    bins = torch.randint(0, 256, (4, 7))
    alone = []
    with torch.no_grad():
        inputs = prompt(processor, obs, RAGGED)
        together = sta_ppo.action_logprob(model, inputs, bins, ACTIVE)[0]
        for i in range(4):
            own = {name: value[i : i + 1] for name, value in obs.items()}
            inputs = prompt(processor, own, [RAGGED[i]])
            alone.append(sta_ppo.action_logprob(model, inputs, bins[i : i + 1], ACTIVE)[0])
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_constant_dimensions_keep_one_bin_and_count_in_no_probability():
    model, processor = tiny_model()
    inputs = prompt(processor, frames(3))
    torch.manual_seed(0)
    bins, _, _ = sta_tpo.sample_action(model, inputs, ACTIVE)
    other = torch.where(ACTIVE, bins, 7)
    assert (bins[:, ~ACTIVE] == 128).all()
    last = torch.tensor([False] * 6 + [True])
    with torch.no_grad():
        none = sta_tpo.action_logprob(model, inputs, other, ~ACTIVE & False)
        whole = sta_tpo.action_logprob(model, inputs, bins, ACTIVE)
        rest = sta_tpo.action_logprob(model, inputs, bins, ACTIVE & ~last)
        alone = sta_tpo.action_logprob(model, inputs, bins, last)
    # Both the log-probability and the entropy are sums over the active dimensions.
    for i in (0, 1):
        assert (none[i] == 0).all()
        assert torch.allclose(whole[i], rest[i] + alone[i], atol=1e-5)


def test_a_token_s_distribution_covers_the_action_bins_alone():
    model, processor = tiny_model()
    obs = {name: value.expand(256, *value.shape[1:]) for name, value in frames(1).items()}
    inputs = prompt(processor, obs)
    first = torch.tensor([True] + [False] * 6)
    bins = torch.full((256, 7), 128)
    bins[:, 0] = torch.arange(256)
    with torch.no_grad():
        logprob, entropy, _, _ = sta_ppo.action_logprob(model, inputs, bins, first)
    assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    expected = -(logprob.exp() * logprob).sum().item()
    assert entropy[0].item() == pytest.approx(expected, abs=1e-4)
    torch.manual_seed(0)
    sampled, its_logprob, _ = sta_ppo.sample_action(model, inputs, first)
    assert torch.allclose(its_logprob, logprob[sampled[:, 0]], atol=1e-4)
    # The mean of 256 log-probabilities is minus the entropy, within five of its deviations.
    variance = (logprob.exp() * logprob.square()).sum() - entropy[0].square()
    deviation = variance.sqrt() / 16
    assert abs(its_logprob.mean() + entropy[0]) < 5 * deviation


# ---- checkpoints ----
def test_a_checkpoint_gives_identical_actions(checkpoint, tmp_path):
    loaded, its_processor, folder = load_policy(str(checkpoint), CPU)
    save_checkpoint(tmp_path, loaded, its_processor, {}, {})
    again, again_processor, _ = load_policy(str(tmp_path / "checkpoint"), CPU)
    assert loaded.config.norm_stats == again.config.norm_stats == {"PickCube-v1": STATS}
    assert folder == checkpoint / "checkpoint"
    results = []
    for model, processor in (
        tiny_model(),
        (loaded, its_processor),
        (again, again_processor),
    ):
        torch.manual_seed(0)
        inputs = prompt(processor, frames(4))
        bins, logprob, hidden = sta_ppo.sample_action(model, inputs, ACTIVE)
        results.append([vla.detokenize_actions(bins, STATS["action"]), logprob, hidden])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_separator_is_found_along_the_chain_of_checkpoints(checkpoint, tmp_path):
    # The start may be named by its checkpoint, or by the run folder that holds it.
    source = checkpoint / "checkpoint"
    for name in ("tpo", "ppo1", "ppo2", "ppo3", "ppo"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, *tiny_model(), {"checkpoint": str(source)}, {})
        source = tmp_path / name
    last = tmp_path / "ppo/checkpoint"
    folder, separator = load_separator(last, "PickCube-v1", CPU)
    assert folder == checkpoint / "checkpoint"
    assert separator.weight.shape == (4, 64) and not separator.weight.requires_grad
    assert load_separator(last, "PushCube-v1", CPU) is None
    circle = json.dumps({"checkpoint": str(tmp_path / "ppo")})
    for args in ("{}", "[]", '{"checkpoint": null}', circle):
        (last / "args.json").write_text(args)
        assert load_separator(last, "PickCube-v1", CPU) is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_separator_is_kept_where_the_demonstrations_of_every_task_have_labels(labelled, tmp_path):
    tasks = ("PickCube-v1", "PushCube-v1")
    paths = [write_demos(tmp_path / f"{task}.h5", task) for task in tasks]
    for path in paths[: 1 + labelled]:
        with h5py.File(path, "a") as file:
            file["traj_0/stage"] = np.zeros(6, int)
            file["traj_1/stage"] = np.zeros(9, int)
    flags = "--num-updates 2 --batch-size 4 --num-eval-episodes 0 --no-cuda --output-dir"
    ids = ("--env-id", ",".join(tasks), "--demo-path", ",".join(map(str, paths)))
    call(sft, *ids, *flags.split(), tmp_path / "run")
    assert (tmp_path / "run/checkpoint/separator.safetensors").exists() == labelled


def test_a_separator_is_measured_against_the_rules():
    """Two episodes of three stages.

    The first one is read right except for one step, and one boundary comes two steps late. The
    second one begins in success, which is no stage, and never enters the stage that is read.
    """

    def sure(labels: list[int]) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 3)
        return torch.where(one_hot == 1, 0.9, 0.05).log()

    first = (
        torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        sure([0, 0, 1, 1, 1, 1, 2, 2]),
        torch.tensor([False] * 7 + [True]),
    )
    second = (
        torch.tensor([3, 0, 0]),
        sure([0, 0, 1]),
        torch.tensor([False] * 3),
    )
    found = evaluation.compare_separator([first, second], 3)
    assert found["num_steps"] == 10
    assert found["causal_accuracy"] == pytest.approx(6 / 10)
    # A success after the beginning of the last stage is in that stage's segment.
    assert found["viterbi_accuracy"] == pytest.approx(7 / 10)
    assert found["boundary_error"] == pytest.approx((0 + 2) / 2)
    assert found["boundary_missed"] == pytest.approx(1 / 3)


def resumed_step(run) -> int:
    """The step at which a run of sft.py would go on."""
    return Run("sft", str(run), resume=True, rank=0).state["step"]


def test_a_save_that_dies_keeps_the_checkpoint_before(tmp_path):
    state = {"step": 1, "script": "sft", "wall_s": 0}
    save_checkpoint(tmp_path, *tiny_model(), {"n": 1}, state)
    # This is not JSON, so the save dies in the middle of the new folder.
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, *tiny_model(), {"n": object()}, {"step": 2})
    assert resumed_step(tmp_path) == 1
    # The run may die between the two renames, too.
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert resumed_step(tmp_path) == 1
    assert (tmp_path / "checkpoint/model.safetensors").exists()


# ---- LoRA and gradient checkpointing ----
def test_lora_is_trained_alone_switched_off_and_merged_into_checkpoints(tmp_path):
    model, processor = tiny_model()
    inputs = prompt(processor, frames(3))
    bins = torch.randint(0, 256, (3, 7))

    def logprob(model) -> torch.Tensor:
        return sta_ppo.action_logprob(model, inputs, bins, ACTIVE)[0]

    before = logprob(model)
    weights = sum(p.numel() for p in model.parameters())
    vla.add_lora(model, 4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(logprob(model), before)
    assert all(".lora_" in name and "lm_head" not in name for name in trained)
    assert sum(p.numel() for p in trained.values()) < weights / 10
    for p in trained.values():
        p.data += 0.05 * torch.randn_like(p)
    after = logprob(model)
    with vla.lora_off(model):
        assert torch.equal(logprob(model), before)
    assert (after - before).abs().max() > 0.1 and torch.equal(logprob(model), after)
    save_checkpoint(tmp_path, model, processor, {}, {})
    loaded, _, _ = load_policy(str(tmp_path), CPU)
    assert torch.allclose(logprob(loaded), after, atol=1e-4)
    assert sum(p.numel() for p in loaded.parameters()) == weights


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(
    lora_rank, monkeypatch
):
    gradients = []
    calls = []
    mlp = vla.MLP.forward

    def counted(self, x):
        calls.append(1)
        return mlp(self, x)

    monkeypatch.setattr(vla.MLP, "forward", counted)
    for checkpointing in (False, True):
        model, processor = two_towers()
        params = vla.prepare_training(model, lora_rank, checkpointing)
        inputs = prompt(processor, frames(3))
        calls.clear()
        logprob, *_ = sta_ppo.action_logprob(model.train(), inputs, random_bins(3), ACTIVE)
        logprob.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        # The two towers have two blocks each, of which the last is not run.
        assert len(calls) == 2 * (1 + checkpointing)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].any()


def test_lora_of_a_bfloat16_model_is_float32_and_merged_with_one_rounding(tmp_path):
    # Without LoRA the whole model becomes float32.
    params = vla.prepare_training(two_towers()[0].bfloat16(), 0, False)
    assert {p.dtype for p in params} == {torch.float32}
    model, processor = two_towers()
    model = model.bfloat16()
    params = vla.prepare_training(model, 2, False)
    layer = model.projector.fc1
    assert {p.dtype for p in params} == {torch.float32}
    assert next(layer.base_layer.parameters()).dtype == torch.bfloat16
    torch.manual_seed(0)
    for p in params:
        p.data = 0.05 * torch.randn_like(p)
    inputs = prompt(processor, frames(2))
    bins = torch.full((2, 7), 128)
    sta_ppo.action_logprob(model, inputs, bins, ACTIVE)[0].sum().backward()
    # The matrices learn in float32 and compute in bfloat16.
    x = torch.randn(2, layer.in_features).bfloat16()
    a, b = (part["default"].weight.bfloat16() for part in (layer.lora_A, layer.lora_B))
    assert torch.equal(layer(x), layer.base_layer(x) + x @ a.T @ b.T)
    assert all(p.grad.dtype == torch.float32 for p in params if p.grad is not None)
    merged = (layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    save_checkpoint(tmp_path, model, processor, {}, {})
    loaded, _, _ = load_policy(str(tmp_path), CPU)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.projector.fc1.weight, merged)
    assert not torch.equal(merged, layer.weight)


# ---- the language model ----
def theirs(model, x, mask, past=None):
    """transformers' own pass: the hidden state at all positions, and its cache."""
    positions = (mask.cumsum(-1) - 1)[:, -x.shape[1] :]
    out = model.language_model.model(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
    )
    return out.last_hidden_state, out.past_key_values


def embeddings(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (3, 9, D) and their mask, with padding in two rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, model.config.text_config.hidden_size, generator=g)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 1:3] = 0
    mask[2, 1:6] = 0
    return x, mask


@pytest.mark.parametrize("make", [tiny_model, two_towers])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_the_language_model_s_pass_is_that_of_transformers(make, lora, kept):
    model, _ = make()
    llama = model.language_model.model
    if lora:
        vla.add_lora(model, 4)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    x, mask = embeddings(model)
    params = [p for p in llama.parameters() if p.requires_grad]

    def gradient(output: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(output.sin().sum(), params, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    expected = theirs(model, x, mask)[0][:, -kept:]
    found, _ = vla.llama(llama, x, mask, None, kept)
    assert (found - expected).abs().max() < 1e-5
    mine = gradient(found)
    other = gradient(expected)
    assert (mine - other).norm() < 1e-5 * other.norm() and other.norm() > 0


@torch.no_grad()
def test_heads_that_share_keys_and_scaled_positions_are_those_of_transformers():
    config = vla.tiny_config(width=64, layers=2).text_config
    config.num_key_value_heads = 2
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config.rope_parameters = {**yarn, "original_max_position_embeddings": 64}
    torch.manual_seed(0)
    llama = LlamaModel(config).eval()
    assert llama.rotary_emb.attention_scaling > 1
    x = torch.randn(2, 9, 64)
    mask = torch.ones(2, 9, dtype=torch.long)
    expected = llama(inputs_embeds=x, attention_mask=mask).last_hidden_state
    found, _ = vla.llama(llama, x, mask, None, 0)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("make", [tiny_model, two_towers])
@torch.no_grad()
def test_the_cache_continues_a_pass(make):
    """Two tokens at once, then one."""
    model, _ = make()
    x, mask = embeddings(model)
    their_past = past = None
    for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
        seen = mask[:, : part.stop]
        expected, their_past = theirs(model, x[:, part], seen, their_past)
        kept = 1 if part.start else 0
        found, past = vla.llama(model.language_model.model, x[:, part], seen, past, kept)
        assert (found - expected[:, -kept:]).abs().max() < 1e-5


@torch.no_grad()
def test_the_language_model_s_pass_in_bfloat16_is_as_good_as_that_of_transformers():
    model, _ = tiny_model()
    llama = model.language_model.model
    x, mask = embeddings(model)
    exact, _ = theirs(model, x, mask)
    model.bfloat16()
    expected, _ = theirs(model, x.bfloat16(), mask)
    found, _ = vla.llama(llama, x.bfloat16(), mask, None, 0)
    assert found.dtype == torch.bfloat16
    # Both round, each in its own places.
    assert (found - exact).abs().mean() < 1.2 * (expected - exact).abs().mean()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_language_model_s_layers_are_computed_again_in_the_backward_pass(
    lora_rank, monkeypatch
):
    calls = []
    layer = vla.llama_layer

    def counted(*inputs):
        calls.append(1)
        return layer(*inputs)

    monkeypatch.setattr(vla, "llama_layer", counted)
    gradients = []
    for checkpointing in (False, True):
        model, processor = tiny_model()
        params = vla.prepare_training(model, lora_rank, checkpointing)
        inputs = prompt(processor, frames(3))
        calls.clear()
        logprob, *_ = sta_ppo.action_logprob(model.train(), inputs, random_bins(3), ACTIVE)
        logprob.sum().backward()
        # The model has two layers.
        assert len(calls) == 2 * (1 + checkpointing)
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
    assert torch.equal(*gradients) and gradients[0].any()


# ---- the tiny model ----
def test_imitation_lowers_cross_entropy_on_one_batch():
    model, processor = tiny_model()
    inputs = prompt(processor, frames(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        logprob, *_ = sft.action_logprob(model, inputs, random_bins(8), ACTIVE)
        loss = -logprob.mean() / ACTIVE.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5 * losses[0]
    # Every weight of the tiny model is trained.
    params = dict(model.named_parameters())
    assert [name for name, p in params.items() if p.grad is None or not p.grad.any()] == []


def test_neighbouring_bins_begin_alike():
    model, _ = tiny_model()
    model.init_action_rows()
    end = model.config.action_id_end
    # The rows of the actions, bin 0 first.
    actions = model.language_model.lm_head.weight[end - 256 : end].flip(0)
    largest_step = (actions[1:] - actions[:-1]).norm(dim=1).max()
    assert largest_step < 0.2 * (actions[0] - actions[-1]).norm()


def test_new_action_tokens_begin_alike_at_both_ends_and_the_context_has_room_for_them():
    model, _ = tiny_model()
    model.init_action_rows()
    end = model.config.action_id_end
    embeddings = model.get_input_embeddings().weight[end - 256 : end]
    assert torch.equal(embeddings, model.language_model.lm_head.weight[end - 256 : end])
    positions = model.config.text_config.max_position_embeddings
    assert 1 + model.num_prefix() + model.text_room() + 7 == positions


# ---- the processor ----
def test_proprioception_is_normalised_and_clipped():
    _, processor = tiny_model()
    obs = frames(2)
    obs["proprio"][0, 0] = 100.0
    stats = {"mean": [1.0] * 8, "std": [2.0] * 8}
    seen = processor(obs["rgb"], RAGGED[:2], obs["proprio"], stats)["proprio"]
    assert torch.allclose(seen, ((obs["proprio"] - 1) / 2).clamp(-5, 5)) and seen.max() == 5


def test_each_tower_gets_the_picture_as_pillow_resizes_it_in_its_own_units():
    model, processor = two_towers()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((128, 128), Image.BILINEAR)
    pixels = torch.tensor(np.asarray(picture)[None])
    seen = processor.image_processor.preprocess(pixels)["pixel_values"]
    resized = np.asarray(picture.resize((28, 28), Image.BICUBIC))
    small = torch.tensor(resized).movedim(-1, 0) / 255
    means = ([0.485, 0.456, 0.406], [0.5] * 3)
    stds = ([0.229, 0.224, 0.225], [0.5] * 3)
    for channels, mean, std in zip(seen[0].split(3), means, stds):
        expected = (small - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        # Two and a half of 255 levels.
        assert (channels - expected).abs().max() < 2.5 / 255 / min(std)
    towers = model.vision_backbone
    with torch.no_grad():
        first = towers.featurizer(seen[:, :3])
        second = towers.fused_featurizer(seen[:, 3:])
        assert torch.equal(towers(seen), torch.cat([first, second], -1))


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
    assert task_stats(model, "PushCube-v1", "PickCube-v1") == STATS
    model.config.norm_stats["two arms"] = {"action": {"q01": [-1.0] * 14, "q99": [1.0] * 14}}
    with pytest.raises(UserError, match="7 actions on PickCube-v1, PushCube-v1, not on two arms"):
        task_stats(model, "PushCube-v1", "two arms")
