from pathlib import Path

import pytest

from explain2me.config.compare import fingerprint
from explain2me.config.load import load_config, override, parse_config
from explain2me.config.schema import Config
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
    only = override(config, ['measures.noise.0={kind="gaussian", levels=[3.0]}'])
    assert [noise.kind for noise in only.measures.noise] == ["gaussian"]
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
        ("data.classes=[real,fake]", 'data.classes: must be a list, such as [1, 2] or ["a", "b"] (behind --set'),
        ("data=1", "data: input should be a valid dictionary or instance of DataConfig, got 1"),
        ("seed.x=1", "seed is a value, not a table"),
        ("measures.noise.levels.0.x=1", "measures.noise.levels.0 is a value, not a table"),
        ("data.sample=-3", "config: data.sample: input should be greater than or equal to 1, got -3"),
        (
            "detectors.0.input_size=5",
            "config: detectors.0.input_size: input should be greater than or equal to 8, got 5",
        ),
        ("measures.noise.levels.x.y=1", "'x' is not an index of a list of 1; give a number below 1"),
        ("detectors.0.input_size=0", "input should be greater than or equal to 8, got 0"),
        ("detectors.0.input_size=[224,1000000]", "input should be less than or equal to 4096, got 1000000"),
        ("detectors.0.mean=[0,0,nan]", "should be a finite number"),
        ("compute.device='cuda:" + "9" * 1900 + "'", "expected auto, cpu, cuda, cuda:N or mps, got 'cuda:999"),
        ("seed=0x1" + "0" * 16, "seed: expected a number below 2^64, got one of 65 bits; give a smaller one"),
        ("seed=" + "9" * 5000, "the value cannot be read: Exceeds the limit (4300 digits)"),
        ("data.sample=[0x" + "f" * 6000 + "]", "expected a number below 2^64, got one of 24000 bits"),
        ("name=" + "[" * 5000, "the value cannot be read: maximum recursion depth"),
        ("name=" + "[" * 30 + "]" * 30, "name: input should be a valid string"),
        ("a." * 30 + "a=1", "unknown key 'a'"),
        ("data.split={" + "a." * 30 + "a=1}", "data.split: input should be a valid string"),
        ("detectors.0.input_size.x=1", "detectors.0.input_size: input should be"),
        ("detectors." + "9" * 1000 + ".layer=1", "unknown key 'detectors.0.999999"),
        ('data.manifest="a\\u0000b"', "data.manifest: 'a\\x00b' holds a NUL character; take it out"),
        ('data.sample={"a\\u0000" = 1}', "data.sample: 'a\\x00' holds a NUL character"),
        ("x" * 5000, "expected key=value, e.g. compute.batch_size=16, got 'xxx"),
        ("x" * 1000 + "=1", "unknown key 'xxx"),
        ("x" * 5000 + "=1", "unknown key 'xxx"),
        ("a." * 900 + "a=1", "nested too deep"),
        ("data.split=" + "[" * 400 + "]" * 400, "data.split: input should be a valid string"),
        ("data.split=" + "x" * 2**16, "65547 characters, expected at most 65536"),
        ("data.classes=[{}" + ",{}" * 5000 + "]", "and 4993 more"),
        ("nonsense", "expected key=value, e.g. compute.batch_size=16, got 'nonsense'"),
    ],
    ids=lambda value: value[:40] if "=" in value else "",
)
def test_wrong_values_are_named(config_file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [change])
    assert message in str(error.value)
    assert "constrained" not in str(error.value)
    assert "dictionary, got -3" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name = ", "is not valid TOML"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b'name = "x"', "data is missing; add it"),
        (b"a = " + b"9" * 5000, "is not valid TOML: Exceeds the limit (4300 digits)"),
        (b".".join([b"a"] * 10_000) + b" = 1", "config: tables or arrays are nested too deep"),
        (b'"a" . ' * 30 + b"a = 1", "unknown key 'a'"),
        (b"#" * (2**16 + 1), "is larger than 65536 bytes; give a TOML file"),
        (b"x = [" + b"1," * 30_000 + b"]", "unknown key 'x'"),
        (b"".join(b"[a%d]\nb.c.d = {e = 1}\n" % i for i in range(100)), "and 94 more"),
    ],
)
def test_wrong_files_are_named(config_file: Path, text: bytes, message: str) -> None:
    config_file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        load_config(config_file)
    assert message in str(error.value)


@pytest.mark.parametrize("index", ["²", "2", "9" * 5000, "-1"], ids=lambda index: index[:5])
def test_only_a_place_in_the_list_is_an_index(config_file: Path, index: str) -> None:
    config_file.write_text(DESIGN.replace("levels = [0.05]}", "levels = [0.05, 0.1]}"))
    for key in (f"measures.noise.levels.{index}=1", f"measures.noise.levels.{index}.x=1"):
        with pytest.raises(ConfigError, match="is not an index of a list of 2"):
            load_config(config_file, [key])


def test_a_device_is_no_config() -> None:
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        load_config(Path("/dev/zero"))


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


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"alpha": 0.3}, "alpha = 0.3 is for loss = 'cyborg', and the loss is 'cross-entropy'"),
        ({"salience": "mean-of:maps"}, "salience = .* set loss = 'cyborg', or remove salience"),
        ({"cam_class": "true"}, "cam_class = 'true' is for loss = 'cyborg' or an entropy_weight"),
        ({"entropy_weight": 0.1, "cam_class": "true"}, None),
        ({"alpha": 0.5, "salience": "manifest"}, None),  # as a config that was written out says
        ({"name": "x" * 95}, "printable characters"),
    ],
)
def test_a_strategy_that_would_ignore_what_it_says_is_refused(strategy, message):
    training = {"architectures": ["timm:resnet18"], "strategies": [{"name": "cyborg"} | strategy]}
    tree = {"name": "study", "data": {"manifest": "m"}, "training": training}
    if message is None:
        parse_config(tree)
    else:
        with pytest.raises(ConfigError, match=message):
            parse_config(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": {"similarity": ["ssim", "ssim"]}}, "expected different names, got 'ssim' twice"),
        (
            {"data": {"manifest": "m", "classes": ["real", "fake", "real"]}},
            "expected different names, got 'real' twice",
        ),
        ({"detectors": [{"name": "d", "architecture": "timm:x", "checkpoints": []}]}, "checkpoints"),
    ],
)
def test_repeats_and_empty_lists_are_refused(change, message):
    tree = {
        "name": "x",
        "data": {"manifest": "m"},
        "detectors": [{"name": "d", "architecture": "timm:x", "random_runs": 2}],
    }
    parse_config(tree)
    with pytest.raises(ConfigError, match=message):
        parse_config(tree | change)


def test_labels_may_be_numbers_and_booleans(config_file: Path) -> None:
    data = load_config(config_file, ["data.positive=1", "data.classes=[0, 1.0, true]"]).data
    assert (data.positive, data.classes) == ("1", ("0", "1", "True"))
    assert load_config(config_file, ['data.positive="nan"']).data.positive == "nan"
