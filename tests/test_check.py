"""The regression gate: what has fallen is said, what only wavers is not."""

import json

import pytest

from benchmarks import check


def ratio(median, noise=0.1):
    return {"median": median, "quartiles": [median, median], "noise": noise}


def file_of(**ratios):
    return {"cases": {name: {"ratios": {"eager": entry}} for name, entry in ratios.items()}}


def test_an_entry_is_median_quartiles_and_noise_of_the_ratios():
    found = check.entry([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == {"median": 3.0, "quartiles": [2.0, 4.0], "noise": pytest.approx(1 / 3)}
    assert check.entry([2.0] * 5)["noise"] == check.FLOOR
    assert check.text(found) == "3.00 (2.00-4.00)"


def test_ratios_are_found_wherever_they_stand():
    found = {**file_of(a=ratio(1.0)), "threads": 2, "rows": [1, 2], "loop": ratio(3.0)}
    paths = dict(check.entries(found))
    assert set(paths) == {"cases/a/ratios/eager", "loop"}
    assert paths["loop"]["median"] == 3.0


@pytest.mark.parametrize(
    ("new", "kept", "falls"),
    [
        (ratio(1.0), ratio(1.0), False),
        (ratio(1.5), ratio(1.0), False),  # faster is no fault
        (ratio(0.87), ratio(1.0), False),  # within hypot(0.1, 0.1) = 0.141
        (ratio(0.85), ratio(1.0), True),
        (ratio(0.85, 0.05), ratio(1.0, 0.2), False),
        (ratio(0.78, 0.05), ratio(1.0, 0.2), True),
    ],
)
def test_a_ratio_falls_when_it_is_lower_by_more_than_the_noise_of_both(new, kept, falls):
    lines = check.fallen(file_of(a=new, b=ratio(1.0)), file_of(a=kept))
    assert bool(lines) == falls
    if falls:
        assert lines[0].startswith("cases/a/ratios/eager: ")


def test_what_is_no_longer_measured_is_named():
    (line,) = check.fallen(file_of(a=ratio(1.0)), file_of(a=ratio(1.0), b=ratio(2.0)))
    assert line.startswith("cases/b/ratios/eager: kept 2.00")


def test_the_command_ends_with_a_code_for_each_outcome(tmp_path, capsys):
    files = {
        "kept": file_of(a=ratio(1.0)),
        "fallen": file_of(a=ratio(0.5)),
        "other": file_of(b=ratio(1.0)),
        "broken": file_of(a=ratio(float("nan"))),
        "noisy": file_of(a=ratio(1.0, 0.6)),
        "tiny": file_of(a=ratio(1.0)) | {"tiny": True},
    }
    for name, found in files.items():
        (tmp_path / name).write_text(json.dumps(found))
    main = lambda new: check.main([str(tmp_path / new), str(tmp_path / "kept")])
    assert main("kept") == 0
    assert main("fallen") == 1
    assert "0.50" in capsys.readouterr().out
    unlike = (("other", "no ratio in common"), ("broken", "nan"), ("absent", "absent"))
    unlike += (("noisy", "noise of 60%"), ("tiny", "tiny is True now and None"))
    for name, said in unlike:
        assert main(name) == 2
        assert said in capsys.readouterr().err
