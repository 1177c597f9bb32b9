"""PyTorch's training steps compute what ours do, and their ratios say what they claim."""

import json
import os

import numpy as np
import pytest

from benchmarks import gpu_program, step_arms, steps
from medvlp_jax.config import UserError

pytestmark = pytest.mark.hf


@pytest.mark.parametrize(
    "name", ["imitate", "clip", "cfcml", pytest.param("vit", marks=pytest.mark.slow)]
)
def test_a_step_is_the_same_in_both(name, tmp_path):
    """Loss, and loss after an update at a rate that moves it, from the same weights and batch."""
    config = step_arms.prepare(name, tmp_path, tiny=True)
    config["optim"]["lr"] = 1e-3
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = step_arms.ours(tmp_path), step_arms.theirs(tmp_path, compiled=False)
    first, second = (np.array([arm() for arm in (ours, theirs)]) for _ in range(2))
    np.testing.assert_allclose(*first, rtol=1e-5)
    np.testing.assert_allclose(*second, rtol=steps.SAME)
    assert abs(second[0] / first[0] - 1) > 10 * steps.SAME  # an update the tolerance could not hide


class Clock:
    """An arm whose steps take as long as it says."""

    def __init__(self, seconds, order):
        self.seconds, self.order = seconds, order

    def step(self):
        self.order.append(self)
        return {"seconds": self.seconds, "faults": 7}


def test_arms_take_turns_and_a_ratio_is_their_time_over_ours(monkeypatch):
    monkeypatch.setattr(steps, "REST", 0)
    order = []
    times = dict(zip(steps.ARMS, (2.0, 6.0, 3.0), strict=True))
    arms = {name: Clock(seconds, order) for name, seconds in times.items()}
    found = steps.ratios([steps.by_turns(arms, 4)])
    names = [next(n for n, arm in arms.items() if arm is taken) for taken in order]
    assert [names[i : i + 3] for i in range(0, 9, 3)] == [
        ["ours", "eager", "compiled"],
        ["eager", "compiled", "ours"],
        ["compiled", "ours", "eager"],
    ]
    assert found["ratios"]["eager"]["median"] == 3.0
    assert found["ratios"]["compiled"]["median"] == 1.5
    assert found["faster"] == "compiled"
    assert found["faults"] == dict.fromkeys(steps.ARMS, 7)


def test_a_pace_is_work_over_time_beside_the_product_of_the_same_turns(monkeypatch):
    monkeypatch.setattr(steps, "REST", 0)
    groups = []
    for ours, eager, product in ((4.0, 8.0, 1.0), (4.0, 5.0, 2.0)):
        times = {"ours": ours, "eager": eager, steps.PRODUCT: product}
        arms = {name: Clock(seconds, []) for name, seconds in times.items()}
        groups.append(steps.by_turns(arms, 3))
    # A step has twice the FLOPs of a product: 2 * 1 / 4 in the first three turns, 2 * 2 / 4 then.
    found = steps.paces(groups, work=2.0)
    np.testing.assert_allclose(found["ours"], np.median([0.5] * 3 + [1.0] * 3))
    np.testing.assert_allclose(found["eager"], np.median([0.25] * 3 + [0.8] * 3))
    assert steps.PRODUCT not in {**found, **steps.ratios(groups)["faults"]}


