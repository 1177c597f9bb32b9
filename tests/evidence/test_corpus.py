"""The risk corpus: every paragraph asked for once, traceable, resumable, and vetted before use."""

import csv
import fcntl
import json
import re
import shutil

import pytest
from server import completion, hang, hang_up, send, serve, status

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data import knowledge
from medvlp_jax.evidence import answers, backends, corpus, retrieval, review, risk, template
from medvlp_jax.evidence.endpoint import endpoint
from medvlp_jax.evidence.protocol import Backend, Reply

WORDS = " ".join(["word"] * 20)
PASSAGES = [
    retrieval.Passage("PM1", "Fever and gout", "Fever is common in gout and in flu."),
    retrieval.Passage("PM2", "", "High urate comes before gout."),
    retrieval.Passage("PM3#2", "", "Flu begins with fever."),
    retrieval.Passage("PM4", "", "Of the urates in flu nothing is known."),
]


def table(tmp_path, **factors):
    factors = factors or {"fever": {"name": "Fever"}, "urate": {"name": "Urate"}}
    path = tmp_path / "risk.json"
    described = {"version": "toy-v1", "field": "medicine", "diseases": ["flu", "gout"]}
    path.write_text(json.dumps({**described, "factors": factors}))
    return risk.read(path)


def tasks_of(tmp_path, writer="endpoint:m"):
    search = retrieval.by_words(PASSAGES)
    return corpus.from_articles(table(tmp_path), PASSAGES, search, writer=writer)


def asked_for(prompt):
    """Return the last JSON form of a prompt: what the model is told to fill in."""
    return json.loads(re.findall(r"^\{.*\}$", prompt, re.M)[-1])


def good(prompt):
    form = asked_for(prompt)
    return json.dumps({**form, "text": f"{form['factor']} {form['disease']} {WORDS}"})


def local(answer, name="endpoint:m"):
    """Return a backend that answers in this process and counts what it was asked."""
    asked = []

    def complete(requests, check):
        for request in requests:
            asked.append(request.prompt)
            yield Reply(request.key, answer(request.prompt))

    return Backend(name, complete), asked


def standing(out):
    return knowledge.read(out / knowledge.FILE)


def test_literature_comes_before_the_instruction_and_the_form_names_the_pair(tmp_path):
    tasks, silent = tasks_of(tmp_path)
    assert not silent
    assert [(t.factor, t.disease, t.kind) for t in tasks[:3]] == [
        ("fever", "ALL", "summary"),
        ("fever", "flu", "detail"),
        ("fever", "gout", "detail"),
    ]
    for task in tasks:
        prompt = task.request.prompt
        places = [prompt.index(f"[{name}]") for name in task.ids]
        assert places == sorted(places)
        assert places[-1] < prompt.index("literature I provided above")
        form = asked_for(prompt)
        assert (form["factor"], form["disease"]) == (task.factor, task.disease)
    assert tasks[1].ids[0] == "PM3#2"
    assert "flu, gout" in tasks[0].request.prompt


def test_a_pair_no_passage_speaks_of_is_not_asked_about_and_is_listed(tmp_path):
    risks = table(tmp_path, zebra={"name": "Stripes"}, fever={"name": "Fever"})
    risks = risks._replace(diseases=("flu", "kuru"))
    for search in (
        retrieval.by_words(PASSAGES),
        lambda query, count: [*range(len(PASSAGES))][:count],  # by meaning every passage has a rank
    ):
        tasks, silent = corpus.from_articles(risks, PASSAGES, search, writer="endpoint:m", count=1)
        # A passage on flu alone, or on fever alone, speaks of no pair.
        assert silent == ["zebra/ALL", "zebra/flu", "zebra/kuru", "fever/kuru"]
        assert [(t.factor, t.disease) for t in tasks] == [("fever", "ALL"), ("fever", "flu")]
        assert all("ever" in t.request.prompt and "flu" in t.request.prompt for t in tasks)
    backend, asked = local(good)
    summary = corpus.run(tasks, backend, tmp_path / "out", passages=PASSAGES, silent=silent)
    assert summary["without_passages"] == sorted(silent)
    assert len(asked) == 2


def test_passages_that_name_one_of_a_pair_alone_are_not_among_its_literature(tmp_path):
    more = [retrieval.Passage(f"N{i}", "", "Flu, flu and flu again.") for i in range(9)] + PASSAGES
    search = retrieval.by_words(more)
    tasks, _ = corpus.from_articles(table(tmp_path), more, search, writer="endpoint:m")
    for task in tasks:
        assert not any(name.startswith("N") for name in task.ids)
        assert task.ids


