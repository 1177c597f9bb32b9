"""Tokenizers: load one, train a small one, and turn texts into ids and masks of one length.

Axis letters: B texts, T tokens.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.reading import parse_json
from medvlp_jax.writing import replaced

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_VOCAB = Path(__file__).parent / "vocab"
# What padding is called: BERT and ModernBERT; T5; CLIP and Qwen, which reuse the end token.
_PAD_NAMES = ("[PAD]", "<pad>", "<|endoftext|>")


def load_tokenizer(path: str | Path, *, lowercase: bool | None = None) -> tokenizers.Tokenizer:
    """Load a tokenizer.

    Args:
      path: a folder with tokenizer.json or vocab.txt, such a file, or the name of a vocabulary
        that ships with the package ("cxr_phantom").
      lowercase: only for vocab.txt; None lower-cases as the tokenizer_config.json beside it says,
        else where the vocabulary has no upper-case token.

    Raises:
      UserError: if there is no such file, or one beside it is broken.
    """
    shipped = _VOCAB / str(path)
    file = shipped if shipped.is_dir() else Path(path).expanduser()
    if file.is_dir():
        found = [file / name for name in ("tokenizer.json", "vocab.txt") if (file / name).is_file()]
        file = found[0] if found else file / "tokenizer.json"
    if not file.is_file() or file.suffix not in (".json", ".txt"):
        ours = sorted(folder.name for folder in _VOCAB.glob("*") if folder.is_dir())
        raise UserError(
            f"No tokenizer at '{path}'; accepted are a tokenizer.json, a vocab.txt, a folder with "
            f"one of them, or a vocabulary that ships with the package ({', '.join(ours)})."
        )
    settings = _settings(file)
    if file.suffix == ".txt":
        tokenizer = _wordpiece(file.read_text(encoding="utf-8").splitlines(), lowercase)
        _set_case(tokenizer, settings if lowercase is None else {})
        return tokenizer
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    _set_padding(tokenizer, settings)
    tokenizer.no_truncation()
    kind = str(settings.get("tokenizer_class", "Bert")).removesuffix("Fast")
    if kind.startswith("Bert"):
        _set_case(tokenizer, settings)
    elif kind == "SiglipTokenizer":
        _canonicalise(tokenizer)
    elif kind == "Siglip2Tokenizer":
        _prepend(tokenizer, normalizers.Lowercase())
    return tokenizer


def _set_case(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Let BERT's tokenizer do with case and accents what tokenizer_config.json asks for outright.

    In `transformers` that wins over tokenizer.json.
    """
    normalizer = tokenizer.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer):
        return
    for name, key in (("lowercase", "do_lower_case"), ("strip_accents", "strip_accents")):
        if isinstance(settings.get(key), bool):
            setattr(normalizer, name, settings[key])


def _settings(tokenizer: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer say of it; those of today's releases win."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = tokenizer.with_name(name)
        if file.is_file():
            try:
                found |= parse_json(file.read_text())
            except (ValueError, TypeError):
                raise UserError(f"{file} is no JSON object.") from None
    return found


def _set_padding(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Keep the padding token that the files name with the tokenizer, where `pad_id` reads it.

    Only where the vocabulary alone would give another one: SigLIP has <pad> and pads with </s>.
    """
    own = tokenizer.padding or {}
    tokenizer.no_padding()
    named = settings.get("pad_token") or own.get("pad_token")
    token = named.get("content") if isinstance(named, Mapping) else named
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if number not in (None, _usual_pad_id(tokenizer)):
        tokenizer.enable_padding(pad_id=number, pad_token=token)


def _canonicalise(tokenizer: tokenizers.Tokenizer) -> None:
    """Let it read texts as SigLIP was trained on: lower case, no punctuation, single spaces.

    `transformers` does so in Python, before the steps that tokenizer.json knows.
    """
    steps = [
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    _prepend(tokenizer, *steps)


def _prepend(tokenizer, *steps):
    own = [tokenizer.normalizer] if tokenizer.normalizer else []
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Turn texts into ids and masks of one length.

    A longer text loses tokens before its closing [SEP], not the [SEP]. An empty text keeps its
    [CLS] and [SEP] as real tokens, so that no attention row is empty; that the text
    is missing is said by the batch keys `*_valid`.

    Args:
      tokenizer: see `load_tokenizer`.
      texts: B texts.
      length: T, at least 2.

    Returns:
      NumPy ids [B, T] int32 and mask [B, T] bool.
    """
    ids = np.full((len(texts), length), pad_id(tokenizer), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch_fast(list(texts))):
        count = sum(encoding.attention_mask)  # a tokenizer that names its padding pads a batch
        tokens = encoding.ids[:count]
        if len(tokens) > length:
            closes = bool(encoding.special_tokens_mask[count - 1])
            tokens = tokens[: length - closes] + tokens[len(tokens) - closes :]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return Tokens(ids, mask)


def pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    """Return the id of the padding token: of the one its files name, else of a usual one.

    Raises:
      UserError: if there is neither.
    """
    number = tokenizer.padding["pad_id"] if tokenizer.padding else _usual_pad_id(tokenizer)
    if number is None:
        names = ", ".join(_PAD_NAMES)
        raise UserError(f"The tokenizer has no padding token; accepted are {names}.")
    return number


def _usual_pad_id(tokenizer):
    known = (tokenizer.token_to_id(name) for name in _PAD_NAMES)
    return next((number for number in known if number is not None), None)


def train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, out_dir: str | Path
) -> tokenizers.Tokenizer:
    """Train a lower-case BERT vocabulary; equal texts give equal files.

    Args:
      texts: the corpus.
      vocab_size: number of tokens, [PAD] = 0, [UNK], [CLS], [SEP], [MASK] among them.
      out_dir: where vocab.txt and tokenizer.json are written.
    """
    texts = list(texts)
    tokenizer = _wordpiece(SPECIAL, lowercase=True)
    # The trainer numbers the continuing letters in hash order and breaks ties between merges by
    # number; naming them up front, sorted, makes it repeatable.
    letters = sorted(
        {
            f"##{letter}"
            for text in texts
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
                tokenizer.normalizer.normalize_str(text)
            )
            for letter in word[1:]
        }
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *letters], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    vocab = sorted(ids, key=ids.get)
    out_dir = Path(out_dir)
    trained = _wordpiece(vocab, lowercase=True)
    lines = "".join(f"{token}\n" for token in vocab)
    # tokenizer.json comes last and at once: where it is, a vocabulary counts as trained.
    for name, content in (("vocab.txt", lines), ("tokenizer.json", trained.to_str(pretty=True))):
        with replaced(out_dir / name) as path:
            path.write_text(content, encoding="utf-8")
    return trained


def _wordpiece(vocab: Sequence[str], lowercase: bool | None) -> tokenizers.Tokenizer:
    """Return BERT's tokenizer over a vocabulary in the order of its ids."""
    if lowercase is None:
        named = (token for token in vocab if not token.startswith("["))
        lowercase = not any(token != token.lower() for token in named)
    ids = {token: i for i, token in enumerate(vocab)}
    if missing := [token for token in SPECIAL if token not in ids]:
        raise UserError(f"The vocabulary lacks {', '.join(missing)}; BERT's five are needed.")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer
