"""Protocols that cannot be are known before anything is embedded."""

import types

import pytest

from medvlp_jax import assemble, evaluate, protocols


class Records(list):
    """Records that count how often they are read."""

    name, split, reads = "made", "test", 0

    def __getitem__(self, row):
        self.reads += 1
        return super().__getitem__(int(row))


def record(findings="", impression=""):
    return {"findings": findings, "impression": impression}


def test_a_text_is_looked_for_until_the_first_and_not_in_all_of_many_records():
    many = Records([record()] * 200_000)
    found = protocols.lack_of_texts(many, ("report",), 0)
    assert (
        found
        == f"retrieval needs texts, and none of {many.reads} records of made (test) has report"
    )
    assert many.reads == protocols.LOOKED_AT
    for row in (0, 57):
        some = Records([record()] * 100)
        some[row] = record(impression="Normal.")
        assert protocols.lack_of_texts(some, ("report",), 0) == ""
        assert some.reads == row + 1


@pytest.mark.parametrize(
    ("sections", "limit", "lacking"),
    [
        (("report",), 0, False),
        (("impression",), 0, False),
        (("findings",), 0, True),  # of a recipe that reads no other
        (("report",), 3, True),  # evals.limit ends before it
        (("report",), 90, False),
    ],
)
def test_a_text_counts_where_the_recipe_reads_it_within_the_limit(sections, limit, lacking):
    some = Records([record()] * 3 + [record(impression="Normal.")])
    assert bool(protocols.lack_of_texts(some, sections, limit)) == lacking


def test_retrieval_that_nobody_asked_for_is_left_out_with_its_control(monkeypatch, capsys):
    monkeypatch.setattr(assemble, "open_corpus", lambda *_: Records([record()]))
    parts = types.SimpleNamespace(config={"data": {"corpora": ("made",)}})
    parts.recipe = types.SimpleNamespace(spaces={"report": ("image", "text")})
    settings = {"protocols": ("zero_shot", "retrieval@clean", "retrieval@benchx"), "corpus": ""}
    settings |= {"split": "test", "limit": 0, "controls": ("untrained", "shuffled_pairs")}

    def found(*given, **changed):
        arguments = evaluate.parser().parse_args(["--run=r", *given])
        kept = evaluate._possible(settings | changed, arguments, parts)
        return kept["protocols"], kept["controls"]

    assert found() == (("zero_shot",), ("untrained",))
    assert "Protocol retrieval is left out: retrieval needs texts" in capsys.readouterr().out
    assert found("--controls=shuffled_pairs")[1] == settings["controls"]  # to be refused
    for unchanged in (("--protocol=retrieval",), ()):
        alone = {"protocols": ("retrieval",)} if not unchanged else {}
        assert found(*unchanged, **alone)[0] == alone.get("protocols", settings["protocols"])
