from pathlib import Path

import pytest

from explain2me.config import Config, fingerprint, load_config, override
from explain2me.errors import ConfigError

DESIGN = """
name = "faces"
seed = 7
[data]
manifest = "faces/manifest.csv"
split = "test"
positive = "fake"
[[detectors]]
name = "resnet50-xent"
architecture = "timm:resnet50"
checkpoints = "weights/resnet50-xent/*.safetensors"
[salience]
method = "gradcam"
[measures]
noise = {kind = "salt_pepper", levels = [0.05]}
resilience = true
focus = true
entropy = true
stability = true
[compute]
device = "auto"
precision = "float32"
batch_size = 32
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(DESIGN)
    return path


def test_the_config_of_the_design_loads_and_its_paths_are_relative_to_the_file(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.data.manifest == str(config_file.parent / "faces/manifest.csv")
    assert config.detectors[0].checkpoints == str(config_file.parent / "weights/resnet50-xent/*.safetensors")
    assert config.measures.noise[0].levels == (0.05,)
    assert config.compute.batch_size == 32


def test_sets_change_one_field_each(config_file: Path) -> None:
    config = load_config(
        config_file, ["measures.noise.levels=[0,0.1]", "compute.batch_size=4", "detectors.0.layer=layer4", "name=other"]
    )
    assert config.measures.noise[0].levels == (0.0, 0.1)
    assert (config.compute.batch_size, config.detectors[0].layer, config.name) == (4, "layer4", "other")
    assert override(config, ["measures.noise=false"]).measures.noise == ()
    assert override(config, ["measures.similarity=spearman"]).measures.similarity == ("spearman",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("measures.niose=true", "unknown key 'measures.niose': did you mean 'noise'?"),
        ("computr.batch_size=1", "unknown key 'computr': did you mean 'compute'?"),
        ("compute.batch_size='a'", "compute.batch_size: input should be a valid integer, got 'a'"),
        ("compute.batch_size=0", "compute.batch_size: input should be greater than or equal to 1, got 0"),
        ("compute.precision='float16'", "unknown value 'float16'; did you mean 'bfloat16' or 'float32'?"),
        ("compute.device='gpu'", "expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("measures.noise.kind='salt_peper'", "unknown value 'salt_peper'; did you mean 'salt_pepper'?"),
        ("measures.noise.levels=[0.1,0.1]", "expected different levels, got [0.1, 0.1]"),
        ("measures.noise.levels=[2]", "expected levels in [0, 1] for salt_pepper, got 2.0"),
        ("measures.noise.levels=[nan]", "should be a finite number"),
        ("measures.similarity=['ssmi']", "unknown value 'ssmi'; did you mean 'ssim'?"),
        ("salience.method='gradcm'", "unknown value 'gradcm'; did you mean 'gradcam'?"),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("name='../up'", "expected 1 to 100 printable characters"),
        ("detectors.0.pretrained=true", "expected exactly one of checkpoints, pretrained = true, random_runs; got 2"),
        ("detectors=[]", "config: detectors is missing; add one or more tables [[detectors]]"),
        ("data=1", "data: input should be a valid dictionary or instance of DataConfig, got 1"),
        ("seed.x=1", "seed is a value, not a table"),
        ("nonsense", "expected key=value, e.g. compute.batch_size=16, got 'nonsense'"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_wrong_values_are_named(config_file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [change])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name = ", "is not valid TOML"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b'name = "x"', "data is missing; add it"),
    ],
)
def test_wrong_files_are_named(config_file: Path, text: bytes, message: str) -> None:
    config_file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        load_config(config_file)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.toml")


def test_two_detectors_of_one_name_are_refused(config_file: Path) -> None:
    table = DESIGN[DESIGN.index("[[detectors]]") : DESIGN.index("[salience]")]
    config_file.write_text(DESIGN + table)
    with pytest.raises(ConfigError, match="'resnet50-xent' twice"):
        load_config(config_file)


def test_the_fingerprint_ignores_what_does_not_change_maps(config_file: Path) -> None:
    config = load_config(config_file)
    same = override(config, ["measures.similarity=spearman", "summary.bootstrap=9", "compute.workers=3", "name=x"])
    other = override(config, ["measures.noise.levels=[0.1]"])
    assert fingerprint(same) == fingerprint(config)
    assert fingerprint(other) != fingerprint(config)
    assert Config.model_validate_json(config.model_dump_json(), strict=False) == config