def test_one_abstract_is_asked_about_what_it_names_and_nothing_else():
    text = (
        "Smoking raised the risk of basal cell carcinoma of the skin in farmers. An elevated risk "
        "of non-melanoma cancer of other types appeared after changes. Access to care was limited."
    )
    risks = risk.read("pad_ufes_20")
    pairs = len(risks.factors) * (1 + len(risks.diseases))
    one = [retrieval.Passage("PM1", "", text)]
    tasks, silent = corpus.from_articles(risks, one, retrieval.by_words(one), writer="endpoint:m")
    asked = [(t.factor, t.disease) for t in tasks]
    assert asked == [("smoke", "ALL"), ("smoke", "basal cell carcinoma")]
    assert len(silent) == pairs - 2


def test_other_names_of_a_table_count_and_passages_with_nothing_else_come_last(tmp_path):
    table(tmp_path)
    described = json.loads((tmp_path / "risk.json").read_text())
    described["aliases"] = {"Fever": ["high temperature"], "flu": ["influenza", "grippe"]}
    (tmp_path / "risk.json").write_text(json.dumps(described))
    texts = ["Temperatures were high in the grippe.", "Flu. Temperature. High."]
    texts += [p.text for p in PASSAGES]
    found = [retrieval.Passage(str(i), "", text) for i, text in enumerate(texts)]
    tasks, _ = corpus.from_articles(
        risk.read(tmp_path / "risk.json"), found, retrieval.by_words(found), writer="endpoint:m"
    )
    ids = {(t.factor, t.disease): t.ids for t in tasks}
    assert ids["fever", "flu"] == ("4", "2", "0")
    assert ids["fever", "gout"] == ("2",)
    assert set(ids["fever", "ALL"]) == {"0", "2", "4"}


@pytest.mark.parametrize(
    ("factor", "disease", "text"),
    [
        ("pesticide", "actinic keratosis", "Pesticides and actinic keratoses."),
        ("smoke", "squamous cell carcinoma", "Tobacco use in patients with cSCC."),
        ("fitspatrick", "melanocytic nevus", "Nevi in Fitzpatrick phototypes I to III."),
        ("elevation", "seborrheic keratosis", "Seborrhoeic keratoses are raised lesions."),
    ],
)
def test_shipped_names_are_found_as_the_literature_spells_them(factor, disease, text):
    risks = risk.read("pad_ufes_20").narrowed([factor], [disease])
    one = [retrieval.Passage("PM1", "", text)]
    tasks, silent = corpus.from_articles(risks, one, retrieval.by_words(one), writer="endpoint:m")
    assert not silent
    assert [t.disease for t in tasks] == ["ALL", disease]


def test_lines_that_only_python_breaks_stay_whole(tmp_path):
    odd = retrieval.Passage("PM\u20285", "Fever\u2028and\x85flu", "Fever in flu and gout.")
    tasks, _ = corpus.from_articles(
        table(tmp_path), [odd], retrieval.by_words([odd]), writer="endpoint:m"
    )
    backend, asked = local(good)
    out = tmp_path / "out"
    for _ in range(2):
        assert corpus.run(tasks, backend, out, passages=[odd])["texts"] == 3
    assert len(asked) == 3
    (kept,) = map(json.loads, (out / "passages.jsonl").read_bytes().splitlines())
    assert kept == {"id": odd.id, "title": "Fever and flu", "text": odd.text}
    kept["title"] = odd.title  # as it was written before
    (out / "passages.jsonl").write_text(json.dumps(kept, ensure_ascii=False) + "\n")
    corpus.run(tasks, backend, out)


def test_every_record_traces_to_passages_that_lie_beside_it(tmp_path):
    tasks, _ = tasks_of(tmp_path)
    backend, asked = local(good)
    out = tmp_path / "out"
    summary = corpus.run(tasks, backend, out, passages=PASSAGES)
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["texts"], summary["vetted"], summary["failed"]) == (6, 0, {})
    lines = (out / "passages.jsonl").read_text().splitlines()
    kept = {row["id"]: row["text"] for row in map(json.loads, lines)}
    for name, record in standing(out).items():
        assert name == record.id
        assert record.ids
        for passage in record.ids:
            assert any(kept[passage] in prompt for prompt in asked)
        assert set(record._fields) == {
            "factor", "disease", "kind", "source", "ids", "text", "vetted",
        }  # fmt: skip


