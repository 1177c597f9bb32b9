"""Volumes: what is stored comes back, and a view keeps its promises."""

import copy

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import records, volumes


def make(seed=0, side=32, slices=5):
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 3000, (side, side, slices))
    volume[:4] = 0
    return volume.astype(np.uint16)


def test_a_volume_comes_back_bit_for_bit():
    volume = make()
    found = volumes.decode(records.encode_volume(volume), slices=5, size=32)
    np.testing.assert_array_equal(found, volume)
    assert found.dtype == np.float32


def test_a_volume_of_another_size_is_resized_slice_by_slice():
    flat = np.ones((32, 32, 3), np.uint16) * np.array([7, 900, 40], np.uint16)
    found = volumes.decode(records.encode_volume(flat), slices=3, size=16)
    np.testing.assert_allclose(found, flat[:16, :16], rtol=1e-6)


def test_a_picture_that_holds_other_slices_is_refused():
    with pytest.raises(UserError, match="160 rows does not hold 7 slices"):
        volumes.decode(records.encode_volume(make()), slices=7, size=32)


def test_normalise_standardises_what_is_above_zero_and_keeps_the_rest():
    volume = make().astype(np.float32)
    found = volumes.normalise(volume)
    inside = volume > 0
    assert (found[~inside] == 0).all()
    np.testing.assert_allclose(found[inside].mean(), 0, atol=1e-4)
    np.testing.assert_allclose(found[inside].std(), 1, rtol=1e-4)
    clipped = np.clip(volume, 0, 1200)
    expected = (clipped - clipped[inside].mean()) / clipped[inside].std()
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-4, atol=1e-5)
    for empty in (np.zeros((4, 4, 2)), np.full((4, 4, 2), 5.0)):
        assert (volumes.normalise(empty) == 0).all()


def test_without_augmentation_a_view_is_the_centre():
    volume = make().astype(np.float32)
    found = volumes.men_view(volume, np.random.default_rng(0), size=32, probability=0.0)
    np.testing.assert_allclose(found, volumes.center_view(volume, size=32), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, volumes.normalise(volume), rtol=1e-5, atol=1e-6)


def test_a_view_is_a_function_of_its_generator_and_sequences_share_geometry_not_noise():
    volume = make().astype(np.float32)
    shifted = np.where(volume > 0, volume / 2, 0)
    same = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        views = [
            volumes.men_view(v, copy.deepcopy(rng), size=32, probability=0.5, ceiling=9e3)
            for v in (volume, volume, shifted)
        ]
        assert views[0].shape == (32, 32, 5)
        assert np.isfinite(views[0]).all()
        np.testing.assert_array_equal(views[0], views[1])
        correlation = np.corrcoef(views[0].ravel(), views[2].ravel())[0, 1]
        assert correlation > 0.2  # the same crop, flip and patch
        same += correlation > 0.95
    assert 0 < same < 12  # noise, where there is noise, is each sequence's own


class OnlyErases:
    """A generator that says yes to the last of crop, flip, noise and erasing; the rest is drawn."""

    def __init__(self, seed):
        drawn = np.random.default_rng(seed)
        self.answers = iter((1.0, 1.0, 1.0, 0.0))
        self.uniform, self.integers = drawn.uniform, drawn.integers

    def random(self):
        return next(self.answers)


def test_erasing_takes_two_to_ten_percent_of_the_plane_through_all_slices():
    volume = np.full((64, 64, 3), 100, np.float32) + make(side=64, slices=3)
    shares = set()
    for seed in range(40):
        view = volumes.men_view(volume, OnlyErases(seed), size=64, ceiling=9e3)
        # No voxel has the mean of all exactly: what is zero was erased.
        erased = view == 0
        assert erased.any()
        assert (erased == erased[..., :1]).all()
        rows, columns = (np.flatnonzero(erased[..., 0].any(axis)) for axis in (1, 0))
        assert erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        share = len(rows) * len(columns) / 64**2
        assert erased.mean() == share
        assert 0.015 < share < 0.115
        shares.add(share)
    assert len(shares) > 10
