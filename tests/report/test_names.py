"""No name of a measure stands in the code of the report: all of it follows the table of scores."""

import ast
import re
from pathlib import Path

import pytest

import explain2me.report
from explain2me.statistics.scores import MEASURES

FOLDER = Path(explain2me.report.__file__).parent
FILES = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".py", ".j2", ".js", ".css"))
NAMES = {*MEASURES, *(score.key for measure in MEASURES.values() for score in measure.scores)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_name_of_a_measure_stands_in_a_file(path):
    text = path.read_text()
    if path.suffix == ".py":
        tree = ast.parse(text)
        words = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        words += [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        text = "\n".join(word for word in words if word not in docstrings)
    else:
        text = re.sub(r"\.focus\(|:focus|\.focus\b", "", text)  # of the keyboard
        text = "\n".join(line for line in text.splitlines() if not line.strip().startswith("//"))
    assert re.findall(rf"\b({'|'.join(sorted(NAMES))})\b", text) == []


DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)


def test_the_pattern_finds_a_name():
    assert re.findall(rf"\b({'|'.join(sorted(NAMES))})\b", 'Finding("focus")') == ["focus"]
