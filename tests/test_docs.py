"""Commands, flags, settings and links in README and docs are there, as they are written."""

import contextlib
import importlib
import io
import pathlib
import re
import shlex

import pytest

from medvlp_jax import cli, train

ROOT = pathlib.Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS += sorted((ROOT / "medvlp_jax/data/datasets").glob("*/README.md"))
# A command ends at a backtick, a table's bar, a comment or the end of its line.
COMMAND = re.compile(r"\b((?:medvlp|python -m|python|bash) [\w./]+)([^`|#\n]*)")
SETTING = re.compile(r"--config[.=]\S*=?\S*")


def commands(start):
    """Return (document, program, arguments) of the commands that begin so."""
    found = []
    for file in DOCS:
        text = file.read_text().replace("\\\n", " ")
        calls = [(call, rest) for call, rest in COMMAND.findall(text) if call.startswith(start)]
        found += [(str(file.relative_to(ROOT)), call.split()[-1], rest) for call, rest in calls]
    return found


def flags(arguments):
    """Return the flags without settings."""
    return re.findall(r"(?<![\w-])(--[a-z][a-z-]*)(?![\w.-])", SETTING.sub("", arguments))


def help_of(verb, *commands):
    module = importlib.import_module(cli.VERBS[verb][0])
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        module.main([*commands, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_flags_of_medvlp_exist(verb):
    calls = [call for call in commands("medvlp ") if call[1] == verb]
    assert calls
    for file, _, arguments in calls:
        words = arguments.split()
        own = words[:1] if verb in ("data", "convert", "evidence", "bench") else []
        said = help_of(verb, *(word for word in own if word.isalpha()))
        assert said
        for flag in flags(arguments):
            assert re.search(rf"{flag}(?![\w-])", said), (file, verb, arguments)


def test_scripts_exist_with_their_flags_and_are_started_so_that_they_find_each_other():
    calls = [(*call, False) for call in commands("python ") if call[1].endswith(".py")]
    calls += [
        (file, f"{module.replace('.', '/')}.py", arguments, True)
        for file, module, arguments in commands("python -m ")
        if module.startswith("benchmarks.")
    ]
    assert len(calls) > 20
    for file, script, arguments, is_module in calls:
        source = (ROOT / script).read_text()
        # `python FILE` searches the file's own folder, in which there is no `benchmarks`.
        needs_module = re.search(r"^\s*(from|import) benchmarks\b", source, re.MULTILINE)
        assert is_module or not needs_module, (file, script)
        for flag in flags(arguments):
            assert f'"{flag}"' in source, (file, script, flag)


def test_flags_of_the_launchers_exist():
    calls = [call for call in commands("bash ") if call[1].endswith(".sh")]
    assert {script for _, script, _ in calls} == {
        "launch/run.sh",
        "launch/prima.sh",
        "tests/run.sh",
    }
    passed_on = (ROOT / "medvlp_jax/train.py").read_text()
    for file, script, arguments in calls:
        source = (ROOT / script).read_text() + passed_on * (script == "launch/run.sh")
        for flag in flags(re.sub(r'"[^"]*"', "", arguments)):
            assert re.search(rf"{flag}(?![\w-])", source), (file, script, flag)


def test_settings_exist():
    count = 0
    for file, script, arguments in commands("bash launch/run.sh"):
        given = [word for word in shlex.split(arguments) if word.startswith("--config")]
        if any(word.endswith("=...") for word in given):
            continue
        with contextlib.chdir(ROOT):
            config, _ = train.resolve(given or ["--config=configs/imitate.py:demo"])
        assert config["recipe"]["name"], (file, script)
        count += len(given)
    assert count > 20


def test_links_lead_somewhere():
    for file in DOCS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), (file.relative_to(ROOT), target)
