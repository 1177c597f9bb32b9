import collections
import functools
import itertools
import json
import zlib

import jax
import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import pipeline, text, transforms
from medvlp_jax.encoders.base import Tokens

TWO_VIEWS = ("image", "image_2", "findings", "impression", "text_id")


def number(record, rng):
    """An example that shows the record and the randomness it was made with."""
    noise = np.float64(0) if rng is None else rng.random()
    return {"record": np.asarray(record), "noise": np.asarray(noise)}


def stream(sources, **options):
    options = {"transform": number, "batch_size": 4, "seed": 0, **options}
    return iter(pipeline.train_dataset(sources, **options))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def join(parts):
    """The global batches from those of every process."""
    steps = zip(*parts, strict=True)
    return [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in steps]


@pytest.fixture
def tokenizer(tmp_path):
    words = ["mr, t2. axial. skull and contents.", "lesion 1 2 3 4 5 6 7 8 9."]
    return text.train_wordpiece(words, vocab_size=90, out_dir=tmp_path / "vocab")


@pytest.fixture
def transform(tokenizer):
    return pipeline.record_transform(
        inputs=TWO_VIEWS,
        decode=functools.partial(transforms.decode, size=40),
        view=functools.partial(transforms.imitate_view, size=32),
        tokenizer=tokenizer,
        lengths={"findings": 12, "impression": 6},
    )


def evaluation(tokenizer, **options):
    return pipeline.record_transform(
        inputs=options.pop("inputs", ("image", "findings")),
        decode=functools.partial(transforms.decode, size=40),
        view=functools.partial(transforms.center_view, size=32),
        tokenizer=tokenizer,
        lengths={"findings": 12},
        train=False,
        **options,
    )


def test_the_same_seed_gives_the_same_stream_for_any_threads():
    assert_equal(
        take(stream([range(10)], threads=1, prefetch=1), 9),
        take(stream([range(10)], threads=4, prefetch=8), 9),
    )


def test_another_seed_gives_another_order_and_other_randomness():
    first, second = take(stream([range(100)], seed=1), 3), take(stream([range(100)], seed=2), 3)
    assert not np.array_equal(first[0]["record"], second[0]["record"])
    assert not np.array_equal(first[0]["noise"], second[0]["noise"])


def test_every_epoch_visits_each_record_once_in_a_new_order():
    batches = take(stream([range(12)], batch_size=3), 12)
    epochs = np.concatenate([b["record"] for b in batches]).reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_run_on_across_epochs_that_they_do_not_divide():
    records = np.concatenate([b["record"] for b in take(stream([range(10)]), 10)])
    assert collections.Counter(records.tolist()) == dict.fromkeys(range(10), 4)


def test_a_record_gets_new_randomness_in_every_epoch():
    noise = np.concatenate([b["noise"] for b in take(stream([range(4)]), 8)])
    assert len(set(noise.tolist())) == 32


def test_the_state_is_the_step_and_survives_json():
    iterator = stream([range(10)])
    take(iterator, 5)
    assert json.loads(json.dumps(iterator.get_state())) == {"next_index": 5}
    assert stream([range(10)], process_count=2).get_state() == {"next_index": 0}


def test_resume_in_mid_epoch_equals_an_uninterrupted_run(radiology_source, transform):
    whole = take(stream([radiology_source], transform=transform), 7)
    interrupted = stream([radiology_source], transform=transform)
    take(interrupted, 3)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = stream([radiology_source], transform=transform)
    resumed.set_state(state)
    assert_equal(take(resumed, 4), whole[3:])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_global_batches_are_bit_identical_for_any_process_count(radiology_source, transform, count):
    single = take(stream([radiology_source], transform=transform, batch_size=8), 3)
    parts = [
        take(
            stream(
                [radiology_source],
                transform=transform,
                batch_size=8,
                process_index=p,
                process_count=count,
            ),
            3,
        )
        for p in range(count)
    ]
    assert_equal(join(parts), single)


