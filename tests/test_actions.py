"""Actions <-> tokens: OpenVLA's binning."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sft
import vla
from world.tasks import TASKS

N_BINS = 256
# Dimension 3 is not scaled, and the last one is constant.
STATS = {
    "q01": [-1.0, -0.3, 0.5, -1.0, 0.25],
    "q99": [1.0, 0.7, 0.5001, 1.0, 0.25],
    "mask": [True, True, True, False, True],
}
LOW = torch.tensor([-1.0, -0.3, 0.5, -1.0, 0.25])
HIGH = torch.tensor([1.0, 0.7, 0.5001, 1.0, 0.25])


def openvla_tokenize(x: np.ndarray) -> np.ndarray:
    """Normalised actions -> 1..256, where the token id is the vocabulary's size minus that.

    As in openvla/openvla, prismatic/vla/action_tokenizer.py.
    """
    return np.digitize(np.clip(x, -1.0, 1.0), np.linspace(-1.0, 1.0, N_BINS))


def openvla_detokenize(discretized: np.ndarray) -> np.ndarray:
    """1..256 -> the centres of the bins, in the same file."""
    bins = np.linspace(-1.0, 1.0, N_BINS)
    return ((bins[:-1] + bins[1:]) / 2.0)[np.clip(discretized - 1, 0, N_BINS - 2)]


def round_trip(actions: torch.Tensor, stats: dict) -> torch.Tensor:
    """Actions as tokens and back."""
    return vla.detokenize_actions(vla.tokenize_actions(actions, stats), stats)


def test_bins_equal_openvlas_digitize():
    stats = {"q01": [-0.4, -1.0], "q99": [0.6, 1.0], "mask": [True, False]}
    x = np.random.default_rng(0).uniform(-1.3, 1.3, (20_000, 2))
    # Values so near an edge that the rounding of fp32 decides are left out.
    place = (x + 1) * 127.5
    x = x[(np.abs(place - np.round(place)) > 1e-3).all(1)]
    x = np.concatenate([x, [[-1.0, -1.0], [1.0, 1.0]]])
    actions = np.stack([(x[:, 0] + 1) / 2 - 0.4, x[:, 1]], 1)
    bins = vla.tokenize_actions(torch.tensor(actions, dtype=torch.float32), stats)
    assert bins.dtype == torch.long
    assert torch.equal(bins, torch.tensor(openvla_tokenize(x) - 1))
    decoded = openvla_detokenize(openvla_tokenize(x))
    expected = np.stack([(decoded[:, 0] + 1) / 2 - 0.4, decoded[:, 1]], 1)
    np.testing.assert_allclose(vla.detokenize_actions(bins, stats).numpy(), expected, atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_round_trip_is_within_half_a_bin(where):
    actions = (LOW + torch.tensor(where) * (HIGH - LOW))[None]
    decoded = round_trip(actions, STATS)
    assert decoded.dtype == torch.float32
    assert ((decoded - actions).abs() <= (HIGH - LOW) / (N_BINS - 1) / 2 + 1e-6).all()


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5))
def test_values_outside_are_clipped(values):
    actions = torch.tensor(values)[None]
    clipped = actions.clamp(LOW, HIGH)
    bins = vla.tokenize_actions(actions, STATS)
    assert torch.equal(bins, vla.tokenize_actions(clipped, STATS))
    decoded = round_trip(actions, STATS)
    assert (decoded >= LOW - 1e-6).all()
    assert (decoded <= HIGH + 1e-6).all()


def test_every_bin_decodes_to_its_own_centre_and_the_last_to_the_one_before():
    bins = torch.arange(N_BINS)[:, None]
    # The mask is optional.
    stats = {"q01": [-0.2], "q99": [0.4]}
    again = vla.tokenize_actions(vla.detokenize_actions(bins, stats), stats)
    assert torch.equal(again, bins.clamp(max=N_BINS - 2))


def test_a_dimension_with_mask_false_is_taken_as_it_is():
    stats = {"q01": [5.0], "q99": [9.0], "mask": [False]}
    actions = torch.linspace(-1, 1, 101)[:, None]
    assert (round_trip(actions, stats) - actions).abs().max() <= 1 / (N_BINS - 1) + 1e-6


def test_a_constant_dimension_decodes_to_its_constant_whatever_the_token():
    bins = torch.arange(N_BINS)[:, None].expand(-1, 5)
    assert (vla.detokenize_actions(bins, STATS)[:, 4] == 0.25).all()
    assert (vla.tokenize_actions(torch.randn(8, 5), STATS)[:, 4] == N_BINS // 2).all()
    assert vla.constant_dims(STATS).tolist() == [False, False, False, False, True]
    # A gripper that never moved is not scaled.
    unmasked = {"q01": [0.3], "q99": [0.3], "mask": [False]}
    decoded = vla.detokenize_actions(bins[:, :1], unmasked)
    assert torch.equal(decoded, torch.full((N_BINS, 1), 0.3))


@given(st.integers(2, 300))
def test_any_number_of_bins_is_used_to_the_end(n_bins):
    stats = {"q01": [-1.0], "q99": [1.0]}
    bins = vla.tokenize_actions(torch.linspace(-1, 1, 999)[:, None], stats, n_bins)
    assert bins.min() == 0
    assert bins.max() == n_bins - 1


def folded_normal(label: int, deviation: float) -> torch.Tensor:
    """(N_BINS,) probabilities of a rounded normal distribution, reflected at the outer bins."""
    normal = torch.distributions.Normal(0.0, deviation)
    offsets = torch.arange(-40, 41)
    mass = normal.cdf(offsets + 0.5) - normal.cdf(offsets - 0.5)
    folded = torch.zeros(N_BINS)
    for offset, share in zip(offsets, mass, strict=True):
        at = abs(int(label + offset))
        if at >= N_BINS:
            at = 2 * (N_BINS - 1) - at
        folded[at] += share
    return folded


def test_blurred_bins_are_the_label_and_its_neighbours_and_no_end_is_favoured():
    labels = torch.tensor([0, 2, 128, 255])
    deviation = 4.0
    generator = torch.Generator().manual_seed(0)
    drawn = vla.blur_bins(labels.repeat(200_000, 1), deviation, N_BINS, generator)
    assert drawn.dtype == torch.long
    assert drawn.min() == 0
    assert drawn.max() == N_BINS - 1
    # The peak of the distribution far from the ends.
    peak = folded_normal(128, deviation).max()
    for column, label in enumerate(labels):
        found = torch.bincount(drawn[:, column], minlength=N_BINS) / len(drawn)
        assert (found - folded_normal(int(label), deviation)).abs().max() < 0.004
        assert found.max() < 2.1 * peak
    far = vla.blur_bins(labels[None], 1e4, N_BINS, torch.Generator().manual_seed(1))
    assert ((far >= 0) & (far < N_BINS)).all()
    same = vla.blur_bins(labels[None], 0.0, N_BINS, torch.Generator())
    assert torch.equal(same, labels[None])


def test_shifted_images_are_windows_of_the_image_with_its_edge_repeated():
    largest = 2
    images = torch.arange(3 * 5 * 7 * 3, dtype=torch.uint8).reshape(3, 5, 7, 3).repeat(40, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(-largest, largest + 1, (len(images), 2), generator=generator)
    shifted = vla.shift_images(images, shift)
    assert shifted.dtype == torch.uint8
    found = set()
    for image, moved, pixels in zip(images.numpy(), shifted.numpy(), shift.tolist(), strict=True):
        padded = np.pad(image, [(largest, largest), (largest, largest), (0, 0)], "edge")
        windows = [
            (row, column)
            for row, column in np.ndindex(2 * largest + 1, 2 * largest + 1)
            if (padded[row : row + 5, column : column + 7] == moved).all()
        ]
        assert windows == [(largest + pixels[0], largest + pixels[1])]
        found.update(windows)
    # Every shift is drawn, to both sides.
    assert len(found) == (2 * largest + 1) ** 2
    unmoved = vla.shift_images(images, torch.zeros(len(images), 2, dtype=torch.long))
    assert torch.equal(unmoved, images)


def test_demonstrations_that_move_further_than_the_expert_are_not_clipped():
    """SimplerEnv's controller takes metres, and the expert's steps end at 5 cm."""
    env_id = "PutCarrotOnPlateInScene-v1"
    actions = 0.01 * torch.randn(16, 7, generator=torch.Generator().manual_seed(0))
    actions[0, 0] = 0.1
    # Twice the expert's largest step is ordinary, and more where several actions need it.
    actions[1:4, 1] = -0.2
    stats = sft.action_stats(actions, env_id)
    assert stats["q99"] == pytest.approx([0.1, 0.2, *TASKS[env_id].arm.limit[2:]])
    decoded = round_trip(actions, stats)
    assert torch.allclose(decoded[:4, :2], actions[:4, :2], atol=1e-3)
