import json
import re
import shutil
import string
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from medvlp_jax.config import UserError
from medvlp_jax.data import text

CORPUS = ["Small left pleural effusion.", "No pneumothorax.", "Left lower lobe pneumonia.", "é ü"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocab")
    text.train_wordpiece(CORPUS, vocab_size=80, out_dir=out)
    return out


def test_training_puts_the_special_tokens_first(folder):
    vocab = (folder / "vocab.txt").read_text().splitlines()
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(vocab) == len(set(vocab)) <= 80


def test_training_is_repeatable_in_a_fresh_process(folder, tmp_path):
    code = (
        "import sys; from medvlp_jax.data import text;"
        f"text.train_wordpiece({CORPUS!r}, vocab_size=80, out_dir=sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("vocab.txt", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_both_files_and_the_folder_load_alike(folder):
    ids = [
        text.load_tokenizer(path).encode("LEFT effusion, [MASK]!").ids
        for path in (folder, folder / "vocab.txt", folder / "tokenizer.json")
    ]
    assert ids[0] == ids[1] == ids[2]
    assert ids[0][0] == 2
    assert ids[0][-1] == 3
    assert 4 in ids[0]


def test_a_long_text_keeps_its_closing_token(folder):
    tokenizer = text.load_tokenizer(folder)
    whole = tokenizer.encode(CORPUS[0]).ids
    tokens = text.tokenize(tokenizer, [CORPUS[0]], 5)
    np.testing.assert_array_equal(tokens.ids, [[*whole[:4], 3]])
    assert tokens.mask.all()


def test_a_short_text_is_padded(folder):
    tokenizer = text.load_tokenizer(folder)
    whole = tokenizer.encode("No.").ids
    tokens = text.tokenize(tokenizer, ["No.", ""], 12)
    assert tokens.ids.dtype == np.int32
    assert tokens.mask.dtype == bool
    np.testing.assert_array_equal(tokens.ids[0], [*whole, *[0] * (12 - len(whole))])
    np.testing.assert_array_equal(tokens.mask.sum(1), [len(whole), 2])


def test_an_empty_text_keeps_two_real_tokens(folder):
    tokens = text.tokenize(text.load_tokenizer(folder), [""], 4)
    np.testing.assert_array_equal(tokens.ids, [[2, 3, 0, 0]])
    np.testing.assert_array_equal(tokens.mask, [[True, True, False, False]])


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"No tokenizer at '.*nowhere'; accepted are"):
        text.load_tokenizer(tmp_path / "nowhere")


def test_a_vocabulary_without_bert_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(UserError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        text.load_tokenizer(tmp_path)


def test_case_is_read_off_the_vocabulary_and_can_be_set(tmp_path):
    tokens = [*text.SPECIAL, "left", "Left"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    assert text.load_tokenizer(tmp_path).encode("Left").ids == [2, 6, 3]
    assert text.load_tokenizer(tmp_path, lowercase=True).encode("Left").ids == [2, 5, 3]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens[:-1]))
    assert text.load_tokenizer(tmp_path).encode("Left").ids == [2, 5, 3]


def test_real_vocabularies_have_their_published_ids(test_data):
    folder = test_data / "tokenizers"
    cased = text.load_tokenizer(folder / "bert-base-cased")
    assert cased.get_vocab_size() == 28996
    assert cased.encode("The Lung").tokens == ["[CLS]", "The", "Lu", "##ng", "[SEP]"]
    assert text.tokenize(cased, ["The"], 4).ids.tolist() == [[101, 1109, 102, 0]]
    from_json = text.load_tokenizer(folder / "bert-base-uncased")
    from_txt = text.load_tokenizer(folder / "bert-base-uncased/vocab.txt")
    sentence = "Bibasilar atelectasis; naïve T2-weighted, 3.5 cm!"
    assert from_json.encode(sentence).ids == from_txt.encode(sentence).ids
    modern = text.load_tokenizer(folder / "modernbert-base")
    assert text.pad_id(modern) == 50283
    ids = text.tokenize(modern, ["A chest radiograph", ""], 4).ids
    assert (ids[:, 0] == 50281).all()
    assert ids[0, -1] == 50282
    np.testing.assert_array_equal(ids[1], [50281, 50282, 50283, 50283])


def test_siglip_reads_texts_without_case_punctuation_or_double_spaces(folder, tmp_path):
    """As `SiglipTokenizer.canonicalize_text` says, before the tokenizer's own steps."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    plain = text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    canonical = text.load_tokenizer(tmp_path)
    for words in ("Small,  LEFT (pleural) effusion!\n\tNo [pneumothorax].", " a-b ", "...", "^\\"):
        bare = words.lower().translate(str.maketrans("", "", string.punctuation))
        expected = plain.encode(re.sub(r"\s+", " ", bare).strip()).ids
        assert canonical.encode(words).ids == expected
    assert canonical.encode("no.").ids != plain.encode("no.").ids
    for content in ("[1", "[" * 5000):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer_config.json is no JSON object"):
            text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("named", ["[SEP]", {"content": "[SEP]", "lstrip": False}])
def test_texts_are_padded_with_the_token_that_the_files_name(folder, tmp_path, file, named):
    """SigLIP's vocabulary has <pad>, and its texts are padded with </s>."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    plain = text.load_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps({"pad_token": named}))
    tokenizer = text.load_tokenizer(tmp_path)
    assert (text.pad_id(plain), text.pad_id(tokenizer)) == (0, 3)
    texts = ["No.", "", *CORPUS]
    for length in (5, 12):
        before, after = (text.tokenize(t, texts, length) for t in (plain, tokenizer))
        np.testing.assert_array_equal(before.mask, after.mask)
        np.testing.assert_array_equal(after.ids, np.where(before.mask, before.ids, 3))
    tokenizer.save(str(tmp_path / "tokenizer.json"))  # the token goes along
    (tmp_path / file).unlink()
    assert text.pad_id(text.load_tokenizer(tmp_path)) == 3
    (tmp_path / file).write_text(json.dumps({"pad_token": "<nowhere>"}))
    assert text.pad_id(text.load_tokenizer(tmp_path)) == 0


@pytest.mark.hf
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "tokenizer.json, lower case"])
@pytest.mark.parametrize(
    "said",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
    ],
)
def test_what_is_said_of_case_outright_wins_as_in_transformers(tmp_path, file, said):
    transformers = pytest.importorskip("transformers")
    vocabulary = [*text.SPECIAL, "left", "Left", "naive", "naïve", "Naïve", "Naive"]
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(vocabulary))
    else:
        made = text._wordpiece(vocabulary, lowercase=file != "tokenizer.json")
        made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    settings = tmp_path / "tokenizer_config.json"
    for kind in (
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": "BertTokenizerFast"},
        {},
    ):
        settings.write_text(json.dumps({**said, **kind}))
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("Left Naïve").input_ids
        assert text.load_tokenizer(tmp_path).encode("Left Naïve").ids == expected
    if file == "vocab.txt":
        assert text.load_tokenizer(tmp_path, lowercase=False).encode("Left").ids == [2, 6, 3]


def test_a_setting_of_case_without_meaning_to_a_class_is_passed_over(folder, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    found, expected = (text.load_tokenizer(f).encode("LEFT").ids for f in (tmp_path, folder))
    assert found == expected


@pytest.mark.hf
def test_siglip_2_lower_cases_and_keeps_punctuation_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdeABCDE.,▁"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    theirs = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[])
    theirs.save_pretrained(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.normalizer = normalizers.Replace(" ", "▁")  # the file of Gemma, which keeps capitals
    for _ in range(2):
        found = text.load_tokenizer(tmp_path).encode("A,b.  C").tokens
        assert found == theirs.tokenize("A,b.  C") == ["a", ",", "b", ".", "▁", "▁", "c"]
        plain.save(str(tmp_path / "tokenizer.json"))