def test_a_product_is_of_the_type_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setattr(step_arms, "SIDES", {"float32": 8, "bfloat16": 16})
    for kind, flops in (("float32", 2 * 8**3), ("bfloat16", 2 * 16**3)):
        config = {"recipe": {"image": {"dtype": kind}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        take = step_arms.product(tmp_path)
        assert take.flops == step_arms.QUEUED * flops
        assert np.isfinite(take())


def test_several_products_are_queued_before_one_is_read(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(step_arms, "SIDES", {"float32": 8})
    (tmp_path / "config.json").write_text('{"recipe": {"image": {"dtype": "float32"}}}')
    take, made, multiply = step_arms.product(tmp_path), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **how: made.append(1) or multiply(*a, **how))
    take()
    # One alone would be timed with its start and its reading: a pace no step could be held to.
    assert len(made) == step_arms.QUEUED > 1


def test_tokens_that_are_filled_up_for_cudnn_are_no_work_of_the_step(tmp_path):
    config = step_arms.prepare("vit", tmp_path, tiny=True)
    counted = []
    for attention in ("xla", "cudnn"):
        for side in ("image", "text"):
            config["recipe"][side] |= {"attention": attention, "dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with gpu_program.pretended():
            counted.append(step_arms.ours(tmp_path).flops)
    assert counted[0] == counted[1] > 0


def test_two_at_a_time_each_is_compared_with_ours_of_its_own_turns(monkeypatch):
    monkeypatch.setattr(steps, "REST", 0)
    monkeypatch.setattr(steps, "prepare", lambda *_, **__: {"recipe": {"image": {"dtype": "f"}}})
    # ours beside eager, then, slower, beside compiled; each time the product, too
    seconds = iter((2.0, 6.0, 1.0, 4.0, 6.0, 2.0))
    alive = set()

    class Process(Clock):
        said = {"losses": [1.0], "flops": 10}  # noqa: RUF012 (never changed)

        def __init__(self, name):
            super().__init__(next(seconds), [])
            alive.add(self)
            assert len(alive) <= 3

        def close(self):
            alive.remove(self)

    monkeypatch.setattr(steps, "_arm", lambda name, _: Process(name))
    found = steps.compare("clip", 3, apart=True)
    assert not alive
    assert found["ratios"]["eager"]["median"] == 3.0
    assert found["ratios"]["compiled"]["median"] == 1.5
    assert found["faster"] == "compiled"
    assert found["of_a_product"]["ours"] == 0.5


STAND_IN = """
import json, os, sys
print("a library's word", flush=True)
print(json.dumps({"losses": [1.0], "kept": "GLIBC_TUNABLES" in os.environ}), flush=True)
for number, _ in enumerate(sys.stdin):
    if number == 2:
        sys.exit(3)
    print(json.dumps({"seconds": number}), flush=True)
"""


def test_a_process_answers_step_by_step_and_its_end_is_noticed():
    arm = steps.Arm("eager", ["-c", STAND_IN])
    other = steps.Arm("eager" + steps.WITHOUT, ["-c", STAND_IN])
    assert arm.said == {"losses": [1.0], "kept": True}
    assert other.said["kept"] is False
    assert [arm.step()["seconds"] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="eager ended with code 3"):
        arm.step()
    for each in (arm, other):
        each.close()


def test_a_process_that_is_killed_is_said_to_be():
    arm = steps.Arm("ours", ["-c", STAND_IN])
    arm.process.kill()
    arm.process.wait()
    with pytest.raises(steps.Ended, match=r"ours ended with code -9 \(killed: too little memory"):
        arm.step()
    arm.close()


def test_losses_that_differ_are_refused():
    steps.check_losses("clip", {"ours": [2.0, 1.0], "eager": [2.0001, 1.0]})
    for theirs in (2.001, float("nan")):
        with pytest.raises(ValueError, match="clip, step 1"):
            steps.check_losses("clip", {"ours": [2.0, 2.0], "eager": [2.0, theirs]})


def test_a_tiny_run_does_not_replace_the_results(capsys):
    with pytest.raises(SystemExit):
        steps.main(["--tiny"])
    assert "--out" in capsys.readouterr().err


def test_a_refused_case_leaves_the_others(monkeypatch, tmp_path):
    def compare(name, *_, **__):
        if name == "imitate":
            raise steps.Ended("ours ended with code -9.")
        steps.check_losses(name, {"ours": [1.0], "eager": [2.0 if name == "clip" else 1.0]})
        paces = dict.fromkeys(("ours", "eager"), 0.5)
        return {"title": name, "ratios": {}, "failed": {}, "faster": "eager", "of_a_product": paces}

    monkeypatch.setattr(steps, "compare", compare)
    out = tmp_path / "steps.json"
    with pytest.raises(SystemExit, match=r"Not measured: clip, step 0.* imitate: ours ended with"):
        steps.main(["--cases", "clip", "imitate", "cfcml", "--out", str(out)])
    assert list(json.loads(out.read_text())["cases"]) == ["cfcml"]


def test_a_case_that_is_measured_alone_leaves_the_others_and_says_what_with(monkeypatch, tmp_path):
    paces = dict.fromkeys(("ours", "eager"), 0.5)
    made = {"title": "t", "ratios": {}, "failed": {}, "faster": "eager", "of_a_product": paces}
    monkeypatch.setattr(steps, "compare", lambda *_, **__: dict(made))
    out = tmp_path / "steps.json"
    kept = json.loads((steps.ROOT / "benchmarks/results/steps.json").read_text())
    kept["threads"] = len(os.sched_getaffinity(0))
    older = kept.pop("versions", None) or {"jax": "0.1"}
    out.write_text(json.dumps({**kept, "versions": older}))
    steps.main(["--cases", "clip", "--pairs", "3", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["cases"]) == set(kept["cases"])
    assert found["cases"]["cfcml"]["measured"] == {"versions": older}  # and no more is known of it
    assert found["cases"]["clip"]["turns"] == 3
    measured = found["cases"]["clip"]["measured"]
    assert measured["versions"].keys() == {"python", "jax", "torch", "transformers"}
    assert measured["cpu"]
    assert measured["code"].keys() == {"version", "commit", "dirty"}
    assert "versions" not in found
    out.write_text(json.dumps({**found, "threads": 0}))
    with pytest.raises(UserError, match=r"holds numbers of settings .*: name another --out"):
        steps.main(["--cases", "clip", "--out", str(out)])


@pytest.mark.slow
def test_processes_take_steps_by_turns(tmp_path, capsys):
    """All three, torch.compile as well where there is a compiler."""
    out = tmp_path / "steps.json"
    arguments = ["--tiny", "--malloc", "--pairs", "2", "--cases", "imitate-demo"]
    steps.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())["cases"]["imitate-demo"]
    measured = {"eager", "compiled", *(kind + steps.WITHOUT for kind in steps.LOSING)}
    assert set(found["ratios"]) | set(found["failed"]) == measured
    assert not set(found["failed"]) - {"compiled"}  # where there is no C++ compiler
    # What is kept is not faulted in again.
    assert found["faults"]["eager"] < found["faults"]["eager" + steps.WITHOUT]
    for losses in found["losses"].values():
        assert len(losses) == step_arms.AGREE
    assert set(found["of_a_product"]) == {"ours", *measured} - set(found["failed"])
    assert min(found["of_a_product"].values()) > 0
    assert "| IMITATE, the demo" in capsys.readouterr().out
