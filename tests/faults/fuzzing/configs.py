"""Configs with every field, and changes of their lines."""

import random
from functools import cache
from pathlib import Path

from fuzzing.mutations import Outcome, check_error

EVERY_FIELD = """
name = "full"
seed = 3
[data]
manifest = "faces/manifest.csv"
split = "test"
positive = "fake"
sample = {camera = 3, gan = 4}
classes = ["real", "fake"]
max_pixels = 1000000
allowed_quarantine = 0.05
[[detectors]]
name = "one"
architecture = "timm:resnet50"
checkpoints = ["weights/*.safetensors", "more/a.pth"]
layer = "layer4"
input_size = [224, 160]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
[[detectors]]
name = "two"
architecture = "torchvision:densenet121"
random_runs = 2
input_size = 96
[salience]
method = "gradcam"
target = "predicted"
[measures]
entropy = true
noise = [{kind = "salt_pepper", levels = [0.05, 0.1]}, {kind = "gaussian", levels = [20]}]
resilience = true
focus = false
stability = true
similarity = ["ssim", "pearson"]
[summary]
bootstrap = 100
[report]
after_run = false
images = 3
colormap = "jet"
[compute]
device = "cuda:1"
precision = "bfloat16"
batch_size = 8
shard_size = 64
workers = 2
threads = 1
[training]
architectures = ["timm:resnet18"]
runs = 2
manifest = "train.csv"
split = "train"
validation_share = 0.1
sample = 100
pretrained = true
input_size = 224
epochs = 3
batch_size = 4
class_balance = "weights"
monitor = "auroc"
patience = 2
checkpoint = "last"
devices = 1
loaders = 2
loggers = ["tensorboard"]
[[training.strategies]]
name = "cyborg"
loss = "cyborg"
alpha = 0.3
cam_class = "true"
entropy_weight = 0.1
salience = "mean-of:maps"
[training.optimizer]
name = "adamw"
learning_rate = 1e-3
momentum = 0.8
weight_decay = 0.01
schedule = "cosine"
step_epochs = 2
step_factor = 0.5
warmup_epochs = 1
gradient_clip = 1.0
[training.augmentation]
flip = true
crop = 0.8
shift = 0.1
"""


ABSURD = (
    *("1", "2", "8", "0.5", "0.25", '"fake"', '"cpu"', "[0.5]", "[96, 96]", "false"),
    *("nan", "inf", "-inf", "-0.0", "1e999", "-1", "0", "1e-320", "true", "[]", "{}", '""', "''", "1979-05-27T07:32:00Z"),
    *("07:32:00", "0xffffffffffffffffffffff", "9" * 30, "9" * 5000, "-" + "9" * 4400, "0x" + "f" * 6000, "1e" + "9" * 400),
    *("[" * 50 + "]" * 50, "[" * 400 + "]" * 400, "[" * 20000, "{a=" * 60 + "1" + "}" * 60, "{a=" * 3000, "[[[[{a=[{b=1}]}]]]]"),
    *('"\\u0000"', '"\\u001b[2J"', '"\\U0001F600"', '"\\ud800"', '"' + "x" * 50000 + '"', '"' + "../" * 300 + '"', '"/dev/zero"'),
    *("[1" + ",1" * 20000 + "]", '["a"' + ',"a"' * 2000 + "]", "[[1,2],[3,4]]", "[nan]", "[0x" + "f" * 6000 + "]"),
    *('"cuda:' + "9" * 5000 + '"', '"cuda:٣"', '"mean-of:\\u0000"', '"timm:' + "x" * 3000 + '"', '{kind="gaussian",levels=[1e308]}'),
    *("{" + ",".join(f"k{i}=1" for i in range(3000)) + "}", '"""\n\n"""', "1__0", "+.5", "0b2", "\x00", "\ufeff", "'''"),
)  # fmt: skip


KEYS = (
    *("data", "name", "x", '""', "'\u200b'", '"\\u0000"', "a" * 60000, ".".join("a" * 5000), ".".join("a" * 100_000), "a.b.c", "detectors", "seed"),
    *("training", "training.strategies", "measures.noise", "compute", "data.sample", '"data.manifest"', "__class__"),
)  # fmt: skip


@cache
def configs() -> tuple[bytes, ...]:
    """The examples, and one config with every field."""
    examples = Path(__file__).resolve().parents[3] / "examples"
    return (*(path.read_bytes() for path in sorted(examples.glob("*.toml"))), EVERY_FIELD.encode())


def change_config(data: bytes, rng: random.Random) -> bytes:
    """Another value, another key, or another table."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        number = rng.randrange(len(lines))
        key, equals, value = lines[number].partition("=")
        kind = rng.randrange(6)
        if kind <= 2 and equals:
            lines[number] = f"{key}= {rng.choice(ABSURD)}"
        elif kind == 3:
            lines[number] = f"{rng.choice(KEYS)} {equals or '='} {value or '1'}"
        elif kind == 4:
            lines.insert(number, rng.choice((f"[{rng.choice(KEYS)}]", f"[[{rng.choice(KEYS)}]]", rng.choice(lines))))
        else:
            lines[number] = rng.choice(("", f"{rng.choice(KEYS)} = {rng.choice(ABSURD)}", lines[number] * 2))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def random_sets(rng: random.Random) -> list[str]:
    """What stands behind --set, often nothing."""
    names = ("seed", "name", "data.manifest", "data.sample", "measures.noise.levels", "measures.noise.0.kind")
    names += ("detectors.0.input_size", "detectors.checkpoints", "compute.device", "training.strategies.alpha", "")
    names += (
        "training.optimizer",
        "measures",
        "a" * 3000,
        ".".join("ab" * 3000),
        "detectors." + "9" * 5000,
        "detectors.²",
    )
    return [
        rng.choice(
            (f"{rng.choice(names)}={rng.choice(ABSURD)}", rng.choice(ABSURD), f"{rng.choice(names)}={rng.random()}")
        )
        for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))
    ]


def read_config(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    from explain2me.config.compare import digest, fingerprint
    from explain2me.config.load import load_config, override
    from explain2me.errors import ConfigError

    path = folder / "config.toml"
    path.write_bytes(data)
    try:
        config = load_config(path, random_sets(rng))
        digest(fingerprint(override(config, random_sets(rng))))
    except ConfigError as error:
        check_error(error)
        text = str(error)
        kinds = (
            "not valid TOML",
            "UTF-8",
            "--set",
            "unknown key",
            "unknown value",
            "is missing",
            "input should",
            "expected",
        )
        return next((kind for kind in kinds if kind in text), "other")
    return "accepted"
