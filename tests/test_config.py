"""Configs: every setting present and overridable, unknown ones answered with their neighbours."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from medvlp_jax import checks, schedules, train
from medvlp_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"
VARIANTS = [
    (path.stem, variant)
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem != "common" and not path.stem.startswith("_")
    for variant in importlib.import_module(f"configs.{path.stem}").VARIANTS
]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def get(name, variant):
    return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_no_setting_is_none_or_a_list_so_that_all_can_be_overridden(name, variant):
    for path, value in configs.flatten(get(name, variant)):
        assert value is not None, path
        assert not isinstance(value, list), path


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_resolved_config_equals_the_committed_one(name, variant):
    """A diff here shows what a change does to each experiment; rewrite with --golden-configs."""
    text = configs.to_json(get(name, variant).to_dict()) + "\n"
    file = GOLDEN / f"{name}-{variant or 'default'}.json"
    assert file.read_text() == text, f"python tests/test_config.py rewrites {file.name}"


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_settings_of_every_experiment_fit_one_another(name, variant):
    checks.settings(get(name, variant).to_dict())


def test_config_files_stay_readable():
    for path in (ROOT / "configs").glob("*.py"):
        lines = path.read_text().splitlines()
        assert ".get(" not in path.read_text()
        assert len(lines) <= 150, path


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="demo, smoke, radiology_qa"):
        get("imitate", "large")


def test_an_override_keeps_the_type_and_reaches_the_resolved_config():
    argv = ["--config=configs/imitate.py:demo", "--config.optim.lr=3e-4", "--config.recipe.dim=64"]
    config, folder = train.resolve([*argv, "--workdir=somewhere"])
    assert config["optim"]["lr"] == 3e-4
    assert config["recipe"]["dim"] == 64
    assert folder.name == "somewhere"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.recipe.image.varaint=50",
            "No setting 'recipe.image.varaint'.*recipe.image.variant",
        ),
        ("--config.learning_rate=1", "No setting 'learning_rate' in this config"),
        ("--config.optim.lr=abc", "abc"),
        ("--config.optim=3", "'optim' is a section; set one of its keys: "),
        ("--congif.optim.lr=1", "congif"),
        ("stray", "What is 'stray'"),
    ],
)
def test_a_wrong_argument_is_one_sentence(argument, message):
    with pytest.raises(configs.UserError, match=message):
        train.resolve(["--config=configs/imitate.py:demo", argument])


KNOTS = ((0, 1.0), (51_676, 1.0), (51_677, 0.3))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_loss_weight_takes_knots(name, variant):
    config = get(name, variant)
    for term, number in config.recipe.weights.items():
        assert isinstance(number, float), term
        config.recipe.weights[term] = KNOTS
        assert config.to_dict()["recipe"]["weights"][term] == KNOTS
    checks.settings(config.to_dict())


@pytest.mark.parametrize(
    ("config", "term"),
    [
        ("imitate", "findings"),
        ("lgdea:demo", "global"),
        ("prima:sharpen_pad", "cross_entropy"),
        ("clip:demo", "contrastive"),
        ("sclip", "caption"),
        ("cfcml", "sample"),
    ],
)
@pytest.mark.parametrize("given", [KNOTS, 0.5, 0])
def test_a_loss_weight_is_a_number_or_knots_on_the_command_line(config, term, given):
    file, _, variant = config.partition(":")
    named = f"--config=configs/{file}.py" + f":{variant}" * bool(variant)
    resolved, _ = train.resolve([named, f"--config.recipe.weights.{term}={given}"])
    assert resolved["recipe"]["weights"][term] == given
    checks.settings(resolved)


def test_a_config_file_of_ones_own_sets_the_beta_schedule(tmp_path):
    """As docs/imitate.md says: 1,667 steps of 128 are an epoch of 213,384 pairs."""
    file = tmp_path / "longer.py"
    file.write_text(
        "from configs import imitate\n"
        "from medvlp_jax.schedules import imitate_beta\n\n\n"
        'def get_config(variant=""):\n'
        "    config = imitate.get_config(variant)\n"
        '    for term in ("findings", "view_reading"):\n'
        "        config.recipe.weights[term] = imitate_beta(1667)\n"
        "    return config\n"
    )
    resolved, _ = train.resolve([f"--config={file}:demo", "--config.recipe.weights.impression=0.5"])
    weights = resolved["recipe"]["weights"]
    assert weights["findings"] == weights["view_reading"] == schedules.imitate_beta(1667)
    assert weights["impression"] == 0.5
    checks.settings(resolved)


@pytest.mark.parametrize(
    "given", ["abc", "nan", "true", "1e999", "()", "((0,1),(0,2))", "((0,'a'),)", "((0,1,2),)"]
)
def test_a_loss_weight_that_is_neither_number_nor_knots_is_one_sentence(given):
    demo = "--config=configs/imitate.py:demo"
    resolved, _ = train.resolve([demo, f"--config.recipe.weights.findings={given}"])
    accepted = r"^recipe\.weights\.findings must be a finite number or \(\(step, value\)"
    with pytest.raises(configs.UserError, match=accepted):
        checks.settings(resolved)


def test_a_missing_config_file_names_those_there_are():
    with pytest.raises(configs.UserError, match=r"No config file 'configs/imitat.py'.*imitate.py"):
        train.resolve(["--config=configs/imitat.py"])


def test_the_command_line_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "medvlp_jax.train",
            "--config=configs/imitate.py:demo",
            "--config.dta.size=3",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "No setting 'dta.size'" in done.stderr
    assert "Traceback" not in done.stderr


def test_build_refuses_an_unknown_name_and_an_unknown_field():
    with pytest.raises(
        configs.UserError, match=r"No 'resnt' in medvlp_jax.encoders. Did you mean resnet"
    ):
        configs.build("medvlp_jax.encoders", "resnt")
    with pytest.raises(
        configs.UserError, match=r"imitate takes no 'strenght'. Did you mean strength"
    ):
        configs.build("medvlp_jax.recipes", "imitate", strenght=1)


def test_differences_name_the_changed_settings_only():
    old = {"a": {"b": 1, "c": (1, 2)}, "d": 0}
    new = {"a": {"b": 2, "c": [1, 2]}, "e": 0}
    assert configs.differences(old, new) == [
        "a.b: 1 -> 2",
        "d: 0 -> '(absent)'",
        "e: '(absent)' -> 0",
    ]


def test_nearest_lists_all_names_where_none_is_close():
    assert configs.nearest("zzzz", ["alpha", "beta"]) == "Known: alpha, beta."


def test_check_overrides_accepts_the_negated_form_of_a_boolean():
    config = ConfigDict({"train": {"export": True}})
    configs.check_overrides(["--noconfig.train.export"], config)
    with pytest.raises(configs.UserError, match="exprt"):
        configs.check_overrides(["--noconfig.train.exprt"], config)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, variant in VARIANTS:
        resolved = get(name, variant).to_dict()
        json.dumps(resolved)
        (GOLDEN / f"{name}-{variant or 'default'}.json").write_text(
            configs.to_json(resolved) + "\n"
        )
