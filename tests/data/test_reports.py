"""Report sections and the layouts reports are stored in."""

import io
import os
import tarfile

import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import files, sections
from medvlp_jax.data.headings import split_sections
from medvlp_jax.data.reports import Report, read_reports

WHOLE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  History of pneumonia.  // effusion?

 COMPARISON:  None.

 FINDINGS:

 The lungs are clear.  There is no effusion:
 none at all.

 IMPRESSION:  No acute process.

 RECOMMENDATION(S):  CT to exclude a mass.
"""


def test_only_what_the_image_shows_is_kept():
    assert split_sections(WHOLE) == (
        "The lungs are clear. There is no effusion: none at all.",
        "No acute process.",
    )


def test_text_without_headings_is_findings():
    assert split_sections("Lungs clear.\nHeart normal.") == ("Lungs clear. Heart normal.", "")


def test_headings_on_one_line_are_found():
    assert split_sections("HISTORY: cough. FINDINGS: Clear. IMPRESSION: Normal.") == (
        "Clear.",
        "Normal.",
    )


COUGH = "INDICATION: Cough.\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FINDINGS/IMPRESSION: Clear.", ("", "Clear.")),
        ("FINDINGS AND IMPRESSION: Clear.", ("", "Clear.")),
        ("Findings and Impression:\nClear.", ("", "Clear.")),
        ("IMPRESSION(S): Clear.", ("", "Clear.")),
        ("IMPRESSION / PLAN: Clear.", ("", "Clear.")),
        ("FINDINGS OF THE CHEST: Clear.\nIMPRESSION: Fine.", ("Clear.", "Fine.")),
        ("PA AND LATERAL CHEST: Clear.", ("Clear.", "")),
        ("**FINDINGS:** Clear.\n**IMPRESSION**: Fine.", ("Clear.", "Fine.")),
        ("## Findings\nClear.\n\n## Impression\nFine.", ("Clear.", "Fine.")),
        ("FINDINGS\nClear.\nIMPRESSION\nFine.", ("Clear.", "Fine.")),
        ("FINDINGS: Clear.\nRECOMMENDATION(S): CT.", ("Clear.", "")),
        ("FINDINGS: Clear.\n\nRECOMMENDATION\nCT.", ("Clear.", "")),
        ("FINDINGS: Clear.\nCLINICAL IMPRESSION: Pneumonia?", ("Clear.", "")),
    ],
)
def test_headings_are_known_in_every_spelling(text, expected):
    assert split_sections(COUGH + text) == expected


def test_headings_inside_the_first_line_of_a_section_do_not_end_it():
    views = "FINDINGS: Views: PA and lateral. Large right effusion."
    told = views.removeprefix("FINDINGS: ")
    assert split_sections(f"{views}\nIMPRESSION: Effusion.") == (told, "Effusion.")
    assert split_sections(f"{views} IMPRESSION: Effusion.") == (told, "Effusion.")
    text = "FINDINGS: Clear. Comparison: none. No effusion.\nIMPRESSION: Fine."
    assert split_sections(text) == ("Clear. Comparison: none. No effusion.", "Fine.")
    # All on one line, as tables often have it.
    assert split_sections("FINDINGS: Clear. IMPRESSION: Fine. COMPARISON: None.") == (
        "Clear.",
        "Fine.",
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_line_break_is_one(newline):
    text = newline.join(("HISTORY: Cough", "FINDINGS: Clear", "IMPRESSION: Fine"))
    assert split_sections(text) == ("Clear", "Fine")


@pytest.mark.parametrize(
    "signature",
    [
        "\nELECTRONICALLY SIGNED BY: DR JOHN SMITH",
        " Electronically signed by John Smith, 1 May",
        "\nDictated by: John Smith",
        "\nReported by Dr Smith",
    ],
)
def test_a_signature_ends_the_report(signature):
    assert split_sections(f"IMPRESSION: Effusion.{signature}") == ("", "Effusion.")
    assert split_sections(f"Effusion.{signature}") == ("Effusion.", "")


@pytest.mark.parametrize(
    "text",
    [
        "LUNGS: Clear.\nHEART: Normal.\nCHEST WALL: Normal.",
        "COMPARED WITH PRIOR\nEXAMINATION\nTHERE IS NO CHANGE.",
        "Effusion as\nreported by CT.\nNO ACUTE FINDINGS",
    ],
)
def test_what_is_no_heading_stays_in_its_section(text):
    whole = " ".join(text.split())
    assert split_sections(text) == (whole, "")
    assert split_sections(f"{COUGH}FINDINGS:\n{text}\nIMPRESSION: Fine.") == (whole, "Fine.")


@pytest.mark.parametrize("text", ["LUNGS: Clear.\nOTHER FINDINGS: None.", "DATE: 1 May\nClear."])
def test_a_layout_that_is_not_understood_is_read_whole(text):
    assert split_sections(text) == (" ".join(text.split()), "")


def test_a_title_is_no_section():
    text = "REPORT\nName: A. B.\nXR CHEST, TWO VIEWS: 1 May\nFINDINGS: Clear."
    assert split_sections(text) == ("Clear.", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CLINICAL HISTORY: Cough.\n\nLarge left effusion.", ("Large left effusion.", "")),
        ("EXAMINATION: CHEST PA\n \nLarge heart.\n\nEffusion.", ("Large heart. Effusion.", "")),
        (
            "HISTORY:\n\nCough.\n\nCOMPARISON: None.\n\nEffusion.\n\nConclusion: Heart failure.",
            ("Effusion.", "Heart failure."),
        ),
        ("HISTORY: Cough.\n\nPortable.\n\nFINDINGS AND IMPRESSION: Clear.", ("", "Clear.")),
        ("HISTORY: Cough.\n\nIMPRESSION: Fine.\n\nSTUDY: CT.\n\nBye.", ("", "Fine.")),
        ("HISTORY: Cough.\n\nMass.\n\nRECOMMENDATION: CT.\n\nBye.", ("Mass.", "")),
        ("WET READ: None.\n\nHISTORY: Cough.\n\nMass.", ("Mass.", "")),
        ("HISTORY: Cough.\n\nMass.\n\nSigned by: Dr Smith\n\nPage 1", ("Mass.", "")),
    ],
)
def test_a_body_without_a_heading_follows_a_blank_line(text, expected):
    assert split_sections(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FINDINGS: Clear.\n\nADDENDUM: Rib fracture.", ("Clear.", "Rib fracture.")),
        ("ADDENDUM BY DR SMITH: Mass.\nHISTORY: Cough.\n\nClear.", ("Clear.", "Mass.")),
        ("PA AND LATERAL CHEST: Clear.\nADDENDUM: Mass.", ("Clear.", "Mass.")),
    ],
)
def test_an_addendum_is_impression(text, expected):
    assert split_sections(text) == expected


XML = """<eCitation><uId id="CXR7"/><MedlineCitation><Article><Abstract>
<AbstractText Label="INDICATION">pneumonia?</AbstractText>
<AbstractText Label="FINDINGS">Clear &amp; dry.</AbstractText>
<AbstractText Label="IMPRESSION"/></Abstract></Article></MedlineCitation>
<MeSH><major>normal</major><automatic>x</automatic></MeSH></eCitation>"""


def layouts(folder):
    """Write one report in every layout; yield (path, report)."""
    (folder / "xml").mkdir()
    (folder / "xml" / "7.xml").write_text(XML)
    with tarfile.open(folder / "a.tgz", "w:gz") as archive:
        archive.add(folder / "xml" / "7.xml", "b/7.xml")
    xml = Report("CXR7", "Clear & dry.", "", ("normal",))
    yield folder / "xml", xml
    yield folder / "a.tgz", xml
    (folder / "txt" / "p10").mkdir(parents=True)
    (folder / "txt" / "p10" / "s5.txt").write_text(WHOLE)
    yield folder / "txt", Report("p10/s5", *split_sections(WHOLE))
    (folder / "r.jsonl").write_text('{"id": 3, "text": "FINDINGS: Clear."}\n\n')
    yield folder / "r.jsonl", Report("3", "Clear.", "")
    (folder / "r.csv").write_text('id,findings,impression\nx,"Clear,\n dry",\n')
    yield folder / "r.csv", Report("x", "Clear, dry", "")


def test_every_layout_gives_the_report(tmp_path):
    for path, expected in layouts(tmp_path):
        assert list(read_reports(path)) == [expected], path


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("r.jsonl", '{"id": 1, "text": ""}\nnot json\n', "line 2 is not JSON"),
        ("r.jsonl", '{"text": "x"}\n', "line 1 has no 'id', only text"),
        ("r.jsonl", '{"text": "x", "Edema: none": 1}\n', "no 'id', only text and 1 other"),
        ("r.jsonl", '{"Clear": 1}\n', "line 1 has no 'id', only 1 other"),
        ("r.jsonl", "[" * 5000 + "\n", "line 1 is not JSON"),
        ("r.jsonl", '\n{"id": null, "text": "x"}\n', "line 2: 'id' is empty"),
        ("r.jsonl", '{"id": [1], "text": "x"}\n', "line 1: 'id' holds a list; a text or a number"),
        ("r.jsonl", '{"id": "\\ud800", "text": "x"}\n', "line 1: 'id' holds half a character"),
        ("r.jsonl", '{"id": 1, "text": 5}\n', "line 1: 'text' holds a number; a text is needed"),
        ("r.jsonl", '{"id": 1, "text": ["x"]}\n', "line 1: 'text' holds a list; a text is needed"),
        ("r.jsonl", '{"id": 1, "findings": 5}\n', "line 1: 'findings' holds a number"),
        ("r.jsonl", '{"id": 1, "text": "\\udfff"}\n', "line 1: 'text' holds half a character"),
        ("r.jsonl", "[1]\n", "line 1 is no object"),
        ("r.jsonl", "\n", "holds no report"),
        ("r.csv", "id,body\n1,x\n", "row 2 has neither 'text' nor 'findings'"),
        ("r.csv", "id,text\n1,Clear, dry\n", "row 2: 3 cells, and the header has 2"),
        ("r.csv", "id,text\n1\n", "row 2: 1 cells, and the header has 2"),
        ("r.csv", "id,text,text\n1,a,b\n", "more than one column is called text"),
        ("r.csv", "id,text\n,x\n", "row 2: 'id' is empty"),
        ("r.csv", "id,text\n", "holds no report"),
        ("r.csv", "", "row 1: no column id; it has nothing"),
        ("r.csv", "p1,Edema\n", "row 1: no column id; it has 2 others"),
        ("r.csv", "p1,Edema,Edema\n", "row 1: more than one column is called the same; every"),
        ("r.csv", f"id,text\n1,{'x' * (files.LONGEST + 1)}\n", "field larger than field limit"),
        ("r.parquet", "", "accepted are"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(read_reports(tmp_path / name))


@pytest.mark.parametrize(
    "heading",
    ["FINDINGS AND IMPRESSION", "PA AND LATERAL VIEWS OF THE CHEST", "IMPRESSION AND PLAN"],
)
def test_a_study_of_mimic_is_read_as_its_corpus_reads_it(tmp_path, heading):
    text = (
        f"                 FINAL REPORT\n INDICATION:  Cough.\n \n {heading}:  Small\n effusion.\n"
    )
    (tmp_path / "s50414267.txt").write_text(text)
    (report,) = read_reports(tmp_path)
    expected = sections.of_study(text, "s50414267")
    assert report.text == " ".join(f"{expected.findings} {expected.impression}".split())
    assert "effusion" in report.text
    assert "Cough" not in report.text


def test_placeholders_are_no_texts(tmp_path):
    (tmp_path / "r.csv").write_text("id,findings,impression\n1,NaN,-\n2,Nan of,n/a\n")
    assert [report.text for report in read_reports(tmp_path / "r.csv")] == ["", "Nan of"]


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl"])
def test_an_encoding_that_is_not_utf_8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'id,findings\n1,"\xe9dema"\n')
    with pytest.raises(UserError, match="UTF-8"):
        list(read_reports(tmp_path / name))


def test_a_document_that_is_not_utf_8_is_named_and_a_mark_at_its_start_is_none_of_its_text(
    tmp_path,
):
    (tmp_path / "a.txt").write_text("FINDINGS: Clear.", encoding="utf-8-sig")
    assert [report.findings for report in read_reports(tmp_path)] == ["Clear."]
    (tmp_path / "a.txt").write_bytes(b"FINDINGS: \xd6dem.")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text .*; save it as UTF-8"):
        list(read_reports(tmp_path))


def test_an_archive_that_is_cut_off_is_named(tmp_path):
    *_, path = [path for path, _ in layouts(tmp_path) if path.suffix == ".tgz"]
    for content in (path.read_bytes()[:60], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a whole archive is needed"):
            list(read_reports(path))


def archived(path, member, content=b""):
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def test_what_unpacks_to_more_than_a_report_is_refused(tmp_path):
    longest = b"Clear. ".ljust(files.MAX_REPORT, b".")
    archived(tmp_path / "a.tgz", tarfile.TarInfo("a.txt"), longest)
    assert len(list(read_reports(tmp_path / "a.tgz"))) == 1
    sparse = tarfile.TarInfo("a.txt")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9000"}
    for member, content in ((tarfile.TarInfo("a.txt"), longest + b"."), (sparse, b"")):
        archived(tmp_path / "a.tgz", member, content)
        with pytest.raises(UserError, match=r"'a.txt' in .*a.tgz is sparse or has more than 1,048"):
            list(read_reports(tmp_path / "a.tgz"))
    named = tarfile.TarInfo("a.txt")
    named.pax_headers = {"comment": "x" * files.MAX_REPORT}
    archived(tmp_path / "a.tgz", named, b"Clear.")
    with pytest.raises(UserError, match="a header of 1,048,"):
        list(read_reports(tmp_path / "a.tgz"))


def test_a_folder_without_reports_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        read_reports(tmp_path)
    with pytest.raises(UserError, match="No reports at"):
        read_reports(tmp_path / "nowhere")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="holds no report"):
        list(read_reports(tmp_path / "a.tar"))


def test_a_folder_may_hold_folders_and_names_in_capitals(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt" / "b.TXT").write_text("Clear.")
    (tmp_path / "c.XML").write_text(XML)
    assert [report.id for report in read_reports(tmp_path)] == ["a.txt/b", "CXR7"]
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"d.txt cannot be read \(No such file"):
        list(read_reports(tmp_path))
    (tmp_path / "d.txt").unlink()
    (tmp_path / os.fsdecode(b"\xe9.txt")).write_text("Clear.")
    with pytest.raises(UserError, match="is no file name in UTF-8"):
        list(read_reports(tmp_path))


def test_an_id_of_zero_a_mark_at_the_start_and_long_cells_are_read(tmp_path):
    lines = tmp_path / "R.JSONL"
    lines.write_text('{"id": 0, "text": null}\n', encoding="utf-8-sig")
    assert [report.id for report in read_reports(lines)] == ["0"]
    table = tmp_path / "r.csv"
    table.write_text(f" id , text \n0,{'Clear. ' * 30_000}\n")
    (report,) = read_reports(table)
    assert (report.id, len(report.findings)) == ("0", 209_999)