def test_a_second_start_asks_nothing_and_new_articles_ask_only_what_they_change(tmp_path):
    tasks, _ = tasks_of(tmp_path)
    backend, asked = local(good)
    out = tmp_path / "out"
    corpus.run(tasks, backend, out, passages=PASSAGES)
    files = {f.name: f.read_bytes() for f in out.iterdir()}
    corpus.run(tasks, backend, out, passages=PASSAGES)
    assert len(asked) == 6
    assert {f.name: f.read_bytes() for f in out.iterdir()} == files
    more = [*PASSAGES, retrieval.Passage("PM9", "", "Urate and flu: nothing is known.")]
    changed, _ = corpus.from_articles(
        table(tmp_path), more, retrieval.by_words(more), writer="endpoint:m", count=1
    )
    corpus.run(changed, backend, out, passages=more)
    assert len(asked) == 6 + len({t.request.key for t in changed} - {t.request.key for t in tasks})
    assert len(standing(out)) == 6


def test_two_writers_stand_side_by_side(tmp_path):
    out = tmp_path / "out"
    for name in ("endpoint:a", "qwen3:/b"):
        tasks, _ = tasks_of(tmp_path, writer=name)
        summary = corpus.run(tasks, local(good, name)[0], out, passages=PASSAGES)
    assert summary["sources"] == {"endpoint:a": 6, "qwen3:/b": 6}
    files = {f.name: f.read_bytes() for f in out.iterdir() if "answers" not in f.name}
    one, _ = tasks_of(tmp_path, writer="endpoint:a")
    urate = [task for task in one if task.factor == "urate"]
    assert corpus.run(urate, local(good, "endpoint:a")[0], out)["sources"] == summary["sources"]
    assert files == {f.name: f.read_bytes() for f in out.iterdir() if "answers" not in f.name}
    # A text that is to be written anew and fails keeps the old one.
    more = [*PASSAGES, retrieval.Passage("PM9", "", "Urate and gout: more is known.")]
    search = retrieval.by_words(more)
    again, _ = corpus.from_articles(table(tmp_path), more, search, writer="endpoint:a")
    summary = corpus.run(again, local(lambda p: "no", "endpoint:a")[0], out, passages=more)
    assert summary["failed"]
    assert (out / "corpus.jsonl").read_bytes() == files["corpus.jsonl"]


RAISES = [retrieval.Passage("1", "On flu", "Fever raises the risk of flu.")]
LOWERS = [retrieval.Passage("1", "On flu", "Fever lowers the risk of flu.")]


def tasks_from(tmp_path, passages, writer):
    search = retrieval.by_words(passages)
    return corpus.from_articles(table(tmp_path), passages, search, writer=writer)


@pytest.mark.parametrize("writer", ["endpoint:a", "endpoint:b"])
def test_an_id_that_comes_back_with_other_words_is_refused_before_anything_is_asked(
    tmp_path, writer
):
    out = tmp_path / "out"
    tasks, silent = tasks_from(tmp_path, RAISES, "endpoint:a")
    corpus.run(tasks, local(good, "endpoint:a")[0], out, passages=RAISES, silent=silent)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    backend, asked = local(good, writer)
    tasks, silent = tasks_from(tmp_path, LOWERS, writer)
    with pytest.raises(
        UserError, match=r"passages\.jsonl .* passage '1' in other words .* id of its"
    ):
        corpus.run(tasks, backend, out, passages=LOWERS, silent=silent)
    assert not asked
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    # An article nothing is asked about now is none to be written over either.
    with pytest.raises(UserError, match="passage '1' in other words"):
        corpus.run([], backend, out, passages=LOWERS)
    # Lines and spaces are no words.
    same = [RAISES[0]._replace(title="On  flu", text="Fever raises\nthe risk of flu.")]
    corpus.run([], backend, out, passages=same)
    assert (out / "passages.jsonl").read_bytes() == before["passages.jsonl"]


