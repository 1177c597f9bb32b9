"""JSON that others wrote: read, or refused by a ValueError."""

import pytest

from medvlp_jax.reading import DEEPEST, parse_json


def test_json_is_read_from_texts_and_bytes():
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json(b"3") == 3


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[1, {"a":', "}]")])
def test_nesting_is_read_to_a_depth_that_what_follows_can_walk(opening, closing):
    step = opening.count("[") + opening.count("{")
    nested = lambda levels: opening * (levels // step) + "1" + closing * (levels // step)
    assert parse_json(nested(DEEPEST))
    for levels in (DEEPEST + step, 900, 100_000):
        with pytest.raises(ValueError, match="more than 100 levels of nesting"):
            parse_json(nested(levels))
    with pytest.raises(ValueError, match="more than 100 levels of nesting"):
        parse_json("[" * 100_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "Expecting value"), (b"\xff", "can't decode"), ("1" * 5000, "Exceeds the limit")],
)
def test_whatever_is_no_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
