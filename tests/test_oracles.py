"""The losses beside other people's: TorchRL's advantages and clipped loss, TRL's preference loss.

Endings and lengths are random, with a seed for each case.
"""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate
from trl import DPOTrainer

import sta_ppo
import sta_tpo

P = 12
T = 9


@pytest.mark.parametrize(
    ("seed", "gamma", "lam"),
    [(0, 0.97, 0.5), (1, 0.9, 0.95), (2, 1.0, 1.0), (3, 0.99, 0.0)],
)
def test_gae_is_torchrl_s(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(50, 7, generator=g, dtype=torch.double)
    values = torch.randn(50, 7, generator=g, dtype=torch.double)
    next_values = torch.randn(50, 7, generator=g, dtype=torch.double)
    ending = torch.rand(50, 7, generator=g)
    terminated = ending < 0.1
    done = ending < 0.25
    assert terminated.any()
    assert (done & ~terminated).any()
    ours = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, gamma, lam)
    theirs = generalized_advantage_estimate(
        gamma,
        lam,
        # TorchRL wants the envs first.
        *(x.T[..., None] for x in (values, next_values, rewards)),
        done=done.T[..., None],
        terminated=terminated.T[..., None],
    )
    for a, b in zip(ours, theirs, strict=True):
        # TorchRL's mask rounds gamma to fp32.
        assert torch.allclose(a, b[..., 0].T, atol=2e-6)


def torchrl_s_clipped_loss(logits, actions, advantages, old, clip_coef) -> torch.Tensor:
    """TorchRL's ClipPPOLoss of a categorical policy. old: log-probabilities of the actions."""
    B = len(actions)
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Identity(), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        ),
    )
    critic = TensorDictModule(
        lambda x: x[..., :1], in_keys=["observation"], out_keys=["state_value"]
    )
    oracle = ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=clip_coef,
        entropy_bonus=False,
        normalize_advantage=False,
    )
    batch = {
        "observation": logits,
        "action": actions,
        "advantage": advantages[:, None],
        "value_target": torch.zeros(B, 1),
        policy[-1].log_prob_key: old,
    }
    return oracle(TensorDict(batch, [B]))["loss_objective"]


@pytest.mark.parametrize("clip_coef", [0.1, 0.2])
def test_clipped_loss_and_its_gradient_are_torchrl_s(clip_coef):
    torch.manual_seed(0)
    logits = torch.randn(64, 5, dtype=torch.double)
    actions = torch.randint(5, (64,))
    advantages = torch.randn(64, dtype=torch.double)
    old = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    old = old + 0.4 * torch.randn(64, dtype=torch.double)
    theirs_in = logits.clone().requires_grad_()
    ours_in = logits.clone().requires_grad_()
    theirs = torchrl_s_clipped_loss(theirs_in, actions, advantages, old, clip_coef)
    logratio = ours_in.log_softmax(-1).gather(-1, actions[:, None])[:, 0] - old
    ours = sta_ppo.ppo_loss(logratio, advantages, clip_coef)
    ratio = logratio.exp()
    assert ((ratio - 1).abs() > clip_coef).any()
    assert ((ratio - 1).abs() < clip_coef).any()
    assert torch.allclose(ours, theirs, atol=1e-12)
    ours.backward()
    theirs.backward()
    assert torch.allclose(ours_in.grad, theirs_in.grad, atol=1e-12)
    assert ours_in.grad.any()


def test_gradient_of_the_kl_loss_is_that_of_the_exact_kl():
    """Over all actions, each as often as the policy takes it."""
    torch.manual_seed(0)
    ours = torch.randn(6, dtype=torch.double).requires_grad_()
    reference = torch.randn(6, dtype=torch.double).log_softmax(-1)
    exact = ours.detach().clone().requires_grad_()
    logp = exact.log_softmax(-1)
    (logp.exp() * (logp - reference)).sum().backward()
    often = ours.detach().softmax(-1)
    losses = []
    for i in range(6):
        logprob = ours.log_softmax(-1)[i : i + 1]
        losses.append(sta_ppo.kl_loss(logprob, reference[i : i + 1]))
    (often * torch.stack(losses)).sum().backward()
    assert torch.allclose(ours.grad, exact.grad, atol=1e-12)
    assert ours.grad.any()
    assert sta_ppo.kl_loss(reference, reference) == 0


def test_clipped_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        sta_ppo.ppo_loss(torch.zeros(4, 1), torch.zeros(4), 0.2)
    with pytest.raises(AssertionError):
        sta_ppo.ppo_loss(torch.zeros(4, 7), torch.zeros(4, 7), 0.2)


# What DPOTrainer appends to while it computes a loss.
TRL_METRICS = (
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def same(x):
    """What gathering gives with one process."""
    return x


def dpo_of_trl(
    loss_type: str,
    logprobs: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    beta: float,
):
    """TRL's loss, by its own code around a model that knows the log-probabilities already.

    logprobs, reference: (2P, T) of sequences, the chosen ones first. lengths: (2P,), how many
    tokens of each count. Returns the loss and the metrics that TRL logs.
    """
    mask = torch.arange(T) < lengths[:, None]
    metrics = {"train": {name: [] for name in TRL_METRICS}}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=metrics,
    )
    known = SimpleNamespace(
        log_probs=logprobs * mask,
        entropy=0 * logprobs,
        mean_logits=0 * logprobs,
        is_top1=mask,
    )
    ref_chosen, ref_rejected = (reference * mask).sum(1).chunk(2)
    # The prompt is one token.
    prompted = torch.cat([torch.zeros(2 * P, 1, dtype=torch.long), mask.long()], 1)
    inputs = {
        "input_ids": torch.zeros_like(prompted),
        "attention_mask": torch.ones_like(prompted),
        "completion_mask": prompted,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: known, inputs, False)
    return loss, metrics["train"]


@pytest.mark.parametrize(("reduction", "loss_type"), [("sum", "sigmoid"), ("mean", "sigmoid_norm")])
def test_preference_loss_and_its_gradient_are_trl_s(reduction, loss_type):
    """A step is a token here.

    With q as a sum the loss is DPO. With q as a mean over a segment's steps it is DPO's
    length-normalised form.
    """
    torch.manual_seed(1)
    reference = -torch.rand(2 * P, T, dtype=torch.double)
    lengths = torch.randint(1, T + 1, (2 * P,))
    generator = torch.Generator().manual_seed(2)
    noise = 0.3 * torch.randn(2 * P, T, generator=generator, dtype=torch.double)
    theirs_in = (reference + noise).requires_grad_()
    ours_in = (reference + noise).requires_grad_()
    theirs, metrics = dpo_of_trl(loss_type, theirs_in, reference, lengths, beta=0.7)
    ratios = ours_in - reference
    q = [getattr(ratios[i, :length], reduction)() for i, length in enumerate(lengths)]
    zero = torch.zeros(P, dtype=torch.double)
    losses, chosen, rejected = sta_tpo.sta_tpo_loss(
        *torch.stack(q).chunk(2), zero, zero, beta=0.7, cost_coef=0.1
    )
    assert losses.mean().item() == pytest.approx(theirs.item(), abs=1e-12)
    # TRL logs sums whatever the loss is.
    if reduction == "sum":
        assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"][0])
        assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"][0])
        accuracy = (chosen - rejected > 0).double().mean().item()
        assert accuracy == pytest.approx(metrics["rewards/accuracies"][0])
    theirs.backward()
    losses.mean().backward()
    assert torch.allclose(theirs_in.grad, ours_in.grad, atol=1e-12)
    assert ours_in.grad.any()
