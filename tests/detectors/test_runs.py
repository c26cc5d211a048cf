"""The training runs of a detector, from the pattern of their checkpoints."""

import shutil

import pytest

from explain2me.config.load import load_config
from explain2me.config.schema import DetectorConfig
from explain2me.detectors.runs import weights_of
from explain2me.errors import Explain2MeError
from explain2me.stages.check import check


def test_no_run_has_the_name_of_the_mean_over_runs(tmp_path, weights):
    for i, name in enumerate(("all", "seed1")):
        shutil.copy(weights / f"seed{i}.safetensors", tmp_path / f"{name}.safetensors")
    wanted = DetectorConfig(name="d", architecture="timm:test_resnet", checkpoints=str(tmp_path / "*.safetensors"))
    assert [name for name, *_ in weights_of(wanted, 0)] == ["run00", "run01"]
    alone = wanted.model_copy(update={"checkpoints": str(tmp_path / "seed*.safetensors")})
    assert [name for name, *_ in weights_of(alone, 0)] == ["seed1"]


def test_the_same_weights_twice_are_refused(tmp_path, weights, write_config, detector_table):
    for name in ("best", "last"):
        shutil.copy(weights / "seed0.safetensors", tmp_path / f"{name}.safetensors")
    config = load_config(write_config(detectors=detector_table("a", f"{tmp_path}/*.safetensors")))
    with pytest.raises(Explain2MeError, match=r"best\.safetensors' and .*last\.safetensors' hold the same weights"):
        check(config)


@pytest.mark.parametrize(("pattern", "count"), [("seed*.safetensors", 3), ("seed0.safetensors", 1)])
def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path, weights, images, detector_table, pattern, count):
    folder = tmp_path / "ex[1]"
    shutil.copytree(weights, folder / "weights")
    text = f'name = "tiny"\n{detector_table("a", f"weights/{pattern}")}[data]\nmanifest = "{images}"\n'
    (folder / "config.toml").write_text(text + "[measures]\nstability = false\n")
    _, record = check(load_config(folder / "config.toml"))
    assert len(record["models"]) == count