def test_resume_with_another_process_count_continues_the_stream():
    whole = take(stream([range(50)], batch_size=4), 6)
    before = stream([range(50)], batch_size=4, process_count=2)
    take(before, 4)
    after = [stream([range(50)], batch_size=4, process_index=p, process_count=4) for p in range(4)]
    for iterator in after:
        iterator.set_state(before.get_state())
    for expected in whole[4:]:
        rows = np.concatenate([next(iterator)["record"] for iterator in after])
        np.testing.assert_array_equal(rows, expected["record"])


def test_weights_share_the_stream_between_sources():
    sources = [range(10), range(100, 107), range(200, 300)]
    batches = take(stream(sources, weights=(0.5, 0.25, 0.25), batch_size=8), 100)
    records = np.concatenate([b["record"] for b in batches])
    assert collections.Counter((records // 100).tolist()) == {0: 400, 1: 200, 2: 200}
    for low, size in ((0, 10), (100, 7), (200, 100)):
        own = records[(records // 100) == low // 100]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size


def test_sources_share_by_size_without_weights():
    batches = take(stream([range(30), range(100, 110)], batch_size=4), 10)
    records = np.concatenate([b["record"] for b in batches])
    assert sorted(records) == [*range(30), *range(100, 110)]


def test_mixed_sources_are_bit_identical_for_any_process_count():
    options = {"weights": (2.0, 1.0), "batch_size": 6}
    sources = [range(10), range(100, 107)]
    single = take(stream(sources, **options), 5)
    parts = [
        take(stream(sources, process_index=p, process_count=3, **options), 5) for p in range(3)
    ]
    assert_equal(join(parts), single)


def test_training_batches_have_the_contracted_keys_shapes_and_types(radiology_source, transform):
    batch = next(stream([radiology_source], transform=transform))
    found = jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
    assert found == {
        "image": ((4, 32, 32, 1), "uint8"),
        "image_2": ((4, 32, 32, 1), "uint8"),
        "findings": Tokens(((4, 12), "int32"), ((4, 12), "bool")),
        "impression": Tokens(((4, 6), "int32"), ((4, 6), "bool")),
        "findings_valid": ((4,), "bool"),
        "impression_valid": ((4,), "bool"),
        "findings_id": ((4,), "int32"),
        "impression_id": ((4,), "int32"),
        "text_id": ((4,), "int32"),
    }
    assert not np.array_equal(batch["image"], batch["image_2"])


def test_the_report_is_both_sections_as_one_text():
    record = {"findings": "A.", "impression": "B."}
    assert pipeline.section_text(record, "report") == "A. B."
    assert pipeline.section_text({**record, "findings": ""}, "report") == "B."
    assert pipeline.section_text(record, "findings") == "A."


def test_missing_sections_are_invalid_and_equal_texts_share_an_id(cxr_folder, tmp_path, tokenizer):
    source = pipeline.open_source(
        "cxr_pairs",
        "train",
        data_dir=tmp_path / "d",
        manual_dir=cxr_folder,
        builder_config="images",
    )
    keys = ("findings", "impression")
    transform = pipeline.record_transform(
        inputs=keys, decode=None, view=None, tokenizer=tokenizer, lengths=dict.fromkeys(keys, 8)
    )
    examples = {source[i]["image_id"]: transform(source[i], None) for i in range(3)}
    assert [bool(examples[f"cxr{i}"]["findings_valid"]) for i in range(3)] == [True, True, False]
    assert [bool(examples[f"cxr{i}"]["impression_valid"]) for i in range(3)] == [True, False, False]
    assert examples["cxr2"]["findings"].mask.sum() == 2
    assert len({int(example["text_id"]) for example in examples.values()}) == 3


def test_case_and_spacing_make_no_other_section_in_evaluation_and_do_in_training(radiology_source):
    record = radiology_source[0]
    told = [{**record, "findings": text} for text in ("No  edema.\n", "no edema.", "No oedema.")]
    build = functools.partial(pipeline.record_transform, decode=None, view=None)
    cached = dict.fromkeys((one["findings"] for one in told), np.zeros(2, np.float32))
    for train, count in ((False, 2), (True, 3)):
        transform = build(inputs=("findings_feature",), features=cached, train=train)
        assert len({int(transform(one, None)["findings_id"]) for one in told}) == count


def test_text_id_is_the_crc_of_the_stored_one(radiology_source):
    transform = pipeline.record_transform(inputs=(), decode=None, view=None)
    record = radiology_source[0]
    expected = zlib.crc32(record["text_id"].encode()) & 0x7FFFFFFF
    assert transform(record, None) == {"text_id": expected}


def test_cached_features_take_the_place_of_tokens(radiology_source):
    texts = {t for pair in radiology_source.texts() for t in pair}
    features = {t: np.full(5, i, np.float32) for i, t in enumerate(sorted(texts))}
    inputs = ("findings_feature", "impression_feature")
    transform = pipeline.record_transform(inputs=inputs, decode=None, view=None, features=features)
    record = radiology_source[2]
    example = transform({**record, "findings": ""}, None)
    np.testing.assert_array_equal(example["impression_feature"], features[record["impression"]])
    np.testing.assert_array_equal(example["findings_feature"], np.zeros(5))
    assert not example["findings_valid"]
    features[""] = np.full(5, -1, np.float32)  # where a recipe reads missing sections as blanks
    example = transform({**record, "findings": ""}, None)
    np.testing.assert_array_equal(example["findings_feature"], features[""])
    assert not example["findings_valid"]
    with pytest.raises(UserError, match=r"A text of 5 characters .* has no cached feature"):
        transform({**record, "findings": "other"}, None)


def test_labels_are_in_training_only_where_asked_for(radiology_source):
    record = radiology_source[0]
    build = functools.partial(pipeline.record_transform, decode=None, view=None)
    assert "label/organ" not in build(inputs=())(record, None)
    assert build(inputs=("label/organ",))(record, None).keys() == {"text_id", "label/organ"}
    example = build(inputs=(), train=False)(record, None)
    assert example["label/plane"].shape == (16,)
    assert example.keys() >= {"label/organ", "label/plane", "label/modality"}


def test_evaluation_is_in_order_and_fills_up_the_last_batch(radiology_source, tokenizer):
    batches = list(
        pipeline.eval_batches(radiology_source, transform=evaluation(tokenizer), batch_size=3)
    )
    assert len(batches) == 3
    assert {b["image"].shape for b in batches} == {(3, 32, 32, 1)}
    valid = np.concatenate([b["valid"] for b in batches])
    np.testing.assert_array_equal(valid, [True] * 8 + [False])
    ids = np.concatenate([b["text_id"] for b in batches])[valid]
    expected = [pipeline.text_hash(radiology_source[i]["text_id"]) for i in range(8)]
    np.testing.assert_array_equal(ids, expected)


def test_evaluation_is_the_same_for_any_process_count():
    options = {"transform": number, "batch_size": 4}
    single = list(pipeline.eval_batches(range(10), **options))
    parts = [
        list(pipeline.eval_batches(range(10), process_index=p, process_count=2, **options))
        for p in range(2)
    ]
    assert_equal(join(parts), single)
    assert [len(part) for part in parts] == [3, 3]


def test_evaluation_stops_at_the_limit():
    batches = list(pipeline.eval_batches(range(10), transform=number, batch_size=4, limit=6))
    valid = np.concatenate([b["valid"] for b in batches])
    records = np.concatenate([b["record"] for b in batches])
    np.testing.assert_array_equal(records[valid], range(6))
    assert list(pipeline.eval_batches(range(3), transform=number, batch_size=4, limit=9))


def test_plain_texts_flow_through_the_same_pipeline(radiology_source, tokenizer):
    texts = pipeline.mlm_texts([radiology_source, radiology_source])
    assert len(texts) == len(set(texts)) == 8
    assert set(texts) == {t for pair in radiology_source.texts() for t in pair}
    transform = pipeline.mlm_transform(tokenizer, length=10)
    batch = next(stream([texts], transform=transform))
    assert batch.keys() == {"report"}
    assert batch["report"].ids.shape == (4, 10)


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch of 6 cannot be split over 4 processes; .* of 4"):
        stream([range(9)], batch_size=6, process_count=4)
    with pytest.raises(UserError, match="batch of 6 cannot be split"):
        pipeline.eval_batches(range(9), transform=number, batch_size=6, process_count=4).__next__()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(UserError, match="do not fit 2 sources"):
        stream([range(9), range(3)], weights=weights)


@pytest.mark.parametrize("sources", [[], [[]], [range(3), []]])
def test_empty_sources_are_refused(sources):
    with pytest.raises(UserError, match="accepted is one or more in each"):
        stream(sources)


def test_keys_that_cannot_be_made_are_refused(tokenizer):
    build = functools.partial(pipeline.record_transform, decode=None, view=None)
    with pytest.raises(UserError, match="No batch key 'imge' can be made; known: image"):
        build(inputs=("imge",))
    with pytest.raises(UserError, match="Tokens of findings need a tokenizer and a length"):
        build(inputs=("findings",), tokenizer=tokenizer, lengths={"impression": 4})
    with pytest.raises(UserError, match="findings_feature needs cached text features"):
        build(inputs=("findings_feature",))


def test_an_error_in_a_thread_reaches_the_caller():
    def broken(record, rng):
        raise UserError("row 3 is broken.")

    with pytest.raises(UserError, match=r"row 3 is broken\."):
        next(stream([range(9)], transform=broken))


def labels_of(counts, unknown=0):
    """One-hot rows of as many records a class as `counts` says, then rows of unknown class."""
    rows = np.repeat(np.eye(len(counts), dtype=np.int8), counts, axis=0)
    return np.concatenate([rows, np.full((unknown, len(counts)), -1, np.int8)])


def test_balanced_batches_hold_equally_many_of_each_class_and_all_of_the_largest_once():
    labels = labels_of((3, 10, 1), unknown=4)
    row = pipeline.balanced_order(labels, (0, 0))
    rows = np.array([row(k) for k in range(3 * 20)])
    classes = labels[rows].argmax(1).reshape(20, 3)
    assert (np.sort(classes, axis=1) == [0, 1, 2]).all()
    largest = rows[classes.ravel() == 1]
    for epoch in (largest[:10], largest[10:]):
        assert sorted(epoch) == list(range(3, 13))
    assert largest[:10].tolist() != largest[10:].tolist()
    assert set(rows[classes.ravel() == 0]) == {0, 1, 2}
    assert rows.max() < 14  # unknown rows never come


def test_balanced_order_is_a_function_of_seed_and_position():
    labels = labels_of((3, 10, 5))
    again = pipeline.balanced_order(labels, (0, 0))
    a = [pipeline.balanced_order(labels, (0, 0))(k) for k in range(50)]
    assert a == [again(k) for k in reversed(range(50))][::-1]
    assert a != [pipeline.balanced_order(labels, (1, 0))(k) for k in range(50)]


def test_a_class_without_a_record_has_no_turn_and_nothing_known_is_refused():
    labels = labels_of((2, 0, 3))
    row = pipeline.balanced_order(labels, (0,))
    assert (labels[[row(k) for k in range(12)]].sum(0) == [6, 0, 6]).all()
    with pytest.raises(UserError, match="none of the 3 records has a known class"):
        pipeline.balanced_order(labels_of((0, 0), unknown=3), (0,))
