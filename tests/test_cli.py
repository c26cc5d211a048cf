"""The command line, as a user meets it: exit codes and messages."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from explain2me.cli.entry import main
from explain2me.images import listing
from explain2me.text import printable

Call = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *messages: str) -> None:
    """Exit code 2, one line, no traceback, and what the line says."""
    code, _, errors = result
    assert code == 2, errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    for message in messages:
        assert message in errors


def test_run_prints_every_table_and_leaves_every_file(call: Call, write_config: Callable[..., Path]) -> None:
    code, output, errors = call("run", write_config())
    assert (code, errors) == (0, "")
    for words in (
        "entropy",
        "noise",
        "resilience",
        "focus",
        "stability",
        "AUROC",
        "camera",
        "gan_a",
        "total",
        "rotations",
    ):
        assert words in output
    assert "nan" not in output
    assert (Path("runs") / "tiny" / "summary" / "measures.csv").exists()
    assert call("verify", "runs/tiny")[:2] == (0, "whole\n")
    assert "stability" in call("show", "runs/tiny")[1]
    assert call("measure", "runs/tiny", "--set", "measures.similarity=pearson")[0] == 0
    assert call("summarise", "runs/tiny", "--set", "summary.bootstrap=20")[0] == 0
    assert "[pearson]" in call("show", "runs/tiny")[1]


def test_check_says_what_would_run_and_writes_nothing(call: Call, write_config: Callable[..., Path]) -> None:
    config = write_config()
    before = set(config.parent.rglob("*"))
    code, output, _ = call("check", config)
    assert code == 0
    assert "26 images x 16 conditions x 2 models = 832 forward passes on cpu" in output
    assert "real, fake; positive: fake" in output
    assert re.search(r"a seed0: timm:test_resnet, input 96x96, layer .*, maps of 3x3 cells", output)
    assert (
        "warning: the maps of timm:test_resnet have only 3 x 3 cells: they say little of where a model looks" in output
    )
    assert "no file where" not in output
    assert set(config.parent.rglob("*")) == before
    finer = call("check", config, "--set", "detectors.0.input_size=160", "--set", "measures.stability=false")[1]
    assert "maps of 5x5 cells" in finer
    assert "cells: they say little" not in finer


def test_check_looks_for_the_files_of_a_manifest(
    call: Call, write_config: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = images.read_text().splitlines()
    moved = tmp_path / "moved.csv"  # paths are relative to another folder
    absolute = [f"{images.parent}/{line}" for line in lines[1:]]
    moved.write_text("\n".join([lines[0], *absolute[:-1], lines[-1]]) + "\n")
    config = write_config(data=f'manifest = "{moved}"')
    first = lines[-1].partition(",")[0]
    warning = (
        f"warning: no file where the manifest says it is, for 1 of 26 images, first '{first}': paths are relative to"
    )
    assert warning in call("check", config)[1]
    moved.write_text("\n".join([lines[0], *absolute]) + "\n")
    assert "no file where" not in call("check", config)[1]
    moved.write_text(images.read_text())
    monkeypatch.setattr(listing, "LOOKED_FOR", 5)
    assert "for 5 of 5 images that were looked for (26 in all), first" in call("check", config)[1]


@pytest.mark.parametrize("kind", ["folder", "manifest", "containers"])
def test_a_check_walks_a_folder_and_reads_a_manifest_once(
    call: Call,
    write_config: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    source = images if kind == "manifest" else tmp_path / "set"
    if kind == "folder":
        for label in ("real", "fake"):
            shutil.copytree(images.parent / label, source / label)
    elif kind == "containers":
        source.mkdir()
        with tarfile.open(source / "a.tar", "w") as tar:
            for label in ("real", "fake"):
                tar.add(images.parent / label, label)
    seen: Counter[str] = Counter()
    scandir, open_file = os.scandir, os.open

    def count_scandir(path: str = ".") -> object:
        seen[os.fspath(path)] += 1
        return scandir(path)

    def count_open(path: str, *arguments: int, **options: int) -> int:
        seen[os.fspath(path)] += 1
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", count_scandir)
    monkeypatch.setattr(os, "open", count_open)
    assert call("check", write_config(data=f'manifest = "{source}"'))[0] == 0
    visits = {path: count for path, count in seen.items() if path.startswith(str(source))}
    assert visits
    most = 2 if kind == "containers" else 1  # the first walk finds no images
    assert {path: count for path, count in visits.items() if count > most} == {}


def test_files_are_looked_for_all_over_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LOOKED_FOR", 3)
    (tmp_path / "0.png").touch()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
    images = pa.table({"path": ["0.png", "x.png", "0.png", "y.png", "a.tar/0.png", "z.png"]})
    (tmp_path / "manifest.csv").touch()
    assert listing.missing_files(tmp_path / "manifest.csv", images) == ([], 3)
    others = pa.table({"path": ["0.png", "x.png", "0.png", "x.png", "y.png", "x.png"]})
    assert listing.missing_files(tmp_path / "manifest.csv", others) == (["y.png"], 3)
    assert listing.missing_files(tmp_path, images) == ([], 0)


def test_stages_one_by_one_are_the_run(call: Call, write_config: Callable[..., Path]) -> None:
    config = write_config()
    assert call("explain", config, "-o", "a")[0] == 0
    assert call("measure", "a")[0] == 0
    assert call("summarise", "a")[0] == 0
    assert call("run", config, "-o", "b")[0] == 0
    assert Path("a/summary/measures.csv").read_bytes() == Path("b/summary/measures.csv").read_bytes()


def test_damage_is_found_and_exit_is_2(call: Call, write_config: Callable[..., Path]) -> None:
    call("run", write_config())
    parts = sorted(Path("runs/tiny/maps").glob("*/*"))
    parts[0].unlink()
    data = bytearray(parts[1].read_bytes())
    data[200] ^= 0xFF
    parts[1].write_bytes(data)
    (parts[2].parent / "part-00099-0.parquet").write_bytes(b"")
    code, output, _ = call("verify", "runs/tiny")
    assert code == 2
    assert f"missing: {parts[0].relative_to('runs/tiny')}" in output
    assert f"damaged: {parts[1].relative_to('runs/tiny')}" in output
    assert "not in the plan" in output


# ------------------------------------------------------------------------------------------------ manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,real\n", "expected a column 'path'"),
        ("path,label,source\n", "no rows"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/000.png,real\n", "on line 2 already"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/001.png\n", "expected 2 fields"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/001.png,real\n", "expected images of at least two labels"),
    ],
    ids=["column", "rows", "duplicate", "fields", "one label"],
)
def test_a_wrong_manifest_is_refused(
    call: Call, write_config: Callable[..., Path], images: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    refused(call("run", write_config(data='manifest = "manifest.csv"')), message)
    assert not Path("runs").exists()


def test_a_missing_manifest_is_refused(call: Call, write_config: Callable[..., Path]) -> None:
    refused(call("run", write_config(data='manifest = "none.csv"')), "none.csv")


def test_an_unknown_label_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    data = f'manifest = "{images}"\nclasses = ["rael", "fake"]'
    refused(call("run", write_config(data=data)), "got the label 'real'", "did you mean 'rael'?")


def test_an_unknown_positive_class_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    data = f'manifest = "{images}"\npositive = "fakee"'
    refused(call("run", write_config(data=data)), "data.positive: expected one of the labels", "did you mean 'fake'?")


def test_a_missing_split_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    refused(call("run", write_config(data=f'manifest = "{images}"\nsplit = "tets"')), "'tets'", "'test'")


def test_missing_images_are_quarantined_and_too_many_make_exit_3(
    call: Call, write_config: Callable[..., Path], images: Path
) -> None:
    lines = images.read_text().splitlines()
    manifest = images.parent / "more.csv"
    manifest.write_text("\n".join([*lines, "fake/gan_a/absent.png,fake,gan_a,test"]) + "\n")
    config = write_config(data=f'manifest = "{manifest}"')
    code, output, errors = call("run", config)
    assert code == 3
    assert "quarantined: 1 image(s), missing (index)" in output
    assert "1 of 27 images are quarantined, more than data.allowed_quarantine = 0.01; first '" in errors
    assert call("run", config, "--set", "data.allowed_quarantine=0.1")[0] == 0
    said = " ".join(call("report", str(Path("runs") / "tiny"))[1].split())
    assert (
        "note: 1 image could not be used, first 'absent.png': no such file. All are in the folder quarantine." in said
    )


def test_no_usable_image_is_refused(call: Call, write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,label\na.png,real\nb.png,fake\n")
    refused(call("run", write_config(data='manifest = "manifest.csv"')), "none of the 2 images", "can be used")


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("measures.nois=true", "unknown key 'measures.nois': did you mean 'noise'?"),
        ("compute.batch_size=many", "compute.batch_size: input should be a valid integer, got 'many'"),
        ("measures.entropie=true", "did you mean 'entropy' or 'noise'?"),
        ("detectors.0.architecture=timm:test_resnt", "did you mean 'test_resnet'"),
        ("detectors.0.architecture=timmm:test_resnet", "timm:"),
        ("detectors.0.layer=stages.99", "stages."),
        ("detectors.0.input_size=[64,96]", "needs a square input, got 64x96"),
        ("compute.device=cuda:7", "CUDA"),
        ("salience.target=nobody", "salience.target: expected predicted, true or a class, got 'nobody'"),
    ],
)
def test_a_wrong_config_is_refused(call: Call, write_config: Callable[..., Path], change: str, message: str) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(call("run", write_config(), "--set", change), message)
    assert not Path("runs").exists()


def test_one_run_and_stability_is_refused(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    config = write_config(detectors=detector_table("solo", f"{weights}/seed0.safetensors"))
    refused(call("run", config), "needs at least 2 of each detector, 'solo' has 1", "measures.stability = false")
    assert call("run", config, "--set", "measures.stability=false")[0] == 0


def test_the_folder_of_another_config_is_refused(call: Call, write_config: Callable[..., Path]) -> None:
    config = write_config()
    assert call("run", config)[0] == 0
    refused(call("run", config, "--set", "seed=8"), "seed was 7, is 8", "--out")
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    refused(call("run", config, "-o", "other"), "is not empty and not a run")
    refused(call("run", config, "-o", "other/thesis.txt"), "is a file")
    refused(call("show", "other"), "is not a run folder")


# ------------------------------------------------------------------------------------------------ checkpoints


class Malicious:
    """Unpickling this would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl", "safetensors"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(
    call: Call, write_config: Callable[..., Path], detector_table: Callable[..., str], suffix: str
) -> None:
    for i in range(2):
        torch.save({"state_dict": Malicious()}, f"evil{i}.{suffix}")
    refused(call("run", write_config(detectors=detector_table("evil", f"evil*.{suffix}"))), "evil0")
    assert not Path("canary").exists()


