"""The two tables drive the library: a measure or a method is named in its table and nowhere else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from explain2me.run.conditions import PERTURBATIONS
from explain2me.salience.methods import METHODS
from explain2me.statistics.scores import CLEAN, MEASURES, VARIANTS, scores

SOURCE = Path(__file__).resolve().parents[1] / "src" / "explain2me"
TABLES = {SOURCE / "statistics" / "scores.py", SOURCE / "salience" / "methods.py"}
PURE = (SOURCE / "measures",)
NAMES = {*MEASURES, *METHODS, *(score.key for _, score in scores())}
INSIDE = re.compile(rf"measures\.({'|'.join(MEASURES)})\b|\b({'|'.join(MEASURES)})_matrix")
FILES = [
    path
    for path in sorted(SOURCE.rglob("*.py"))
    if path not in TABLES and not any(path.is_relative_to(folder) for folder in PURE)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_names_a_measure_or_a_method(path: Path) -> None:
    named = [text for text in constants(path) if text in NAMES or INSIDE.search(text)]
    assert named == [], "read the name from MEASURES or METHODS instead"


def constants(path: Path) -> Iterator[str]:
    """The string constants of a file, without the strings that stand alone as docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_row_of_a_measure_is_consistent(measure) -> None:
    assert (measure.perturbation in PERTURBATIONS) == (measure.of == "perturbation")
    assert (measure.variants == VARIANTS) == measure.compares
    assert measure.function or measure.compares
    assert not measure.function or callable(measure.load())
    assert {score.condition for score in measure.scores} == {CLEAN} or measure.perturbation
    assert measure.low < measure.high


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_row_of_a_method_is_consistent(method) -> None:
    assert callable(method.load())
    assert method.passes >= 1


def test_names_and_keys_differ() -> None:
    keys = [score.key for _, score in scores()]
    assert len(keys) == len(set(keys))
    assert all(name == row.name for table in (MEASURES, METHODS) for name, row in table.items())
