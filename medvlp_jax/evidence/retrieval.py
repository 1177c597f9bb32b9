"""Articles in, the passages that speak of a query out.

Articles are a .jsonl file ({"id" or "pmid", "title", "abstract" or "text"} a line) or a folder of
.txt and .md files. A long article is cut at the ends of sentences; passage k of article A is "A#k",
so that every text written from passages can be traced to the place. Two ways to search:

* words: BM25 (Robertson and Zaragoza 2009, Eq. 3.15) by bm25s, stemmed, without stop words;
* meaning: cosine of mean token features, by any text encoder `convert.load` reads.
"""

import collections
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.reading import parse_json

WORDS = 250  # of a passage, about one abstract
SUFFIXES = (".txt", ".md")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NON = re.compile(r"\bnon[- \u2010-\u2013](?=\w)", re.IGNORECASE)

Search = Callable[[str, int], list[int]]


class Passage(NamedTuple):
    """A stretch of one article."""

    id: str
    title: str
    text: str


def read_articles(path: str | Path) -> list[Passage]:
    """Read articles and cut them into passages, in a fixed order.

    Args:
      path: a .jsonl file or a folder.

    Raises:
      UserError: where there is nothing to read, a row lacks its id or text, or two articles
        or passages of them share an id.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        articles = _folder(path)
    elif path.is_file() and path.suffix == ".jsonl":
        articles = _rows(path)
    else:
        raise UserError(
            f"No articles at '{path}'; accepted are a .jsonl or a folder of .txt and .md files."
        )
    passages, seen = [], set()
    for article in articles:
        parts = cut(article)
        for name in dict.fromkeys([article.id, *(part.id for part in parts)]):
            if name in seen:  # perhaps of a passage: "A#2" can be an article's own
                raise UserError(f"{path}: two articles have the id '{name}'; each needs its own.")
            seen.add(name)
        passages += parts
    if not passages:
        raise UserError(f"{path} holds no article.")
    return passages


def cut(article: Passage, words: int = WORDS) -> list[Passage]:
    """Cut an article into passages of at most `words`, at the ends of sentences where it has any.

    One that fits keeps its id; of others passage k = 1, 2, ... is "id#k".
    """
    parts, size = [[]], 0
    for sentence in _SENTENCE.split(" ".join(article.text.split())):
        pieces = sentence.split()
        for start in range(0, len(pieces), words):  # a sentence without an end, such as a table
            piece = pieces[start : start + words]
            if size + len(piece) > words:
                parts.append([])
                size = 0
            parts[-1].append(" ".join(piece))
            size += len(piece)
    texts = [" ".join(part) for part in parts if part]
    if len(texts) < 2:
        return [article._replace(text=text) for text in texts]
    return [Passage(f"{article.id}#{k}", article.title, text) for k, text in enumerate(texts, 1)]


def by_words(passages: Sequence[Passage]) -> Search:
    """Return (query, count) -> rows of the best passages by BM25; none without a common word."""
    import bm25s

    index = bm25s.BM25()
    index.index(_words([f"{p.title} {p.text}" for p in passages]), show_progress=False)

    def search(query, count):
        known = [word for word in _words([query])[0] if word in index.vocab_dict]
        return _best(index.get_scores(known), count) if known else []

    return search


def by_meaning(passages: Sequence[Passage], folder: str | Path, *, length: int = 256) -> Search:
    """Return (query, count) -> rows of the passages whose mean token features are nearest.

    Args:
      passages: encoded once.
      folder: of a text encoder, with its tokenizer.
      length: tokens of a passage that are read.

    Raises:
      UserError: if it is no folder, or holds no text encoder.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"--retriever={folder} is no folder; accepted are bm25 and the folder of a text "
            "encoder with its tokenizer."
        )
    import jax

    from medvlp_jax import convert
    from medvlp_jax.data import text as tokenisation
    from medvlp_jax.encoders.base import pool
    from medvlp_jax.training import text as text_stage

    module, variables = convert.load(folder)
    if not hasattr(module, "vocab_size"):
        raise UserError(f"{folder} holds a {type(module).__name__}, which reads no text.")
    tokenizer = tokenisation.load_tokenizer(convert.fetch(folder))
    variables = jax.device_put(variables)
    features = jax.jit(lambda v, tokens: pool(module.apply(v, tokens).tokens, tokens.mask, "mean"))

    def encode(texts):
        found = text_stage.cache_features(
            list(dict.fromkeys(texts)),
            lambda tokens: features(variables, tokens),
            tokenizer=tokenizer,
            length=min(length, module.max_length),
            batch_size=8,
        )
        rows = np.stack([found[text] for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    index = encode([f"{p.title} {p.text}" for p in passages])
    return lambda query, count: _best(index @ encode([query])[0], count, least=-np.inf)


def naming(passages: Sequence[Passage]) -> Callable[[Iterable[str]], set[int]]:
    """Return names -> rows of the passages that use one of them.

    A passage uses a name if one sentence of it, or its title, holds all words of the name in any
    order and form, stop words aside. So what names share ("carcinoma", "access") is never enough,
    and "squamous cell carcinoma" two sentences after "basal layer" is no basal cell carcinoma.
    """
    owner, texts = [], []
    for row, passage in enumerate(passages):
        sentences = [passage.title, *_SENTENCE.split(passage.text)]
        owner += [row] * len(sentences)
        texts += sentences
    holding = collections.defaultdict(set)
    for sentence, words in enumerate(_words(map(_without_hyphen, texts))):
        for word in words:
            holding[word].add(sentence)

    def rows(names):
        found = set()
        for words in _words(map(_without_hyphen, names)):
            if words:
                found |= set.intersection(*(holding.get(word, set()) for word in words))
        return {owner[sentence] for sentence in found}

    return rows


def _without_hyphen(text: str) -> str:
    """Write "non-melanoma" as one word, since it is no melanoma."""
    return _NON.sub("non", text)


def _words(texts: Iterable[str]) -> list[list[str]]:
    """Return the stems of each text, without stop words."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(
        list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
    )


def _best(scores: np.ndarray, count: int, least: float = 0.0) -> list[int]:
    """Return the rows of the highest scores above `least`; of equals the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [int(row) for row in order if scores[row] > least]


def _folder(path: Path) -> Iterator[Passage]:
    for file in sorted(
        (p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()), key=str
    ):
        name = str(file.relative_to(path).with_suffix(""))
        yield Passage(name, "", file.read_text(encoding="utf-8", errors="replace"))


def _rows(path: Path) -> Iterator[Passage]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a character can be spelled
            except ValueError:  # of which bytes that are not UTF-8 are a kind
                raise UserError(f"{path.name} line {number} is not JSON in UTF-8.") from None
            row = row if isinstance(row, dict) else {}
            name, text = row.get("id") or row.get("pmid"), row.get("abstract") or row.get("text")
            if not name or not isinstance(text, str):
                raise UserError(
                    f"{path.name} line {number} needs 'id' or 'pmid', and 'abstract' or 'text'."
                )
            yield Passage(str(name), str(row.get("title") or ""), text)
