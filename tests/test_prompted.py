"""Prompts and reports of a method that meets images in a space of evidence."""

import numpy as np
import pytest

from medvlp_jax import assemble, train
from medvlp_jax.config import UserError
from medvlp_jax.data import pipeline, text
from medvlp_jax.embedder import Embedder
from medvlp_jax.evaluator import Evaluator

PROTOCOLS = ("zero_shot", "retrieval")


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    """LGDEA as it was initialised, and the generated radiographs of "tiny"."""
    config, _ = train.resolve(["--config=configs/lgdea.py:smoke"])
    config["data"]["data_dir"] = str(tmp_path_factory.mktemp("data"))
    config["init"]["text"] = ""
    config["evals"] |= {"protocols": PROTOCOLS, "limit": 32, "resamples": 0, "controls": ()}
    parts = assemble.parts(config)
    return Evaluator(parts, config["evals"]), assemble.initial_variables(parts)


def phrase_direction(evaluator, phrases):
    """Return the direction of the mean of phrases, encoded one by one."""
    here, variables = evaluator
    length = here.parts.config["data"]["evidence"]["length"]
    tokens = text.tokenize(here.parts.tokenizer, phrases, length)
    batch = assemble.empty_evidence(here.parts.tokenizer, here.parts.config["data"], len(phrases))
    for row, (ids, mask) in enumerate(zip(*tokens, strict=True)):
        batch["evidence"].ids[row, 0], batch["evidence"].mask[row, 0] = ids, mask
    batch["evidence_mask"][:, 1:] = False
    found = here.parts.recipe.apply(variables, batch, method="encode")
    mean = np.asarray(found["phrases"][:, 0]).sum(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("Small left pleural effusion.", ["Small left pleural effusion"]),
        ("No pleural effusion.", ["no acute cardiopulmonary abnormality"]),
        ("zebra", ["zebra"]),  # nothing the rules know: the phrase is the prompt
    ],
)
def test_a_prompt_is_the_evidence_it_holds(evaluator, prompt, phrases):
    here, variables = evaluator
    found = here.embed_texts(variables)([prompt], "report")[0]
    np.testing.assert_allclose(found, phrase_direction(evaluator, phrases), atol=1e-5)


def test_reports_that_were_not_extracted_are_refused_before_anything_runs(evaluator, tmp_path):
    here = evaluator[0]
    (tmp_path / "evidence.jsonl").write_text("")
    data = {**here.parts.config["data"]}
    data["evidence"] = {**data["evidence"], "folder": str(tmp_path)}
    parts = here.parts._replace(config={**here.parts.config, "data": data})
    with pytest.raises(UserError, match=r"is not in .*: extract .*Grounding alone reads no report"):
        Evaluator(parts, here.settings)
    Evaluator(parts, {**here.settings, "protocols": ("grounding",)})


def test_evaluation_reads_with_as_many_threads_as_training(evaluator, monkeypatch):
    here = evaluator[0]
    config = {**here.parts.config, "data": {**here.parts.config["data"], "threads": 3}}
    config["data"]["prefetch"] = 5
    asked = Embedder(here.parts._replace(config=config), here.settings["batch_size"])
    monkeypatch.setattr(pipeline, "eval_batches", lambda *_, **how: how)
    how = asked._batches(here.source, ("image",), 0, None)
    assert (how["threads"], how["prefetch"]) == (3, 5)


def test_images_are_met_where_the_recipe_says(evaluator):
    here, variables = evaluator
    found = here.features(variables, here.source, limit=8)
    cosine = lambda name: found[f"image_{name}"] @ found[f"text_{name}"].T
    assert found["image_direction"].shape[1] * 2 == found["image_joint"].shape[1]
    image, report = here.joint(found)
    np.testing.assert_allclose(image @ report.T, cosine("joint"), atol=1e-6)
    results = here.run(variables)
    assert {key.split("/")[0] for key in results} == {*PROTOCOLS}