def test_wrong_checkpoints_are_refused(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    good = load_file(weights / "seed0.safetensors")
    Path("w").mkdir()

    def attempt(state: dict[str, torch.Tensor]) -> tuple[int, str, str]:
        for i in range(2):
            save_file(state, f"w/{i}.safetensors")
        return call("run", write_config(detectors=detector_table("d", "w/*.safetensors")))

    refused(attempt(good | {"fc.weight": good["fc.weight"] * float("nan")}), "'d'", "fc.weight")
    refused(attempt(timm.create_model("test_resnet", num_classes=5).state_dict()), "'d'", "5", "2")
    refused(attempt(timm.create_model("test_efficientnet", num_classes=2).state_dict()), "'d'", "test_resnet")
    refused(
        call("run", write_config(detectors=detector_table("d", "none/*.safetensors"))), "no file matches checkpoints"
    )
    Path("w/0.safetensors").write_bytes(b"not a checkpoint")
    refused(call("run", write_config(detectors=detector_table("d", "w/*.safetensors"))), "0.safetensors")
    assert not Path("runs").exists()


def test_changed_weights_are_refused_on_resume(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    for i in range(2):
        Path(f"{i}.safetensors").write_bytes((weights / f"seed{i}.safetensors").read_bytes())
    config = write_config(detectors=detector_table("d", "?.safetensors"))
    assert call("run", config)[0] == 0
    Path("1.safetensors").write_bytes((weights / "seed2.safetensors").read_bytes())
    refused(call("run", config), "a checkpoint is not what")


def test_stages_refuse_changes_that_they_do_not_read(call: Call, write_config: Callable[..., Path]) -> None:
    assert call("run", write_config(), "-o", "run")[0] == 0
    scores = sorted(Path("run/scores").glob("*"))
    summary = Path("run/summary/measures.csv").read_bytes()
    for change in (
        "measures.noise.levels=[0,0.1]",
        "data.positive=real",
        "compute.batch_size=4",
        "seed=8",
        "name=other",
    ):
        for stage in ("measure", "summarise"):
            refused(call(stage, "run", "--set", change), f"--set {change}: `explain2me {stage}`", "start a new run")
    refused(call("measure", "run", "--set", "summary.bootstrap=9"), "summary.bootstrap", "`explain2me summarise`")
    refused(call("summarise", "run", "--set", "measures.similarity=pearson"), "similarity", "`explain2me measure`")
    refused(call("measure", "run", "--set", "measures.entropie=true"), "did you mean 'entropy'")
    assert sorted(Path("run/scores").glob("*")) == scores
    assert Path("run/summary/measures.csv").read_bytes() == summary
    assert call("measure", "run", "--set", "measures.entropy=false", "--set", "data.positive=fake")[0] == 0
    assert call("summarise", "run", "--set", "summary.bootstrap=0")[0] == 0


def test_stability_of_one_run_is_refused_after_the_run_too(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    config = write_config(
        detectors=detector_table("solo", f"{weights}/seed0.safetensors"),
        measures="stability = false\nnoise = false\nresilience = false\nfocus = false",
    )
    assert call("run", config, "-o", "run")[0] == 0
    refused(
        call("measure", "run", "--set", "measures.stability=true"),
        "needs at least 2 of each detector, 'solo' has 1",
        "measures.stability = false",
    )


def test_a_run_without_any_measure_gives_auroc_only(call: Call, write_config: Callable[..., Path]) -> None:
    off = [f"measures.{name}=false" for name in ("entropy", "noise", "resilience", "focus", "stability")]
    sets = [word for change in off for word in ("--set", change)]
    code, output, errors = call("run", write_config(), "-o", "run", *sets)
    assert (code, errors) == (0, "")
    assert "No measures" in output
    assert "AUROC (softmax)" in output
    assert call("run", write_config(), "-o", "stable", *sets[:8])[0] == 0
    assert "stability ↑" in call("show", "stable")[1]


@pytest.mark.parametrize("evil", ["\x1b[2J\x1b]0;evil\x07", "\x9b31m"], ids=["escape", "C1"])
def test_no_command_prints_control_characters(
    call: Call, write_config: Callable[..., Path], images: Path, evil: str
) -> None:
    manifest = Path("evil.csv")
    lines = [line.split(",") for line in images.read_text().splitlines()[1:]]
    rows = [f"{images.parent}/{path},{label}{evil},{source},{split}" for path, label, source, split in lines]
    manifest.write_text("\n".join(["path,label,source,split", *rows]) + "\n")
    config = write_config(data='manifest = "evil.csv"', measures="noise = false\nresilience = false\nfocus = false")
    positive = f"data.positive=fake{evil}"
    folder = f"run{evil.replace('/', '')}"
    results = [call("check", config, "--set", positive), call("run", config, "-o", folder, "--set", positive)]
    if results[1][0] == 0:
        results += [call("show", folder), call("verify", folder)]
        next(Path(folder).glob("maps/*/*")).unlink()
        (Path(folder) / "scores" / f"{evil}.parquet").write_text("damaged")
        results.append(call("verify", folder))
        assert results[-1][0] == 2
    for code, output, errors in results:
        assert code in (0, 2)
        assert [char for char in output + errors if not char.isprintable() and char != "\n"] == []
    assert any(printable(evil) in output + errors for _, output, errors in results)


def test_hostile_names_are_text(
    call: Call, write_config: Callable[..., Path], make_images: Callable[..., Path], tmp_path: Path, weights: Path,
    detector_table: Callable[..., str],
) -> None:  # fmt: skip
    counts = {("real", "=cmd()"): 4, ("fake", "[red]x[/red]"): 4}
    manifest = make_images(tmp_path / "hostile", counts=counts)
    detectors = detector_table('"><img src=x onerror=alert(1)>'.replace("/", ""), f"{weights}/seed[01].safetensors")
    code, output, errors = call("run", write_config(data=f'manifest = "{manifest}"', detectors=detectors), "-o", "run")
    assert code == 0, errors
    assert "[red]x[/red]" in output
    assert "'=cmd()" in Path("run/summary/measures.csv").read_text()


def test_help_needs_no_torch() -> None:
    script = "import sys; sys.argv = ['explain2me', '--help']\nfrom explain2me.cli import main\n"
    script += "try:\n    main()\nfinally:\n    print(*sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Usage: explain2me" in done.stdout
    assert not {"torch", "pandas", "pyarrow", "numpy", "pydantic", "rich"} & set(done.stderr.split())


def test_a_study_from_its_check_to_its_report(tmp_path, make_images, monkeypatch, capsys):
    manifest = make_images(tmp_path / "images", counts={("real", "camera"): 10, ("fake", "gan"): 10}, size=64)
    rows = manifest.read_text().splitlines()
    splits = ["train" if i % 5 < 3 else "val" if i % 5 == 3 else "test" for i in range(20)]
    lines = [line.rpartition(",")[0] + f",{split}" for line, split in zip(rows[1:], splits, strict=True)]
    manifest.write_text("\n".join([rows[0], *lines]) + "\n")
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.npy", np.eye(8))
    (tmp_path / "study.toml").write_text(
        'name = "study"\n[data]\nmanifest = "images/manifest.csv"\nsplit = "test"\n[training]\n'
        'architectures = ["timm:test_resnet"]\nruns = 2\nsplit = "train"\nvalidation_split = "val"\nepochs = 2\nbatch_size = 6\n'
        'input_size = 64\ndevice = "cpu"\n[[training.strategies]]\nname = "plain"\n[[training.strategies]]\nname = "guided"\n'
        'loss = "cyborg"\nsalience = "mean-of:maps"\n[summary]\nbootstrap = 10\n[compute]\ndevice = "cpu"\n[report]\nimages = 1\n'
    )

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["explain2me", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, error = capsys.readouterr()
        assert not stop.value.code, error
        return out + error

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    config, out = str(tmp_path / "study.toml"), str(tmp_path / "out")
    said = call("check", config)
    assert "strategy guided: cyborg, human maps: the mean of 1 maps, the same for every image" in said
    assert "training: 12 images (fake/gan 6, real/camera 6)" in said
    assert "test_resnet-guided: 2 run(s) of 2 epochs" in said
    assert "classes, in the order of the logits: real, fake; positive: fake" in said
    coarse = "warning: the maps of timm:test_resnet have only 2 x 2 cells"
    listed = tmp_path / "listed.toml"
    finer = '[[detectors]]\nname = "finer"\narchitecture = "timm:test_resnet"\ninput_size = 160\nrandom_runs = 2\n'
    listed.write_text(Path(config).read_text() + finer)
    assert [said.count(coarse), call("check", str(listed)).count(coarse)] == [1, 1]
    for change, message in (
        ("training.runs=1", "needs at least 2"),
        ("training.batch_size=13", "more than the 12 images"),
    ):
        monkeypatch.setattr("sys.argv", ["explain2me", "check", config, "--set", change])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.argv", ["explain2me", "study", config, "-o", out, "--set", "training.strategies.1.salience=mean-of:x"]
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "expected a folder of maps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was trained before
    said = call("study", config, "--out", out, "--shard", "0/2")
    assert re.search("1 of 2: test_resnet-plain run 0, best of 2 epochs: epoch [12]: train_loss ", said)
    assert "2 trainings are not finished, first test_resnet-plain run 1" in said
    with monkeypatch.context() as patched:
        patched.setattr("explain2me.train.trainer.log_epoch", interrupt)
        patched.setattr("sys.argv", ["explain2me", "study", config, "--out", out])
        with pytest.raises(SystemExit, match="130"):
            main()
    assert "continues after" not in capsys.readouterr().out
    said = call("study", config, "--out", out)
    assert said.count("continues after") == said.count("test_resnet-plain run 1 continues after epoch 1 of 2\n") == 1
    assert "The five measures over all sources" in said
    assert (tmp_path / "out" / "run" / "report" / "index.html").exists()
    assert "What the numbers say\n" in said
    assert "few training runs: 2 training runs of each detector: the interval of a score draws these anew" in said
    findings = (tmp_path / "out" / "run" / "report" / "findings.md").read_text()
    assert "- **few training runs**: 2 training runs of each detector" in findings
    assert call("verify", str(tmp_path / "out" / "run")) == "whole\n"
    page = (tmp_path / "out" / "run" / "report" / "index.html").read_text()
    card = (tmp_path / "out" / "run" / "report" / "model-cards" / "test_resnet-guided" / "model-card.md").read_text()
    for text in (
        "cyborg, alpha 0.5, map of the predicted class",
        "the mean of 1 maps, the same for every image: no annotation",
    ):
        assert text in page
        assert text in card
    assert "12 (fake/gan 6, real/camera 6)" in page
    assert re.search("- epoch taken: [12], [12] of 2", card)

    assert re.search("timm:test_resnet: input 64x64, .*, maps of 2x2 cells", call("check", config, "--out", out))
    call("check", config, "--out", out, "--set", "training.device=cuda:63")  # nothing is left to train on it
    monkeypatch.setattr("sys.argv", ["explain2me", "check", config, "--out", out, "--set", "training.runs=3"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "Delete that folder, and the comparison is made again (what was trained stays)" in capsys.readouterr().err
    image = manifest.parent / next(line for line in lines if line.endswith(",train")).partition(",")[0]
    before = image.read_bytes()
    Image.new("RGB", (64, 64)).save(image)  # under its name: only `check` opens every image again
    monkeypatch.setattr("sys.argv", ["explain2me", "check", config, "--out", out])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "data.training.sha256 was" in capsys.readouterr().err
    image.write_bytes(before)

    (tmp_path / "again.toml").write_text(
        'name = "again"\n[data]\nmanifest = "images/manifest.csv"\nsplit = "test"\n[[detectors]]\nname = "d"\n'
        'architecture = "timm:test_resnet"\ncheckpoints = "out/training/test_resnet-plain/run*/best.safetensors"\n'
        '[summary]\nbootstrap = 10\n[compute]\ndevice = "cpu"\n'
    )
    again, warning = str(tmp_path / "again.toml"), "its weights were trained with input_size = [64, 64]"
    assert "set input_size = [64, 64]" in call("check", again)
    assert warning in " ".join(call("explain", again, "--out", str(tmp_path / "again")).split())
    assert warning not in call("check", again, "--set", "detectors.0.input_size=64")
    swapped = "its weights were trained with the classes real, fake in the order of the logits (by the card beside them), and fake, real are"
    assert swapped not in call("check", again)
    other_order = ["--set", 'data.classes=["fake", "real"]']
    assert f'{swapped} used; set data.classes = ["real", "fake"]' in call("check", again, *other_order)
    said = call("explain", again, "--out", str(tmp_path / "swapped"), *other_order)
    assert swapped in " ".join(said.split())

    monkeypatch.setattr("sys.argv", ["explain2me", "show", out])
    with pytest.raises(SystemExit):
        main()
    assert f"it has no run.json; give '{out}/run'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["study", "train"])
def test_a_config_without_training_is_told_so(call: Call, write_config: Callable[..., Path], command: str) -> None:
    code, _, error = call(command, write_config())
    assert code == 2
    assert (
        "training is missing: this config has nothing to train; add a table [training], or call `explain2me run`"
        in error
    )


def test_version(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["explain2me", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("explain2me 0.")


@pytest.mark.parametrize("ask", [lambda: bytes(2**60), lambda: torch.empty(2**50)], ids=["python", "torch"])
def test_too_little_memory_is_a_line(monkeypatch, capsys, write_config, ask):
    import explain2me.stages.explain

    monkeypatch.setattr(explain2me.stages.explain, "explain_run", lambda *_, **__: ask())
    monkeypatch.setattr("sys.argv", ["explain2me", "explain", str(write_config())])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("explain2me: out of memory; what is committed stays.")
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_by_the_user_says_what_to_do(monkeypatch, capsys, write_config, number):
    import explain2me.stages.explain

    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)  # the signal ends it

    before = signal.getsignal(number)

    monkeypatch.setattr(explain2me.stages.explain, "explain_run", interrupt)
    monkeypatch.setattr("sys.argv", ["explain2me", "explain", str(write_config())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert signal.getsignal(number) == before
    assert "what is committed stays, call the same command to continue" in capsys.readouterr().err


def test_tables_older_than_the_scores_are_said_to_be(write_config, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    for arguments in (
        ("run", str(write_config()), "--out", out),
        ("measure", out, "--set", 'measures.similarity="pearson"'),
    ):
        monkeypatch.setattr("sys.argv", ["explain2me", *arguments])
        with pytest.raises(SystemExit):
            main()
    assert "call `explain2me summarise" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["explain2me", "show", out, "--brief"])
    with pytest.raises(SystemExit):
        main()
    out_text, error = capsys.readouterr()
    assert "the scores are newer than these tables" in error
    assert "By source" not in out_text


def test_rows_of_all_splits_are_warned_of(write_config, images, tmp_path, monkeypatch, capsys):
    text = images.read_text().splitlines()
    mixed = images.parent / "mixed.csv"
    mixed.write_text(
        "\n".join([text[0], *(line.replace(",test", ",train") if i % 2 else line for i, line in enumerate(text[1:]))])
    )
    monkeypatch.setattr("sys.argv", ["explain2me", "check", str(write_config(data=f'manifest = "{mixed}"'))])
    with pytest.raises(SystemExit):
        main()
    assert (
        "warning: data.split is not set, so the rows of all splits are taken: 'test' (13), 'train' (13)"
        in capsys.readouterr().out
    )


def test_a_positive_class_without_labels_is_warned_of(write_config, images, monkeypatch, capsys):
    text = images.read_text()
    assert "label" in text.splitlines()[0]
    unlabelled = images.parent / "unlabelled.csv"
    unlabelled.write_text(text.replace("label", "class", 1))
    for positive, warned in (('positive = "fake"', True), ("", False)):
        config = write_config(data=f'manifest = "{unlabelled}"\n{positive}')
        monkeypatch.setattr("sys.argv", ["explain2me", "check", str(config)])
        with pytest.raises(SystemExit):
            main()
        out = capsys.readouterr().out
        assert "no labels, so no AUROC" in out
        assert ("data.positive = 'fake' is set, but no image has a label" in out) == warned


def test_labels_that_differ_by_case_are_refused(write_config, images, monkeypatch, capsys):
    mixed = images.parent / "case.csv"
    mixed.write_text(images.read_text().replace(",real,", ",Real,", 1))
    monkeypatch.setattr("sys.argv", ["explain2me", "check", str(write_config(data=f'manifest = "{mixed}"'))])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "differ by more than case and spaces, got ['Real', 'fake', 'real']" in capsys.readouterr().err