def test_a_corrected_article_under_an_id_of_its_own_leaves_each_text_its_source(tmp_path):
    out = tmp_path / "out"
    tasks, silent = tasks_from(tmp_path, RAISES, "endpoint:a")
    first = corpus.run(tasks, local(good, "endpoint:a")[0], out, passages=RAISES, silent=silent)
    assert first["from_earlier_starts"] == []
    corrected = [LOWERS[0]._replace(id="1-corrected")]
    tasks, silent = tasks_from(tmp_path, corrected, "endpoint:a")
    anew = lambda prompt: good(prompt) if '"ALL"' in prompt else "I would rather not."
    backend = local(anew, "endpoint:a")[0]
    summary = corpus.run(tasks, backend, out, passages=corrected, silent=silent)
    lines = (out / "passages.jsonl").read_text().splitlines()
    kept = {row["id"]: row["text"] for row in map(json.loads, lines)}
    assert kept == {"1": RAISES[0].text, "1-corrected": LOWERS[0].text}
    cited = {(r.factor, r.disease): r.ids for r in standing(out).values()}
    assert cited == {("fever", "ALL"): ("1-corrected",), ("fever", "flu"): ("1",)}
    assert summary["from_earlier_starts"] == ["fever/flu/endpoint:a"]
    # So are texts of pairs that no passage speaks of any more.
    off = [retrieval.Passage("2", "", "Urate and gout.")]
    tasks, silent = tasks_from(tmp_path, off, "endpoint:a")
    summary = corpus.run(tasks, local(good, "endpoint:a")[0], out, passages=off, silent=silent)
    assert summary["from_earlier_starts"] == ["fever/ALL/endpoint:a", "fever/flu/endpoint:a"]


def test_an_id_keeps_its_words_when_its_texts_are_replaced_for_verdicts_on_them_stay(tmp_path):
    out = tmp_path / "out"
    other = [retrieval.Passage("2", "", "Fever and flu again.")]
    for passages in (RAISES, other):
        tasks, _ = tasks_from(tmp_path, passages, "endpoint:a")
        corpus.run(tasks, local(good, "endpoint:a")[0], out, passages=passages)
    assert {record.ids for record in standing(out).values()} == {("2",)}
    tasks, _ = tasks_from(tmp_path, LOWERS, "endpoint:a")
    with pytest.raises(UserError, match="passage '1' in other words"):
        corpus.run(tasks, local(good, "endpoint:a")[0], out, passages=LOWERS)


def test_an_id_another_process_wrote_with_other_words_meanwhile_is_refused(tmp_path):
    out = tmp_path / "out"
    tasks, _ = tasks_from(tmp_path, LOWERS, "endpoint:b")
    others, _ = tasks_from(tmp_path, RAISES, "endpoint:a")

    def meanwhile(prompt):
        corpus.run(others, local(good, "endpoint:a")[0], out, passages=RAISES)
        return good(prompt)

    with pytest.raises(UserError, match=r"passage '1' in other words .* no answer is lost"):
        corpus.run(tasks, local(meanwhile, "endpoint:b")[0], out, passages=LOWERS)
    for name in (review.WRITTEN, knowledge.FILE):
        assert {r.source for r in knowledge.read(out / name).values()} == {"endpoint:a"}
    assert "raises" in (out / "passages.jsonl").read_text()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda p: "I am sorry.", "without factor, disease and text"),
        (lambda p: '{"text": ' * 100_000, "nested too deep"),
        (lambda p: json.dumps({**asked_for(p), "text": "Too short."}), "a text of 2 words"),
        (lambda p: good(p).replace('"flu"', '"scurvy"'), "names the disease 'scurvy', asked"),
        (lambda p: good(p).replace('"fever"', '"cough"'), "names the factor 'cough', asked was"),
    ],
)
def test_an_answer_about_something_else_is_recorded_and_asked_again(tmp_path, answer, error):
    tasks, _ = tasks_of(tmp_path)
    only = [task for task in tasks if (task.factor, task.disease) == ("fever", "flu")]
    summary = corpus.run(only, local(answer)[0], tmp_path / "out", passages=PASSAGES)
    assert re.search(error, summary["failed"]["fever/flu/endpoint:m"])
    assert not standing(tmp_path / "out")
    backend, asked = local(good)
    assert corpus.run(only, backend, tmp_path / "out", passages=PASSAGES)["failed"] == {}
    assert len(asked) == 1


def test_prose_and_fences_around_an_answer_are_read_over():
    said = f'Here it is:\n```json\n{{"factor": "a", "disease": "b", "text": "{WORDS}\nend"}}\n```'
    assert corpus.read_answer(said)["text"] == f"{WORDS} end"


