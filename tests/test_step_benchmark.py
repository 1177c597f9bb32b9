"""PyTorch's training steps compute what ours do, and their ratios say what they claim."""

import json

import numpy as np
import pytest

from benchmarks import check, pytorch_step, step_arms, steps

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("name", ["imitate", "clip", "cfcml"])
def test_a_step_is_the_same_in_both(name, tmp_path):
    """Loss, and the loss after an update at a rate that moves it, of the same weights and batch."""
    config = step_arms.prepare(name, tmp_path, tiny=True)
    config["optim"]["lr"] = 1e-3
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = step_arms.ours(tmp_path), step_arms.theirs(tmp_path, compiled=False)
    first, second = (np.array([arm() for arm in (ours, theirs)]) for _ in range(2))
    np.testing.assert_allclose(*first, rtol=1e-5)
    np.testing.assert_allclose(*second, rtol=steps.SAME)
    assert abs(second[0] / first[0] - 1) > 10 * steps.SAME  # the update is not lost in the tolerance
