"""Extraction of many reports: nothing lost, nothing asked twice, the same file in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from server import hang_up, serve

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import __main__ as verb
from medvlp_jax.evidence import extract, schema
from medvlp_jax.evidence.backends import writer
from medvlp_jax.evidence.protocol import Backend, Reply

RULES = writer("rules", extract.write_rules)
REPORTS = [
    Report("a", "Small right pleural effusion.", "Effusion."),
    Report("b", "The lungs are clear. No effusion.", ""),
    Report("c", "", ""),
    Report("d", "The lungs are clear. No effusion.", ""),
    Report("e", "Kein Pneumothorax, kein Erguss, Herz normal gross, Lunge frei.", ""),
    Report("f", 'The lungs hold {0} "braces" and {"evidence": []}, %s. No effusion.', ""),
    Report("g", "Small right effusion is seen. " * 2500, ""),
    Report("h", "XXXX XXXX XXXX are clear.", ""),
]
SLOW = """
import sys, time
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import backends, extract
def write(text):
    time.sleep(float(sys.argv[2]))
    return extract.write_rules(text)
texts = [f"Small effusion measuring {i} mm. Heart is enlarged." for i in range(60)]
reports = [Report(f"r{i}", text, "") for i, text in enumerate(texts)]
extract.run(reports, backends.writer("rules", write), sys.argv[1])
"""


def answering(requests, check):
    return (Reply(r.key, extract.write_rules(r.text)) for r in requests)


def rows(folder):
    return [json.loads(line) for line in (folder / "evidence.jsonl").read_text().splitlines()]


def test_every_report_has_one_row_in_order_and_odd_ones_are_counted_and_listed(tmp_path):
    summary = extract.run(REPORTS, RULES, tmp_path)
    assert [row["id"] for row in rows(tmp_path)] == [report.id for report in REPORTS]
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == {"empty": 1, "nothing recognised": 1, "ok": 6}
    listed = {kind: entry["ids"] for kind, entry in summary["odd"].items()}
    assert listed == {
        "empty": ["c"],
        "not English": ["e"],
        "nothing recognised": ["e"],
        "long": ["g"],
        "masked": ["h"],
    }
    assert rows(tmp_path)[1]["evidence"][-1] == schema.normal()
    assert rows(tmp_path)[4]["evidence"] == []


def test_equal_texts_are_asked_about_once_and_a_second_start_asks_nothing(tmp_path):
    asked = []

    def write(text):
        asked.append(text)
        return extract.write_rules(text)

    extract.run(REPORTS, writer("rules", write), tmp_path)
    first = (tmp_path / "evidence.jsonl").read_bytes()
    assert len(asked) == len(set(asked)) == 6
    extract.run(REPORTS, writer("rules", write), tmp_path)
    assert len(asked) == 6
    assert (tmp_path / "evidence.jsonl").read_bytes() == first
    extract.run([*REPORTS, Report("new", "Mass.", "")], writer("rules", write), tmp_path)
    assert asked[6:] == ["Mass."]


def test_the_order_of_replies_changes_no_file(tmp_path):
    def shuffled(requests, check):
        requests = list(requests)
        random.Random(1).shuffle(requests)
        return (Reply(r.key, extract.write_rules(r.text)) for r in requests)

    extract.run(REPORTS, RULES, tmp_path / "a")
    extract.run(REPORTS, Backend("rules", shuffled), tmp_path / "b")
    for name in ("evidence.jsonl", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_an_extraction_killed_ten_times_ends_with_the_file_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", SLOW]
    subprocess.run([*command, whole, "0"], check=True, capture_output=True)
    kills, grown = 0, [0]
    while kills < 10:
        process = subprocess.Popen(
            [*command, killed, "0.1"], stderr=subprocess.DEVNULL, start_new_session=True
        )
        # A kill may come at any moment once this start has added something.
        while process.poll() is None and _lines(killed) <= grown[-1] + 1:
            time.sleep(0.01)
        assert process.poll() is None, "ended before the tenth kill"
        time.sleep(random.Random(kills).uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        grown.append(_lines(killed))
        assert not (killed / "evidence.jsonl").exists()
        if kills == 5:  # as if the kill had come inside a write
            with (killed / "cache.jsonl").open("ab") as file:
                file.write(b'{"key": "00", "evid')
    subprocess.run([*command, killed, "0"], check=True, capture_output=True)
    for name in ("evidence.jsonl", "summary.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert grown == sorted(grown)
    assert _lines(killed) == _lines(whole) == 61  # no text was asked about twice


def _lines(folder):
    path = folder / "cache.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_half_written_line_is_asked_about_again(tmp_path):
    extract.run(REPORTS, RULES, tmp_path)
    expected = (tmp_path / "evidence.jsonl").read_bytes()
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-20])
    extract.run(REPORTS, RULES, tmp_path)
    assert (tmp_path / "evidence.jsonl").read_bytes() == expected


def test_a_damaged_line_with_answers_behind_it_is_named_and_nothing_is_lost(tmp_path):
    extract.run(REPORTS, RULES, tmp_path)
    cache = tmp_path / "cache.jsonl"
    lines = cache.read_bytes().splitlines(keepends=True)
    for number in (1, 3):
        damaged = b"".join([*lines[: number - 1], b"{no\n", *lines[number:]])
        cache.write_bytes(damaged)
        with pytest.raises(UserError, match=f"line {number} is damaged"):
            extract.run(REPORTS, RULES, tmp_path)
        assert cache.read_bytes() == damaged


def test_an_answer_without_a_single_item_of_the_form_is_a_failure(tmp_path):
    wrong = '{"evidence": [{"phrase": "effusion", "change": "unchanged"}]}'
    summary = extract.run(REPORTS[:1], writer("m", lambda text: wrong), tmp_path)
    assert summary["odd"]["failed"] == {"count": 1, "ids": ["a"]}
    assert rows(tmp_path)[0]["error"].startswith("malformed answer")


def test_a_model_that_lists_denials_alone_has_said_that_nothing_is_wrong(tmp_path):
    report = Report("a", "No effusion. No pneumothorax.", "")
    denied = [
        {**dict.fromkeys(schema.FIELDS), "phrase": name, "finding": name, "certainty": "absent"}
        | {"location": "", "attributes": []}
        for name in ("effusion", "pneumothorax")
    ]
    model = writer("model", lambda text: json.dumps({"evidence": denied}))
    extract.run([report], model, tmp_path)
    assert rows(tmp_path)[0]["evidence"] == [*denied, schema.normal()]


NO_AIR = {**dict.fromkeys(schema.FIELDS), "phrase": "pneumothorax", "finding": "pneumothorax"}
NO_AIR |= {"location": "", "attributes": [], "certainty": "absent"}
FLUID = {**NO_AIR, "phrase": "Large right pleural effusions", "finding": "effusion"}
FLUID |= {"certainty": "present"}


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("Large right pleural effusions. No pneumothorax.", {**FLUID, "certainty": "sure"}),
        ("Large right pleural effusions. No pneumothorax.", {**FLUID, "phrase": "left effusion"}),
        ("The heart is enlarged. No pneumothorax.", {**FLUID, "phrase": "cardiomegaly"}),
    ],
)
def test_a_report_of_which_a_finding_was_dropped_is_not_a_normal_one(tmp_path, text, item):
    model = writer("model", lambda text: json.dumps({"evidence": [NO_AIR, item]}))
    summary = extract.run([Report("a", text, ""), Report("b", "", "")], model, tmp_path)
    assert rows(tmp_path)[0]["evidence"] == [NO_AIR]
    assert summary["odd"]["items dropped"] == {"count": 1, "ids": ["a"]}


def test_an_answer_that_was_cut_off_has_not_said_that_nothing_is_wrong(tmp_path):
    whole = json.dumps({"evidence": [NO_AIR, FLUID]})
    report = Report("a", "Large right pleural effusions. No pneumothorax.", "")
    summary = extract.run([report], writer("model", lambda text: whole[:-20]), tmp_path)
    assert rows(tmp_path)[0]["evidence"] == [NO_AIR]
    assert summary["odd"]["items dropped"]["ids"] == ["a"]
    assert summary["dropped"] == {"cut off": 1}


def test_a_finding_stands_whatever_its_degree_and_number_and_a_repetition_is_no_loss(tmp_path):
    report = Report("a", "Large right pleural effusions. No pneumothorax.", "")
    said = {**FLUID, "phrase": "right pleural effusion", "severity": "large"}
    model = writer("model", lambda text: json.dumps({"evidence": [NO_AIR, said, NO_AIR]}))
    summary = extract.run([report], model, tmp_path)
    assert rows(tmp_path)[0]["evidence"] == [NO_AIR, {**said, "severity": None}]
    assert summary["odd"] == {}


def test_failures_are_listed_and_asked_about_again(tmp_path):
    def failing(requests, check):
        for i, r in enumerate(requests):
            yield Reply(r.key, "" if i == 0 else '{"evidence": []}', "refused: x" if i == 0 else "")

    summary = extract.run(REPORTS[:2], Backend("m", failing), tmp_path)
    assert summary["odd"]["failed"] == {"count": 1, "ids": ["a"]}
    assert rows(tmp_path)[0]["error"] == "refused: x"
    assert summary["errors"] == {"refused: x": 1}
    again = []

    def noted(requests, check):
        for r in requests:
            again.append(r.text)
            yield from answering([r], check)

    summary = extract.run(REPORTS[:2], Backend("m", noted), tmp_path)
    assert again == [REPORTS[0].text]
    assert "failed" not in summary["odd"]


def test_an_endpoint_that_dies_loses_no_paid_answer(tmp_path):
    from medvlp_jax.evidence.endpoint import endpoint

    reports = [Report(str(i), f"Effusion of {i} cm.", "") for i in range(20)]
    answer = lambda prompt: extract.write_rules(prompt.split("Report:\n")[1])
    settings = {"in_flight": 1, "attempts": 1, "patience": 2, "sleep": lambda seconds: None}
    dies = serve(lambda n, prompt: answer(prompt) if n <= 7 else hang_up)
    with dies as server, pytest.raises(UserError, match="start the same command again"):
        extract.run(reports, endpoint(server.url, "m", **settings), tmp_path)
    assert not (tmp_path / "evidence.jsonl").exists()
    with serve(lambda n, prompt: answer(prompt)) as server:
        extract.run(reports, endpoint(server.url, "m", **settings), tmp_path)
    assert len(server.prompts) == 20 - 7
    extract.run(reports, RULES, tmp_path / "rules")
    assert rows(tmp_path) == rows(tmp_path / "rules")


def test_answers_of_another_backend_are_not_mixed_in(tmp_path):
    extract.run(REPORTS, RULES, tmp_path)
    with pytest.raises(UserError, match="holds answers of rules"):
        extract.run(REPORTS, Backend("endpoint:m", lambda r, c: iter(())), tmp_path)


def test_answers_of_another_limit_or_of_other_rules_are_not_mixed_in(tmp_path, monkeypatch):
    asked = lambda limit: Backend("m", answering, settings={"max_tokens": limit})
    extract.run(REPORTS, asked(9), tmp_path / "m")
    with pytest.raises(
        UserError, match="prompt 1, max_tokens 9, not of m to prompt 1, max_tokens 8"
    ):
        extract.run(REPORTS, asked(8), tmp_path / "m")
    extract.run(REPORTS, RULES, tmp_path / "rules")
    changed = tmp_path / "rules.py"
    changed.write_text("Another rule.")
    monkeypatch.setattr(extract.rules, "__file__", str(changed))
    with pytest.raises(UserError, match=r"holds answers of rules .* or move that file away"):
        extract.run(REPORTS, RULES, tmp_path / "rules")


def test_a_cache_without_an_answer_is_anybodys(tmp_path):
    broken = Backend("m", lambda requests, check: (Reply(r.key, error="x") for r in requests))
    extract.run(REPORTS, broken, tmp_path)
    assert "failed" not in extract.run(REPORTS, RULES, tmp_path)["status"]
    extract.run(REPORTS, RULES, tmp_path)
    assert _lines(tmp_path) == 1 + 6


def test_an_answer_is_kept_as_it_came_and_read_by_todays_code(tmp_path, monkeypatch):
    asked = []

    def complete(requests, check):
        for r in requests:
            asked.append(r.text)
            yield from answering([r], check)

    extract.run(REPORTS[:2], Backend("m", complete), tmp_path)
    assert len(asked) == 2
    parse, odd = schema.parse, REPORTS[1].text

    def better(answer, text):
        if text == odd:
            raise schema.Malformed("no longer")
        parsed = parse(answer, text)
        return parsed._replace(evidence=[{**i, "location": "x"} for i in parsed.evidence])

    with monkeypatch.context() as patch:
        patch.setattr(schema, "parse", better)
        extract.run(REPORTS[:2], Backend("m", complete), tmp_path)
        assert {item["location"] for item in rows(tmp_path)[0]["evidence"]} == {"x"}
    assert asked[2:] == [odd]  # which could not be read any more


def test_a_cache_from_before_is_read_as_it_is(tmp_path):
    extract.run(REPORTS, Backend("m", answering, settings={"max_tokens": 1024}), tmp_path)
    before = (tmp_path / "evidence.jsonl").read_bytes()
    cache = tmp_path / "cache.jsonl"
    _, *lines = map(json.loads, cache.read_text().splitlines())
    for line in lines:
        del line["answer"]
    old = [{"backend": "m", "prompt": 1}, *lines]
    cache.write_text("".join(json.dumps(line) + "\n" for line in old))
    silent = Backend("m", lambda requests, check: iter(()), settings={"max_tokens": 1024})
    extract.run(REPORTS, silent, tmp_path)
    assert (tmp_path / "evidence.jsonl").read_bytes() == before


def test_nobody_else_reads_the_answers(tmp_path):
    extract.run(REPORTS, RULES, tmp_path)
    assert (tmp_path / "cache.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("before", "limit"), [(0, 20), (1, 200), (2100, 210)])
def test_a_backend_that_answers_uselessly_stops_the_run(tmp_path, before, limit):
    reports = [Report(str(i), f"Effusion of {i} cm.", "") for i in range(before + limit + 5)]
    taken, closed = [], []

    def useless(requests, check):
        try:
            for r in requests:
                taken.append(r.key)
                good = int(r.text.split()[2]) < before
                yield Reply(r.key, '{"evidence": []}' if good else "", "" if good else "cut off")
        finally:
            closed.append(True)

    with pytest.raises(UserError, match=rf"^{limit} requests in a row to m failed, .* 'cut off'"):
        extract.run(reports, Backend("m", useless), tmp_path)
    assert len(taken) == before + limit
    assert closed
    assert not (tmp_path / "evidence.jsonl").exists()
    # The next start meets the same failures, and what was answered counts.
    summary = extract.run(reports[: before + 19], Backend("m", useless), tmp_path)
    assert summary["errors"] == {"cut off": 19}
    assert len(taken) == before + limit + 19


def test_two_reports_of_one_id_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="'a'"):
        extract.run([REPORTS[0], REPORTS[0]], RULES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_reports_does_not_replace_earlier_evidence(tmp_path, capsys):
    extract.run(REPORTS, RULES, tmp_path / "out")
    before = (tmp_path / "out" / "evidence.jsonl").read_bytes()
    for name, content in (("r.jsonl", ""), ("r.csv", "id,text\n"), ("r.csv", "")):
        (tmp_path / name).write_text(content)
        command = ["evidence", "extract", "--reports", str(tmp_path / name)]
        assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
    assert (tmp_path / "out" / "evidence.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--timeout", value) for value in ("-2", "0", "nan", "inf", "x")),
        *(("--price-in", value) for value in ("-5", "nan")),
        ("--price-out", "-0.1"),
    ],
)
def test_a_number_nobody_can_mean_is_refused(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evidence", "extract", "--reports=r.csv", "--out=out", f"{flag}={value}"])
    assert stop.value.code == 2
    assert f"argument {flag}: '{value}' must be a number, " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["{", "[]", "3"])
def test_fields_that_are_no_object_are_refused(capsys, value):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evidence", "extract", "--reports=r.csv", "--out=o", f"--extra-body={value}"])
    assert stop.value.code == 2
    assert f"'{value}' is no JSON object, such as" in capsys.readouterr().err


def test_two_extractions_do_not_write_to_one_folder(tmp_path):
    def nested(requests, check):
        with pytest.raises(UserError, match="Another process"):
            extract.run(REPORTS, RULES, tmp_path)
        return (Reply(r.key, extract.write_rules(r.text)) for r in requests)

    extract.run(REPORTS, Backend("rules", nested), tmp_path)


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    plan = extract.plan(REPORTS, Backend("m", None), out)
    assert not out.exists()
    assert plan[:5] == (8, 6, 1, 0, 6)
    texts = {r.text for r in REPORTS if r.text}
    characters = sum(len(schema.prompt(text)) for text in texts)
    assert plan.tokens.prompt_tokens == int(characters / 4)
    assert plan.tokens.cost(2.0, 10.0) == pytest.approx(
        2e-6 * plan.tokens.prompt_tokens + 1e-5 * plan.tokens.answer_tokens
    )


def test_the_command_line(tmp_path, capsys):
    reports = tmp_path / "r.jsonl"
    lines = [json.dumps({"id": r.id, "text": r.findings}) for r in REPORTS]
    reports.write_text("\n".join(lines))
    out = tmp_path / "out"
    command = ["evidence", "extract", "--reports", str(reports), "--out", str(out)]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "Nothing was sent and nothing written." in capsys.readouterr().out
    assert not out.exists()
    assert cli.main(command) == 0
    assert "8 reports: 1 empty, 1 nothing recognised, 6 ok." in capsys.readouterr().out
    assert len(rows(out)) == 8
    asked = ["--backend", "endpoint", "--model", "m", "--extra-body", '{"top_k": 1}']
    with serve(lambda n, prompt: '{"evidence": []}') as server:
        asked += ["--url", server.url, "--max-tokens", "9", "--out", f"{tmp_path}/asked"]
        assert cli.main([*command, *asked]) == 0
    assert (server.body["top_k"], server.body["max_tokens"]) == (1, 9)
    capsys.readouterr()
    remote = ["--backend", "endpoint", "--model", "m", "--url", "https://vendor.com/v1"]
    assert cli.main([*command, *remote]) == 2
    assert "patients' data" in capsys.readouterr().err
    assert cli.main([*command, "--backend", "rulse"]) == 2
    assert "Did you mean rules?" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("id,text\n1,FINDINGS: Clear.\n")
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        code = cli.run(verb.main, ["extract", f"--reports={tmp_path / 'r.csv'}", f"--out={out}"])
        assert code == 2
        assert f"{tmp_path / 'out'} is a file; name a folder." in capsys.readouterr().err