def test_what_a_model_thinks_first_is_not_its_answer():
    form = '{"factor": "a", "disease": "b", "text": "..."}'
    said = f'{{"factor": "a", "disease": "b", "text": "{WORDS}"}}'
    for answer in (f"<think>As {form}</think>{said}", f"As in {form}: {said}"):
        assert corpus.read_answer(answer)["text"] == WORDS
    with pytest.raises(corpus.Malformed, match="without factor"):
        corpus.read_answer(f"<think>Perhaps {said}")


def test_an_answer_is_kept_as_it_came_and_read_by_todays_code(tmp_path, monkeypatch):
    tasks, _ = tasks_of(tmp_path)
    backend, asked = local(lambda p: f"Here you are: {good(p)}")
    out = tmp_path / "out"
    corpus.run(tasks, backend, out, passages=PASSAGES)
    today = corpus.read_answer
    better = lambda answer: {**today(answer), "text": today(answer)["text"].upper()}
    monkeypatch.setattr(corpus, "read_answer", better)
    corpus.run(tasks, backend, out, passages=PASSAGES)
    assert all(record.text.isupper() for record in standing(out).values())
    assert len(asked) == 6


def trouble(number, prompt):
    """Time out, answer in prose, refuse, hang up, be busy: each once, then behave."""
    return {
        1: hang(1.0),
        2: "I would rather talk about something else.",
        3: lambda h: send(h, completion("no", refusal="I cannot")),
        4: hang_up,
        5: status(429),
        6: lambda h: send(h, b"<html>"),
    }.get(number, good(prompt))


def test_an_endpoint_with_every_trouble_is_retried_recorded_and_resumed(tmp_path):
    tasks, _ = tasks_of(tmp_path)
    out, pauses = tmp_path / "out", []
    settings = {"in_flight": 1, "timeout": 0.3, "sleep": pauses.append}
    with serve(trouble) as server:
        summary = corpus.run(tasks, endpoint(server.url, "m", **settings), out, passages=PASSAGES)
        # The first is asked three times: time-out, prose, refusal. The second four times.
        assert list(summary["failed"].values()) == ["refused: by the model or its filter"]
        assert summary["texts"] == 5
        assert len(server.prompts) == 3 + 4 + 4
    assert len(pauses) == 2 + 3
    with serve(lambda number, prompt: good(prompt)) as server:
        summary = corpus.run(tasks, endpoint(server.url, "m", **settings), out, passages=PASSAGES)
        assert len(server.prompts) == 1
    assert (summary["texts"], summary["failed"]) == (6, {})


def test_an_endpoint_that_dies_half_way_costs_no_paid_answer_twice(tmp_path):
    tasks, _ = tasks_of(tmp_path)
    out = tmp_path / "out"
    settings = {"in_flight": 1, "attempts": 2, "patience": 2, "sleep": lambda seconds: None}
    dies = serve(lambda n, prompt: good(prompt) if n <= 4 else hang_up)
    with dies as server, pytest.raises(UserError, match="start the same command again"):
        corpus.run(tasks, endpoint(server.url, "m", **settings), out, passages=PASSAGES)
    assert not (out / knowledge.FILE).exists()
    with serve(lambda n, prompt: good(prompt)) as server:
        corpus.run(tasks, endpoint(server.url, "m", **settings), out, passages=PASSAGES)
        assert len(server.prompts) == 2
    backend, _ = local(good)
    corpus.run(tasks, backend, tmp_path / "whole", passages=PASSAGES)
    assert (out / "corpus.jsonl").read_bytes() == (tmp_path / "whole/corpus.jsonl").read_bytes()


def test_the_template_says_what_the_table_says_and_seeds_paraphrase(tmp_path):
    table = risk.read("cxr_phantom")
    tasks = corpus.from_table(table, variants=3)
    backend = backends.writer("template", template.writer(table))
    corpus.run(tasks, backend, tmp_path / "a")
    corpus.run(tasks, backend, tmp_path / "b")
    text = (tmp_path / "a" / "corpus.jsonl").read_text()
    assert text == (tmp_path / "b" / "corpus.jsonl").read_text()
    records = standing(tmp_path / "a").values()
    assert len(records) == 3 * len(table.factors) * (1 + len(table.diseases))
    assert len({r.text for r in records}) > 0.98 * len(records)
    assert {r.ids for r in records} == {("risk:cxr_phantom-v1",)}
    for record in records:
        if record.factor == "fever" and record.kind == "detail":
            effect = table.factors["fever"].effect("yes", record.disease)
            assert ("more likely" in record.text) == (effect > 0), record.text
            assert ("5.0" in record.text) == (record.disease == "consolidation")


