"""`explain2me study`, from its check to its report."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explain2me.cli.entry import main


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
        patched.setattr("explain2me.train.loop.log_epoch", interrupt)
        patched.setattr("sys.argv", ["explain2me", "study", config, "--out", out])
        with pytest.raises(SystemExit, match="130"):
            main()
    assert "continues after" not in capsys.readouterr().out
    said = call("study", config, "--out", out)
    assert said.count("continues after") == said.count("test_resnet-plain run 1 continues after epoch 1 of 2\n") == 1
    assert "Measures over all images" in said
    assert (tmp_path / "out" / "run" / "report" / "index.html").exists()
    assert "What the numbers say\n" in said
    assert (
        "few training runs: 2 training runs of each detector: so few runs make the interval of a score too narrow"
        in said
    )
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
    swapped = "its weights were trained with the classes real, fake in the order of the logits (says the card beside them), but fake, real are"
    assert swapped not in call("check", again)
    other_order = ["--set", 'data.classes=["fake", "real"]']
    assert f'{swapped} used; set data.classes = ["real", "fake"]' in call("check", again, *other_order)
    said = call("explain", again, "--out", str(tmp_path / "swapped"), *other_order)
    assert swapped in " ".join(said.split())

    monkeypatch.setattr("sys.argv", ["explain2me", "show", out])
    with pytest.raises(SystemExit):
        main()
    assert f"it has no run.json; give '{out}/run'" in capsys.readouterr().err
