"""The commands that make and read a run, as a user meets them: what they print, and their exit codes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from refused import refused

from explain2me.run.folder import Run

Call = Callable[..., tuple[int, str, str]]
ENTROPY = "noise = false\nresilience = false\nfocus = false\nstability = false"


def test_run_prints_every_table_and_leaves_every_file(finished_folder: Path) -> None:
    output = (finished_folder / "output").read_text()
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
    assert (finished_folder / "run" / "summary" / "measures.csv").exists()


@pytest.mark.usefixtures("copied_run")
def test_a_finished_run_is_verified_shown_and_measured_again(call: Call) -> None:
    assert call("verify", "runs/tiny")[:2] == (0, "whole\n")
    assert "stability" in call("show", "runs/tiny")[1]
    assert call("measure", "runs/tiny", "--set", "measures.similarity=pearson")[0] == 0
    assert call("summarise", "runs/tiny", "--set", "summary.bootstrap=20")[0] == 0
    assert "[pearson]" in call("show", "runs/tiny")[1]


def test_stages_one_by_one_are_the_run(call: Call, write_config: Callable[..., Path], finished_run: Run) -> None:
    config = write_config()
    assert call("explain", config, "-o", "a")[0] == 0
    assert call("measure", "a")[0] == 0
    assert call("summarise", "a")[0] == 0
    whole = finished_run.folder / "summary" / "measures.csv"
    assert Path("a/summary/measures.csv").read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("copied_run")
def test_damage_is_found_and_exit_is_2(call: Call) -> None:
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


@pytest.mark.usefixtures("no_pdf")
def test_missing_images_are_quarantined_and_too_many_make_exit_3(
    call: Call, write_config: Callable[..., Path], rewrite_manifest: Callable[..., Path]
) -> None:
    manifest = rewrite_manifest(lambda text: text + "absent.png,fake,gan_a,test\n")
    config = write_config(data=f'manifest = "{manifest}"', measures=ENTROPY)
    code, output, errors = call("run", config)
    assert code == 3
    assert "quarantined: absent.png: " in output
    assert "1 of 27 images are quarantined, more than data.allowed_quarantine = 0.01; first '" in errors
    assert call("run", config, "--set", "data.allowed_quarantine=0.1")[0] == 0
    said = " ".join(call("report", "runs/tiny", "--set", "report.images=1")[1].split())
    assert (
        "note: 1 image could not be used, first 'absent.png': no such file. All are in the folder quarantine." in said
    )


@pytest.mark.usefixtures("copied_run")
def test_a_warning_names_tables_older_than_the_scores(call: Call) -> None:
    said = call("measure", "runs/tiny", "--set", 'measures.similarity="pearson"')[1]
    assert "call `explain2me summarise" in said
    _, output, errors = call("show", "runs/tiny", "--brief")
    assert "these tables are of earlier scores" in errors
    assert "By source" not in output


def test_stages_refuse_changes_that_they_do_not_read(call: Call, copied_run: Run) -> None:
    run = copied_run.folder
    scores = sorted((run / "scores").glob("*"))
    summary = (run / "summary" / "measures.csv").read_bytes()
    for change in (
        "measures.noise.levels=[0,0.1]",
        "data.positive=real",
        "compute.batch_size=4",
        "seed=8",
        "name=other",
    ):
        for stage in ("measure", "summarise"):
            refused(call(stage, run, "--set", change), f"--set {change}: `explain2me {stage}`", "start a new run")
    refused(call("measure", run, "--set", "summary.bootstrap=9"), "summary.bootstrap", "`explain2me summarise`")
    refused(call("summarise", run, "--set", "measures.similarity=pearson"), "similarity", "`explain2me measure`")
    refused(call("measure", run, "--set", "measures.entropie=true"), "did you mean 'entropy'")
    assert sorted((run / "scores").glob("*")) == scores
    assert (run / "summary" / "measures.csv").read_bytes() == summary
    assert call("measure", run, "--set", "measures.entropy=false", "--set", "data.positive=fake")[0] == 0
    assert call("summarise", run, "--set", "summary.bootstrap=0")[0] == 0


def test_stability_of_one_run_is_refused_after_the_run_too(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    config = write_config(
        detectors=detector_table("solo", f"{weights}/seed0.safetensors"),
        measures=ENTROPY,
    )
    assert call("explain", config, "-o", "run")[0] == 0
    refused(
        call("measure", "run", "--set", "measures.stability=true"),
        "needs at least 2 of each detector, 'solo' has 1",
        "measures.stability = false",
    )


@pytest.mark.usefixtures("copied_run")
def test_the_folder_of_another_config_is_refused(call: Call, write_config: Callable[..., Path]) -> None:
    config = write_config()
    assert call("run", config)[0] == 0  # of this config: nothing is left to do
    refused(call("run", config, "--set", "seed=8"), "seed was 7, is 8", "--out")
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    refused(call("run", config, "-o", "other"), "is not empty and not a run")
    refused(call("run", config, "-o", "other/thesis.txt"), "is a file")
    refused(call("show", "other"), "is not a run folder")


def test_changed_weights_are_refused_on_resume(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    for i in range(2):
        Path(f"{i}.safetensors").write_bytes((weights / f"seed{i}.safetensors").read_bytes())
    config = write_config(detectors=detector_table("d", "?.safetensors"), measures=ENTROPY)
    assert call("explain", config)[0] == 0
    Path("1.safetensors").write_bytes((weights / "seed2.safetensors").read_bytes())
    refused(call("explain", config), "weights_sha256 of 'd' run '1' was")
