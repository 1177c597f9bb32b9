"""Retrieval: passages that can be traced, and the right ones first."""

import json
import math
import re

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evidence import retrieval
from medvlp_jax.evidence.retrieval import Passage

TEXTS = [
    "Smoking doubles the risk of lung cancer.",
    "Age raises the risk of melanoma in fair skin.",
    "Sun exposure and melanoma: a review of cohort studies. Sun burns matter most.",
    "Diabetes is treated with insulin.",
    "Skin cancer after sun exposure in farmers who smoke.",
]
ARTICLES = [Passage(str(i), "", text) for i, text in enumerate(TEXTS)]


def bm25(query, texts, k1=1.5, b=0.75):
    """Score by the formula: Lucene's idf, no stop words among these words, no stemming."""
    words = [re.findall(r"\w+", t.lower()) for t in texts]
    mean = np.mean([len(w) for w in words])
    scores = []
    for own in words:
        score = 0.0
        for term in query.split():
            count = sum(term in w for w in words)
            idf = math.log(1 + (len(texts) - count + 0.5) / (count + 0.5))
            tf = own.count(term)
            score += idf * tf / (tf + k1 * (1 - b + b * len(own) / mean))
        scores.append(score)
    return np.array(scores)


def test_words_are_found_in_the_order_of_the_formula():
    texts = ["gout urate urate kidney", "urate stone", "kidney kidney stone pain", "pain rash gout"]
    search = retrieval.by_words([Passage(str(i), "", t) for i, t in enumerate(texts)])
    for query in ("urate", "kidney stone", "gout pain"):
        expected = bm25(query, texts)
        order = [i for i in np.argsort(-expected, kind="stable") if expected[i] > 0]
        assert search(query, 10) == order, query


def test_word_forms_count_as_one_and_unknown_words_find_nothing():
    search = retrieval.by_words(ARTICLES)
    assert search("smoker smokes", 5)[:1] == [0]
    assert search("sun exposure AND melanoma", 2) == [2, 4]
    assert search("zebra", 5) == []
    assert len(search("risk of melanoma", 1)) == 1


def test_a_passage_names_what_it_holds_a_form_of_every_word_of():
    naming = retrieval.naming([*ARTICLES, Passage("t", "Melanomas", "A title counts.")])
    assert naming(["Smoked"]) == {0, 4}
    assert naming(["melanoma"]) == {1, 2, 5}
    assert naming(["Exposure to the sun"]) == {2, 4}
    assert naming(["melanoma diabetes"]) == set()
    assert naming(["melanoma", "diabetes"]) == {1, 2, 3, 5}  # a name and another one for it
    assert naming(["Of the zebra"]) == naming(["of the"]) == naming([]) == set()


def test_words_that_names_share_name_none_of_them():
    texts = [
        "Smoking and basal cell carcinoma of the skin. Access to care was limited.",
        "The basal layer. A squamous cell carcinoma.",
        "Basal and squamous cell carcinomas.",
        "Non-melanoma, non melanoma and non\u2011melanoma skin cancers.",
    ]
    naming = retrieval.naming([Passage(str(i), "", text) for i, text in enumerate(texts)])
    assert naming(["Access to a sewage system"]) == set()
    assert naming(["basal cell carcinoma"]) == {0, 2}
    assert naming(["squamous cell carcinoma"]) == {1, 2}
    assert naming(["melanoma"]) == set()
    assert naming(["nonmelanoma skin cancer"]) == naming(["Non-melanoma"]) == {3}


def test_a_long_article_is_cut_at_sentences_into_passages_that_name_it():
    sentences = [f"Sentence number {i} has exactly seven words." for i in range(10)]
    parts = retrieval.cut(Passage("PM1", "T", " ".join(sentences)), words=20)
    assert [p.id for p in parts] == ["PM1#1", "PM1#2", "PM1#3", "PM1#4", "PM1#5"]
    assert " ".join(p.text for p in parts) == " ".join(sentences)
    assert retrieval.cut(Passage("PM2", "", "Short.\n\nText."), words=20)[0] == Passage(
        "PM2", "", "Short. Text."
    )
    endless = retrieval.cut(Passage("x", "", "word " * 45), words=20)
    assert [len(p.text.split()) for p in endless] == [20, 20, 5]
    assert retrieval.cut(Passage("x", "", " ")) == []


def test_articles_are_read_from_lines_and_folders_in_a_fixed_order(tmp_path):
    rows = [{"pmid": 7, "title": "A", "abstract": "One."}, {"id": "b", "text": "Two."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert retrieval.read_articles(tmp_path / "a.jsonl") == [
        Passage("7", "A", "One."),
        Passage("b", "", "Two."),
    ]
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "z.txt").write_text("Last.")
    (folder / "d.txt").mkdir()
    (folder / "c.md").write_text("First.")
    assert [p.id for p in retrieval.read_articles(folder)] == ["c", "z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 5000, "line 1 is not JSON"),
        ('{"id": "a", "text": "\\ud800"}', "line 1 is not JSON in UTF-8"),
        ('{"id": "a", "text": "\xe9dema"}', "line 1 is not JSON in UTF-8"),
        ('{"id": "a", "text": "x"}\n{"text": "y"}', "line 2 needs 'id' or 'pmid'"),
        ('{"id": "a"}', "line 1 needs"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "two articles have the id 'a'"),
        (
            '{"id": "a#2", "text": "x"}\n{"id": "a", "text": "' + "y " * 300 + '"}',
            "have the id 'a#2'",
        ),
        (
            '{"id": "a", "text": "' + "y " * 300 + '"}\n{"id": "a#2", "text": "x"}',
            "have the id 'a#2'",
        ),
        ('{"id": "a", "text": "' + "y " * 300 + '"}\n{"id": "a", "text": "x"}', "have the id 'a'"),
        ("", "holds no article"),
    ],
)
def test_articles_that_cannot_be_traced_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        retrieval.read_articles(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="No articles at"):
        retrieval.read_articles(tmp_path / "a.pdf")


def test_meaning_ranks_by_cosine_of_mean_features_of_any_encoder(tmp_path):
    import jax

    from medvlp_jax import convert
    from medvlp_jax.data import text
    from medvlp_jax.encoders import modernbert
    from medvlp_jax.encoders.base import Tokens

    tokenizer = text.train_wordpiece(TEXTS, vocab_size=200, out_dir=tmp_path)
    size = {"width": 16, "mlp_dim": 16, "num_heads": 2, "depth": 2, "pad_id": 0}
    module = modernbert.make("tiny", vocab_size=tokenizer.get_vocab_size(), **size)
    tokens = Tokens(np.zeros((1, 4), np.int32), np.ones((1, 4), bool))
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    convert.save(module, variables, tmp_path, tokenizer=tmp_path)

    query = "melanoma and sun"
    read = text.tokenize(tokenizer, [query, *TEXTS], 32)
    found = np.asarray(jax.jit(module.apply)(variables, read).tokens, np.float64)
    means = [row[mask].mean(0) for row, mask in zip(found, read.mask, strict=True)]
    query_mean, *means = [m / np.linalg.norm(m) for m in means]
    cosines = np.array([m @ query_mean for m in means])
    search = retrieval.by_meaning(ARTICLES, tmp_path, length=32)
    assert search(query, 5) == list(np.argsort(-cosines))


def test_meaning_needs_a_folder_and_downloads_none():
    with pytest.raises(UserError, match="--retriever=somebody/something is no folder"):
        retrieval.by_meaning(ARTICLES, "somebody/something")
