"""The regression gate: what has fallen is said, what only wavers is not."""

import json

import pytest

from benchmarks import check


def ratio(median, noise=0.1):
    return {"median": median, "quartiles": [median, median], "noise": noise}


FACTS = {"device": "cpu", "threads": 2}


def file_of(**ratios):
    return {"cases": {name: {"ratios": {"eager": entry}} for name, entry in ratios.items()}} | FACTS


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
        "listed": [file_of(a=ratio(1.0))],
    }
    for name, found in files.items():
        (tmp_path / name).write_text(json.dumps(found))
    main = lambda new: check.main([str(tmp_path / new), str(tmp_path / "kept")])
    assert main("kept") == 0
    assert main("fallen") == 1
    assert "0.50" in capsys.readouterr().out
    unlike = (("other", "no ratio in common"), ("broken", "nan"), ("absent", "absent"))
    unlike += (("noisy", "noise of 60%"), ("tiny", "tiny is True now and False"))
    unlike += (("listed", "listed holds a list and no measurement"),)
    for name, said in unlike:
        assert main(name) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("fact", check.FACTS)
def test_files_that_differ_in_a_fact_are_not_compared(fact):
    kept = file_of(a=ratio(1.0)) | {fact: "one"}
    with pytest.raises(check.CheckError, match=f"{fact} is other now and one in the kept file"):
        check.unlike(kept | {fact: "other"}, kept)


def test_what_a_file_does_not_say_and_another_processor_is_a_warning(tmp_path, capsys):
    new = file_of(a=ratio(1.0), b=ratio(1.0)) | {"recipe": "clip", "threads": 2}
    kept = file_of(a=ratio(1.0))
    for case in new["cases"].values():
        case["measured"] = {"cpu": "this"}
    kept["cases"]["a"]["measured"] = {"cpu": "that"}
    del kept["threads"]
    for name, found in (("new", new), ("kept", kept)):
        (tmp_path / name).write_text(json.dumps(found))
    assert check.main([str(tmp_path / "new"), str(tmp_path / "kept")]) == 0
    said = [line.split(": ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "threads is 2 now and unknown in the kept file.",
        "recipe is clip now and unknown in the kept file.",
        "the processor of cases/a is this now and that in the kept file.",
    ]
    neither = {name: value for name, value in kept.items() if name != "device"}
    assert "device is unknown now and unknown" in check.unlike(neither, neither)[0]


def test_a_kept_measurement_that_would_let_anything_pass_is_refused():
    with pytest.raises(check.CheckError, match="noise of 60% in the kept file, more than 25%"):
        check.fallen(file_of(a=ratio(0.1)), file_of(a=ratio(1.0, 0.6)))