def test_records_the_template_shows_make_their_disease_one_of_the_likeliest(tmp_path):
    table = risk.read("cxr_phantom")
    write, shown = template.writer(table), 0
    for task in corpus.from_table(table, variants=2):
        if task.kind == "detail":
            text = json.loads(write(task.request.text))["text"]
            found = re.search(r"(Age: [\d.]+ years\. Sex: .*)", text)
            if found:
                shown += 1
                odds = {d: 0.0 for d in table.diseases}
                for factor in table.factors.values():
                    said = re.search(rf"{factor.name}: (\S+?)( |\.( |$))", found[1])[1]
                    value = said if factor.levels else float(said)
                    odds = {d: v + factor.effect(value, d) for d, v in odds.items()}
                assert odds[task.disease] >= max(odds.values()) - template.NEAR - 0.1, text
    assert shown > 60


def test_a_template_without_numbers_names_the_factor(tmp_path):
    with pytest.raises(UserError, match="toy-v1 has none for 'fever'"):
        template.writer(table(tmp_path))


def reviewed(out, **verdicts):
    """Fill in review.csv: {row: (verdict, edited)}; other rows are left out."""
    with (out / review.REVIEW).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = []
    for number, (verdict, edited) in verdicts.items():
        row = rows[int(number[1:])]
        kept.append({**row, "verdict": verdict, "edited": edited, "reviewer": "Dr A"})
    path = out / "filled.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, review.COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    return path, rows


@pytest.fixture
def written(tmp_path):
    tasks, _ = tasks_of(tmp_path)
    out = tmp_path / "out"
    corpus.run(tasks, local(good)[0], out, passages=PASSAGES)
    return out


def test_verdicts_approve_edit_and_reject_and_outlive_another_start(written, tmp_path):
    path, rows = reviewed(written, r0=("approve", ""), r1=("Edit", "Better."), r2=("reject", ""))
    found = review.take(written, path)
    assert len(found) == 5
    assert found[rows[0]["id"]].vetted
    assert found[rows[1]["id"]].text == "Better."
    assert rows[2]["id"] not in found
    assert sum(record.vetted for record in found.values()) == 2
    with (written / review.REVIEW).open(encoding="utf-8-sig", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in rows[3:]]
    tasks, _ = tasks_of(tmp_path)
    backend, asked = local(good)
    corpus.run(tasks, backend, written, passages=PASSAGES)
    assert standing(written) == found
    assert not asked


@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_a_spreadsheet_computes_nothing_of_what_a_model_wrote(tmp_path, sign):
    tasks, _ = tasks_of(tmp_path)
    out, text = tmp_path / "out", f'{sign}HYPERLINK("http://a.b") {WORDS}'
    answer = lambda p: json.dumps({**asked_for(p), "text": text})
    tasks = [task._replace(ids=(f"{sign}1", "PM1")) for task in tasks]
    corpus.run(tasks, local(answer)[0], out, passages=PASSAGES)
    path, rows = reviewed(out, r0=("approve", ""))
    assert {row["text"] for row in rows} == {f"'{text}"}
    assert {row["passages"] for row in rows} == {f"'{sign}1 PM1"}
    assert {record.text for record in review.take(out, path).values()} == {text}


def test_a_text_written_anew_has_to_be_reviewed_anew(written, tmp_path):
    path, rows = reviewed(written, r0=("approve", ""))
    review.take(written, path)
    tasks, _ = tasks_of(tmp_path)
    for file in written.glob("answers-*"):
        file.unlink()
    corpus.run(tasks, local(lambda p: good(p).replace("word", "term"))[0], written)
    assert not any(record.vetted for record in standing(written).values())
    with pytest.raises(UserError, match=f"row 2: no text has the id '{rows[0]['id']}'"):
        review.take(written, path)


@pytest.mark.parametrize(
    ("verdict", "edited", "reviewer", "message"),
    [
        ("", "", "Dr A", "row 3: verdict is empty; accepted are approve, edit, reject"),
        ("ok", "", "Dr A", "row 3: verdict is 'ok'; accepted are approve"),
        ("edit", "", "Dr A", "row 3: verdict is 'edit' and 'edited' is empty"),
        ("approve", "Other.", "Dr A", "row 3: verdict is 'approve' and 'edited' is filled"),
        ("approve", "", "", "row 3: reviewer is empty"),
    ],
)
def test_a_review_is_refused_by_row_and_nothing_changes(
    written, verdict, edited, reviewer, message
):
    path, _ = reviewed(written, r0=("approve", ""), r1=(verdict, edited))
    path.write_text(
        path.read_text().replace("Dr A", reviewer) if not reviewer else path.read_text()
    )
    if not reviewer:
        message = "row 2: reviewer is empty"
    before = (written / knowledge.FILE).read_bytes()
    with pytest.raises(UserError, match=message):
        review.take(written, path)
    assert (written / knowledge.FILE).read_bytes() == before
    assert not (written / review.KEPT).exists()


