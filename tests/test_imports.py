"""Imports point down only, and nothing heavy is imported with the package."""

import ast
import pathlib
import subprocess
import sys
import textwrap

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "medvlp_jax"
# From the bottom up; a module may import its own level and those before it.
LEVELS = (
    ("__init__", "config", "ranges", "schedules", "sharding", "distributed", "reading", "writing"),
    ("layers",),
    ("encoders", "losses", "data", "convert"),
    ("recipes",),
    ("training", "evaluation", "evidence"),
    ("clinical", "tables", "weights"),
    ("assemble",),
    ("checks", "examples", "lineage", "outside"),
    (
        "unpaired",
        "ground",
        "embedder",
        "controls",
        "protocols",
        "evaluator",
        "backbones",
        "origins",
    ),
    (
        "adapt",
        "bench",
        "card",
        "cli",
        "cases",
        "export",
        "heads",
        "evaluate",
        "plan",
        "report",
        "table",
        "train",
        "tuned",
    ),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports_of(file):
    """Yield the dotted names a file imports from the package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("medvlp_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medvlp_jax"):
            yield from (f"{node.module}.{a.name}" for a in node.names)


def part(dotted):
    names = dotted.split(".")
    return names[1] if len(names) > 1 and names[1] in LEVEL else "__init__"


FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if f.name != "__main__.py"]


def test_every_part_of_the_package_has_a_level():
    parts = {
        p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if not p.name.startswith("_")
    }
    assert parts - {"__pycache__"} <= set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for dotted in imports_of(file):
        assert LEVEL[part(dotted)] <= LEVEL[own], f"{own} imports {dotted}"


def test_encoders_do_not_import_one_another():
    for file in (PACKAGE / "encoders").glob("*.py"):
        siblings = [d for d in imports_of(file) if ".encoders." in d]
        assert all(d.startswith("medvlp_jax.encoders.base") for d in siblings), file


def test_importing_the_package_loads_neither_torch_nor_the_optional_libraries():
    program = """
        import sys, medvlp_jax.recipes.imitate, medvlp_jax.training.loop
        heavy = ("torch", "tensorflow", "grain", "tensorflow_datasets", "wandb")
        print([name for name in heavy if name in sys.modules])
    """
    program = textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
