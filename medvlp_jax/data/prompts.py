"""A question with lettered options as token ids, for a language model that answers in logits.

PRIMA (Wang et al. 2026, https://arxiv.org/abs/2602.23297), stage 3: the prompt, learnable
delimiters that begin as words, and the tokens of the classes, one each. The wording is our choice.
"""

import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tokenizers

from medvlp_jax.config import UserError


class Prompt(NamedTuple):
    """Token ids of all that is not an image or a patient.

    Attributes:
      question: before the image.
      answer: after the metadata; the token that would follow it is a class.
      classes: one id a class, all different.
      delimiters: words whose mean embedding each delimiter starts from.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]
    classes: tuple[int, ...]
    delimiters: tuple[tuple[int, ...], ...]


def tokenise(
    tokenizer: tokenizers.Tokenizer, settings: Mapping[str, object], classes: Sequence[str]
) -> Prompt:
    """Tokenise a prompt.

    Args:
      tokenizer: of the language model.
      settings: question, with {options} where "A) name B) name ..." goes; answer; option, with
        {letter}; delimiters, the words of each.
      classes: their names in the order of the label vector.

    Raises:
      UserError: for a question without {options}, more classes than letters, or a letter that is
        not one token of its own.
    """
    if "{options}" not in settings["question"]:
        raise UserError(f"recipe.prompt.question '{settings['question']}' lacks {{options}}.")
    if len(classes) > len(string.ascii_uppercase):
        raise UserError(f"{len(classes)} classes are more than there are letters for.")
    letters = string.ascii_uppercase[: len(classes)]
    options = " ".join(f"{letter}) {name}" for letter, name in zip(letters, classes, strict=True))
    ids = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
    tokens = [ids(settings["option"].replace("{letter}", letter)) for letter in letters]
    long = [letter for letter, found in zip(letters, tokens, strict=True) if len(found) != 1]
    if long or len(set(tokens)) < len(tokens):
        raise UserError(
            f"recipe.prompt.option '{settings['option']}': the tokenizer makes of "
            f"{', '.join(long or letters)} not one token each, which classes need."
        )
    return Prompt(
        ids(settings["question"].replace("{options}", options)),
        ids(settings["answer"]),
        tuple(found[0] for found in tokens),
        tuple(map(ids, settings["delimiters"])),
    )
