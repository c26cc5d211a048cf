"""The project holds together: public names, one way of imports, a lock that any machine can use."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "explain2me"
PACKAGES = sorted(
    ".".join(path.parent.relative_to(SOURCE.parent).parts)
    for path in SOURCE.rglob("__init__.py")
    if "__all__" in path.read_text()
)
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pandas",
    "sklearn",
    "skimage",
    "scipy",
    "matplotlib",
    "pyarrow",
    "PIL",
)

MOST_FOLDERS, MOST_FILES_AT_THE_TOP, MOST_FILES, MOST_LINES = 13, 6, 12, 400
LAYERS = (
    "errors", "text", "statistics.scores", "salience.methods", "measures", "config", "images", "run", "detectors", "salience", "workers", "statistics", "stages",
    "train", "report", "demo", "cli", "__main__",
)  # fmt: skip
"""Modules and packages from the bottom to the top: each imports only from those before it. The two tables import nothing, so that all may."""


def test_public_names():
    names = importlib.import_module("explain2me").__all__
    assert {"GradCAM", "load_detector", "open_run"} <= set(names)
    wanted = (
        "entropy ssim spearman pearson top_k_iou ssim_windowed salt_and_pepper TRANSFORMS resilience blur_by_salience"
    )
    assert {*wanted.split(), "stability"} <= set(importlib.import_module("explain2me.measures").__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_can_be_imported(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__), key=kind_and_name)
    for name in module.__all__:
        assert getattr(module, name) is not None


def kind_and_name(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order that ruff gives."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    importer = place(module_name(path))
    for imported in imports(path):
        assert place(imported) <= importer, f"{module_name(path)} imports {imported}, which stands above it"


def test_no_module_imports_itself_over_others():
    graph = {module_name(path): set(imports(path)) for path in MODULES}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_no_catch_all_modules():
    assert not {path.stem for path in MODULES} & {"utils", "util", "base", "helpers", "common", "misc"}


def test_the_folders_and_files_stay_small():
    folders = {SOURCE, *(path.parent for path in MODULES)}
    assert len([folder for folder in folders if folder.parent == SOURCE]) <= MOST_FOLDERS
    assert len(list(SOURCE.glob("*.py"))) <= MOST_FILES_AT_THE_TOP
    num_files = {str(folder): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in num_files.items() if count > MOST_FILES} == {}
    num_lines = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: count for path, count in num_lines.items() if count > MOST_LINES} == {}


def place(module: str) -> int:
    name = module.partition(".")[2]
    top = name if name in LAYERS else name.partition(".")[0] or "errors"
    assert top in LAYERS, f"{module} has no place yet: add it to LAYERS in this test"
    return LAYERS.index(top)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that ``path`` imports at run time, also inside functions; the package itself left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("explain2me."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the full name"
            if node.module == "explain2me":
                yield from (f"explain2me.{alias.name}" for alias in node.names if is_module(alias.name))
            elif node.module and node.module.startswith("explain2me."):
                yield node.module


def is_module(name: str) -> bool:
    return (SOURCE / f"{name}.py").exists() or (SOURCE / name / "__init__.py").exists()


def test_importing_the_package_imports_nothing_heavy():
    assert heavy_modules("import explain2me") == []


def test_help_imports_nothing_heavy():
    script = """
sys.argv = ["explain2me", "--help"]
try:
    from explain2me.cli import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert heavy_modules(script) == []


@pytest.mark.parametrize("command", ["check", "run", "explain", "train", "study"])
def test_a_wrong_config_is_refused_before_anything_heavy_is_imported(command, tmp_path):
    (tmp_path / "wrong.toml").write_text(
        'name = "wrong"\n[data]\nmanifest = "images"\npositive = "fake"\nsplits = "test"\n'
    )
    script = f"""
sys.argv = ["explain2me", "{command}", {str(tmp_path / "wrong.toml")!r}]
try:
    from explain2me.cli import main
    main()
except SystemExit as stop:
    assert stop.code == 2, stop.code
"""
    assert heavy_modules(script) == []


MANIFESTS = {
    "missing": (None, "no such file"),
    "without a column path": ("image,label\na.png,real\n", "column 'path'"),
    "with a line cut off": ("path,label\na.png\n", "expected 2 fields"),
    "with a path twice": ("path,label\na.png,real\na.png,fake\n", "already; keep one"),
}


@pytest.mark.parametrize("command", ["check", "run", "explain", "study"])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistake_in_a_manifest_is_reported_before_anything_heavy_is_imported(command, name, tmp_path):
    text, message = MANIFESTS[name]
    if text is not None:
        (tmp_path / "manifest.csv").write_text(text)
    assert heavy_modules(refused_script(command, tmp_path, message)) == []


def test_a_mistake_in_a_folder_or_in_labels_is_reported_before_pytorch_is_imported(tmp_path):
    (tmp_path / "manifest.csv").mkdir()
    assert "torch" not in heavy_modules(refused_script("check", tmp_path, "expected images as"))
    (tmp_path / "manifest.csv").rmdir()
    (tmp_path / "manifest.csv").write_text("path,label\na.png,real\nb.png,gan\n")
    assert "torch" not in heavy_modules(refused_script("run", tmp_path, "data.positive: expected one of the labels"))


def refused_script(command: str, folder: Path, message: str) -> str:
    (folder / "config.toml").write_text(
        'name = "wrong"\n[data]\nmanifest = "manifest.csv"\n'
        '[[detectors]]\nname = "a"\narchitecture = "timm:resnet18"\nrandom_runs = 2\n'
    )
    return f"""
import contextlib, io
sys.argv = ["explain2me", "{command}", {str(folder / "config.toml")!r}]
try:
    from explain2me.cli import main
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        main()
except SystemExit as stop:
    assert stop.code == 2, stop.code
    assert {message!r} in errors.getvalue(), errors.getvalue()
"""


def heavy_modules(script: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has imported after ``script``."""
    report = f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules))"
    command = [sys.executable, "-c", f"import sys\n{script}\n{report}"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return output.splitlines()[-1].split()[1:]


def test_changelog_has_a_place_for_the_next_change():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert "2303.11969" in text
    assert "Salience-Based Explainability for Synthetic Face Detection Models" in text


def test_license_is_the_declared_one():
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert project()["project"]["license"] == "Apache-2.0"


def test_lock_names_no_host_and_no_folder():
    odd = [line for line in lock_lines() if re.search(r"://|\bfile:|^-|^\s*-(?!-hash=)|^\S+ @ ", line)]
    assert odd == []


def test_every_locked_package_has_a_version_and_hashes():
    text = "\n".join(lock_lines())
    requirements = re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(requirements) > 50
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+==\S+", requirement), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement


def test_every_dependency_is_locked():
    locked = {re.match(r"[a-z0-9._-]+", line)[0] for line in lock_lines() if re.match(r"[a-z0-9]", line)}
    tables = project()
    wanted = [*tables["project"]["dependencies"], *tables["dependency-groups"]["dev"]]
    wanted += [item for extra in tables["project"]["optional-dependencies"].values() for item in extra]
    assert {re.match(r"[A-Za-z0-9._-]+", item)[0].lower() for item in wanted} <= locked


def lock_lines() -> list[str]:
    return [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.strip().startswith("#")]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