def test_an_unknown_or_repeated_id_is_refused_by_row(written):
    path, rows = reviewed(written, r0=("approve", ""), r1=("approve", ""))
    text = path.read_text()
    path.write_text(text.replace(rows[1]["id"], "f" * 16))
    with pytest.raises(UserError, match=r"row 3: no text has the id 'ffffffffffffffff'"):
        review.take(written, path)
    path.write_text(text.replace(rows[1]["id"], rows[0]["id"]))
    with pytest.raises(UserError, match=r"row 3: id .* is also in row 2"):
        review.take(written, path)


def test_a_review_in_progress_is_not_written_over(written, tmp_path):
    path, _ = reviewed(written, r0=("approve", ""))
    other = path.with_name("other.csv")
    shutil.copy(path, other)
    path.rename(written / review.REVIEW)
    with pytest.raises(UserError, match="a verdict stands here that was not read yet"):
        review.take(written, other)  # which would be lost
    tasks, _ = tasks_of(tmp_path)
    with pytest.raises(UserError, match="row 2: a verdict stands here"):
        corpus.run(tasks, local(good)[0], written)
    review.take(written, written / review.REVIEW)
    corpus.run(tasks, local(good)[0], written)


def test_verdicts_filled_in_while_models_write_are_not_written_over(written, tmp_path):
    more = [*PASSAGES, retrieval.Passage("PM9", "", "Urate and gout: more is known.")]
    tasks, _ = corpus.from_articles(
        table(tmp_path), more, retrieval.by_words(more), writer="endpoint:m"
    )

    def meanwhile(prompt):
        if (written / review.REVIEW).exists():
            path, _ = reviewed(written, r0=("approve", ""))
            path.rename(written / review.REVIEW)
        return good(prompt)

    files = (review.WRITTEN, knowledge.FILE, "passages.jsonl", "summary.json")
    before = {name: (written / name).read_bytes() for name in files}
    with pytest.raises(UserError, match=r"row 2: a verdict stands here .* no answer is lost"):
        corpus.run(tasks, local(meanwhile)[0], written, passages=more)
    assert before == {name: (written / name).read_bytes() for name in files}
    standing_now = review.take(written, written / review.REVIEW)
    assert sum(record.vetted for record in standing_now.values()) == 1
    backend, asked = local(good)
    corpus.run(tasks, backend, written, passages=more)
    assert not asked


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_folder_is_locked_from_reading_to_writing_back(written, tmp_path, monkeypatch, is_ours):
    path, _ = reviewed(written, r0=("approve", ""))
    locked = []
    monkeypatch.setattr(answers.os, "access", lambda *_: is_ours)

    def apply(out):
        with (out / answers.LOCK).open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(out)
        return {}

    monkeypatch.setattr(review, "apply", apply)
    review.take(written, path)
    corpus.run(tasks_of(tmp_path)[0], local(good)[0], written)
    assert locked == [written, written]
    with pytest.raises(UserError, match="nowhere is no folder"):
        review.take(tmp_path / "nowhere", path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"id": "a"}',
        '{"verdict": "edit", "edited": "x", "reviewer": "y"}',
        '{"id": "a", "verdict": "maybe", "edited": "", "reviewer": "y"}',
    ],
)
def test_a_damaged_file_of_verdicts_is_refused_by_line_and_nothing_changes(written, line):
    path, _ = reviewed(written, r0=("approve", ""))
    review.take(written, path)
    kept = written / review.KEPT
    kept.write_text(kept.read_text() + line + "\n")
    path, _ = reviewed(written, r1=("approve", ""))
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    with pytest.raises(UserError, match=r"verdicts\.jsonl line 2 is damaged; a verdict with id"):
        review.take(written, path)
    assert before == {file.name: file.read_bytes() for file in written.iterdir()}


