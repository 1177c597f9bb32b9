"""Prompts: one token a class, in the order of the label vector."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from medvlp_jax.config import UserError
from medvlp_jax.data import prompts, text

SETTINGS = {
    "question": "Options: {options}.",
    "answer": "Diagnosis:",
    "option": " {letter}",
    "delimiters": ("image start", "image end", "text start", "text end"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("cxr_phantom")


def test_letters_stand_before_the_classes_and_are_one_token_each(tokenizer):
    found = prompts.tokenise(tokenizer, SETTINGS, ("edema", "normal"))
    assert tokenizer.decode(found.question).endswith(": a ) edema b ) normal .")
    assert [tokenizer.id_to_token(i) for i in found.classes] == ["a", "b"]
    assert len(found.delimiters) == 4


def test_qwens_own_letters_are_one_token_each(test_data):
    folder = test_data / "tokenizers" / "qwen-base"
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    qwen = tokenizers.Tokenizer(model)
    qwen.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen.decoder = decoders.ByteLevel()
    found = prompts.tokenise(qwen, SETTINGS, tuple("vwxyz"))
    assert [qwen.decode([i]) for i in found.classes] == [" A", " B", " C", " D", " E"]


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        ({"question": "Which?"}, ("a", "b"), "lacks {options}"),
        ({"option": "class {letter}"}, ("a", "b"), "makes of A, B not one token each"),
        ({"option": "x"}, ("a", "b"), "makes of A, B not one token each"),
        ({}, tuple(map(str, range(27))), "27 classes are more than there are letters"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(tokenizer, changes, classes, message):
    with pytest.raises(UserError, match=message):
        prompts.tokenise(tokenizer, {**SETTINGS, **changes}, classes)
