"""The loggers that a training can have beside its CSV file, each with the real library, without a network."""

import pickle
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.errors import ConfigError
from explain2me.train.loggers import open_loggers
from explain2me.train.loop import train_detector
from explain2me.train.study import plan_study

EPOCHS = 3
STEPS = 2
LOG_BLOCK = 32 * 1024

pytestmark = pytest.mark.filterwarnings("ignore", "error:.* did not take epoch")  # but for ours, those of the libraries


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = "path,label,source,split\n"
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines += f"{i}.png,{('real', 'fake')[i % 2]},camera,{'train' if i < 8 else 'val' if i < 12 else 'test'}\n"
    (folder / "manifest.csv").write_text(lines)
    return folder / "manifest.csv"


def make_config(manifest: Path, logger: str) -> Config:
    training = {
        "architectures": ["timm:test_resnet"],
        "strategies": [{"name": "plain"}],
        "split": "train",
        "validation_split": "val",
        "runs": 2,
        "input_size": 64,
        "epochs": EPOCHS,
        "batch_size": 4,
        "device": "cpu",
        "optimizer": {"learning_rate": 0.01},
        "loggers": [logger],
    }
    return parse_config(
        {"name": "our study", "data": {"manifest": str(manifest), "split": "test"}, "training": training}
    )


def train_both(manifest: Path, logger: str, out: Path) -> list[Path]:
    """Two trainings in one process, the first of them interrupted in its second epoch and continued at the end."""
    first, second = plan_study(make_config(manifest, logger), out).trainings

    def stop(done: int, total: int, text: str) -> None:
        if done == STEPS + 1:
            raise Stop

    with pytest.raises(Stop):
        train_detector(first, stop)
    train_detector(second)
    train_detector(first)
    return [first.folder, second.folder]


def losses(folder: Path) -> list[float]:
    """What the CSV file says, to the precision of float32."""
    names, *lines = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    return pytest.approx([float(line[names.index("train_loss")]) for line in lines], rel=1e-6)


def test_tensorboard(manifest, tmp_path):
    for folder in train_both(manifest, "tensorboard", tmp_path):
        assert logged(folder) == (losses(folder), [1, 2, 3])
        assert "learning_rate: 0.01" in (folder / "tensorboard" / "hparams.yaml").read_text()


def logged(folder: Path) -> tuple[list[float], list[int]]:
    """Losses and steps that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train_loss")
    return [event.value for event in events], [event.step for event in events]


def test_mlflow_continues_the_run_of_an_interrupted_training(manifest, tmp_path):
    from mlflow.tracking import MlflowClient

    folders = train_both(manifest, "mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("our study")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == ["test_resnet-plain-run00", "test_resnet-plain-run01"]
    for name, folder in zip(sorted(found), folders, strict=True):
        run = found[name]
        assert [point.value for point in client.get_metric_history(run.info.run_id, "train_loss")] == losses(folder)
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2, 3]
        assert (run.info.status, run.data.params["training/optimizer/learning_rate"]) == ("FINISHED", "0.01")


def test_mlflow_writes_where_its_environment_says(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    train_detector(plan_study(make_config(manifest, "mlflow"), tmp_path / "out").trainings[0])
    from mlflow.tracking import MlflowClient

    assert MlflowClient(f"sqlite:///{tmp_path / 'server.db'}").get_experiment_by_name("faces")
    assert not (tmp_path / "out" / "mlflow.db").exists()


def test_wandb_tells_trainings_apart_and_continues_an_interrupted_one(manifest, tmp_path):
    folders = train_both(manifest, "wandb", tmp_path)
    runs = [
        sorted({path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")})
        for folder in folders
    ]
    assert [len(names) for names in runs] == [1, 1]
    assert runs[0] != runs[1]
    assert [logged_losses(folder) for folder in folders] == [losses(folder) for folder in folders]


def logged_losses(folder: Path) -> list[float]:
    """From the files that `wandb sync` uploads, in the order of their time."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits until they are written
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    records = [Record.FromString(record) for path in files for record in log_records(path.read_bytes())]
    items = [item for record in records if record.HasField("history") for item in record.history.item]
    return [float(item.value_json) for item in items if "train_loss" in (item.key, *item.nested_key)]


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB, over whose ends a record goes in parts with a header each.

    W&B puts seven bytes of its own before the first record. A block's last bytes are zeros where no header fits.
    """
    assert content.startswith(b":W&B")
    record, at = b"", 7
    while at + 7 <= len(content):
        if LOG_BLOCK - at % LOG_BLOCK < 7:
            at += LOG_BLOCK - at % LOG_BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
    assert not record


def test_a_training_that_begins_anew_is_logged_anew(manifest, tmp_path):
    training = plan_study(make_config(manifest, "tensorboard"), tmp_path).trainings[0]

    def stop(done: int, total: int, text: str) -> None:
        if done == STEPS + 1:
            raise Stop

    with pytest.raises(Stop):
        train_detector(training, stop)
    (training.folder / "resume.ckpt").unlink()
    train_detector(training)
    assert logged(training.folder) == (losses(training.folder), [1, 2, 3])


def test_a_service_that_fails_later_ends_no_training(manifest, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import TensorBoardLogger

    def fail(self, metrics, step):
        raise OSError("no route to host\nand so on")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fail)
    training = plan_study(make_config(manifest, "tensorboard"), tmp_path).trainings[0]
    with pytest.warns(UserWarning, match=r"TensorBoardLogger did not take epoch \d: no route to host$"):
        train_detector(training)
    assert training.done


def test_a_logger_that_is_not_installed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"'wandb' needs a package that is not installed \(.+\); install it"):
        train_detector(plan_study(make_config(manifest, "wandb"), tmp_path).trainings[0])


def test_a_logger_that_does_not_start(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"'mlflow' does not start \(.+\); mend that, or remove it from the list"):
        train_detector(plan_study(make_config(manifest, "mlflow"), tmp_path / "out").trainings[0])


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_can_be_sent_to_the_processes_of_several_devices(kind, tmp_path):
    folder = tmp_path / "training" / "detector" / "run00"
    folder.mkdir(parents=True)
    with open_loggers(
        (kind,), folder, project="our study", name="one", settings={"a": {"b": 1}}, continues=True
    ) as loggers:
        assert pickle.loads(pickle.dumps(loggers))


def test_mlflow_begins_one_database_for_trainings_side_by_side(tmp_path):
    folders = [tmp_path / "training" / "detector" / f"run{i:02d}" for i in range(3)]

    def begin(folder: Path) -> None:
        with open_loggers(("mlflow",), folder, project="our study", name=folder.name, settings={}, continues=True):
            pass

    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(begin, folders))
    assert len({(folder / "loggers.json").read_text() for folder in folders}) == 3