def test_training_refuses_what_no_physician_approved(written):
    with pytest.raises(UserError, match=r"6 of 6 texts .* were not approved by a physician"):
        knowledge.open_texts(written, "train")
    assert len(knowledge.open_texts(written, "train", allow_unvetted=True)) == 6
    path, _ = reviewed(written, **{f"r{i}": ("approve", "") for i in range(6)})
    review.take(written, path)
    texts = knowledge.open_texts(written, "train")
    assert texts[0]["findings"] == texts.texts()[0][0]


def test_held_out_sources_are_paraphrases_that_are_not_trained_on(tmp_path):
    table = risk.read("cxr_phantom").narrowed(["fever", "cough"], ["effusion", "edema"])
    backend = backends.writer("template", template.writer(table))
    out = tmp_path / "out"
    corpus.run(corpus.from_table(table, variants=3), backend, out)
    asked = {"held_out": ("template:2",), "allow_unvetted": True}
    train, test = (knowledge.open_texts(out, split, **asked) for split in ("train", "test"))
    assert {r.source for _, r in train.records} == {"template:0", "template:1"}
    assert {r.source for _, r in test.records} == {"template:2"}
    pairs = lambda texts: {(r.factor, r.disease) for _, r in texts.records}
    assert pairs(test) <= pairs(train)
    assert not {r.text for _, r in train.records} & {r.text for _, r in test.records}
    with pytest.raises(UserError, match=r"no 'template:9'. Did you mean template:"):
        knowledge.open_texts(out, "train", held_out=("template:9",), allow_unvetted=True)
    assert len(knowledge.open_texts(out, "test", allow_unvetted=True)) == 0
    every = tuple(f"template:{seed}" for seed in range(3))
    with pytest.raises(UserError, match="no texts for split 'train'"):
        knowledge.open_texts(out, "train", held_out=every, allow_unvetted=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 5000, "line 1 is not JSON"),
        ('{"id": "a"}', "line 1 must hold exactly id, factor"),
        (json.dumps({"id": "a", "factor": "f", "disease": "d", "kind": "x", "source": "s",
                     "ids": [], "text": "t", "vetted": True}), "kind is 'x'; accepted are summary"),
    ],
)  # fmt: skip
def test_a_corpus_file_with_a_defect_is_refused_by_line(tmp_path, line, message):
    (tmp_path / "corpus.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        knowledge.open_texts(tmp_path, "train")
    with pytest.raises(UserError, match="is missing"):
        knowledge.open_texts(tmp_path / "nowhere", "train")


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEDVLP_API_KEY", "secret-7")
    articles, out = tmp_path / "articles.jsonl", tmp_path / "out"
    rows = [{"pmid": p.id, "title": p.title, "abstract": p.text} for p in PASSAGES]
    articles.write_text("\n".join(map(json.dumps, rows)))
    table(tmp_path)
    command = ["evidence", "corpus", "--risk", f"{tmp_path}/risk.json", "--out", str(out)]
    asked = [*command, "--backend", "endpoint", "--model", "m"]
    for arguments, message in (
        ([*command], "template writes from log odds"),
        ([*asked], "name a .jsonl or folder"),
        ([*asked, "--articles", str(articles), "--url", "https://vendor.com/v1"], "--allow-remote"),
        ([*command, "--factors", "fevr"], "no factor 'fevr'. Did you mean fever"),
        ([*command, "--diseases", "gaut"], "no disease 'gaut'. Did you mean gout"),
        ([*command, "--backend", "endpiont"], "Did you mean endpoint"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    with serve(lambda number, prompt: good(prompt)) as server:
        asked += ["--articles", str(articles), "--url", server.url]
        assert cli.main([*asked, "--dry-run", "--price-in", "1"]) == 0
        said = capsys.readouterr().out
        assert "6 paragraphs, 0 written before, 6 to do with endpoint:m; 0 pairs" in said
        assert "Nothing was sent and nothing written." in said
        assert not server.prompts
        assert not out.exists()
        assert cli.main(asked) == 0
        assert len(server.prompts) == 6
        assert server.headers["Authorization"] == "Bearer secret-7"
    assert "6 texts (6 of endpoint:m), 0 of them vetted; 0 failed" in capsys.readouterr().out
    assert not any("secret-7" in f.read_text() for f in out.iterdir())
    path, _ = reviewed(out, r0=("approve", ""))
    assert cli.main(["evidence", "review", "--corpus", str(out), "--review", str(path)]) == 0
    assert "6 texts stand, 1 of them vetted" in capsys.readouterr().out
