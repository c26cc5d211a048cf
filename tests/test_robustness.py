"""What must not be mixed, lost or counted twice when things go wrong around a run."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from explain2me.cli.entry import main
from explain2me.config.load import load_config, parse_config
from explain2me.config.schema import Config, DetectorConfig
from explain2me.config.training import TrainingConfig
from explain2me.detectors.runs import weights_of
from explain2me.errors import Explain2MeError, ManifestError, RunFolderError
from explain2me.images.listing import list_images
from explain2me.report import write_report
from explain2me.report.terminal import show_run
from explain2me.run import files
from explain2me.run.conditions import conditions_for
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run
from explain2me.run.packs import read_parquet
from explain2me.run.parts import read_part
from explain2me.run.plan import plan
from explain2me.run.record import Model
from explain2me.stages import index
from explain2me.stages.begin import begin_run
from explain2me.stages.explain import explain_run
from explain2me.stages.index import IndexChunk, _record_crash, forget_chunks, index_run
from explain2me.stages.measure import MapReader, measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run
from explain2me.statistics.chance import partners
from explain2me.workers import Engine, run_tasks
from explain2me.workers.device import with_device


@pytest.mark.parametrize(
    "noise",
    [
        [{"levels": [0.05]}, {"levels": [0.1, 0.05]}],
        [{"levels": [0.05, 0.0500000000000001]}],
    ],
    ids=["two tables", "one name"],
)
def test_the_same_noise_twice_is_refused(noise):
    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": "m"},
            "detectors": [{"name": "d", "architecture": "timm:x", "random_runs": 1}],
            "measures": {"noise": noise},
        }
    )
    with pytest.raises(Explain2MeError, match=r"different conditions, got 'salt_pepper@0\.05' twice"):
        conditions_for(config.measures, (64, 64))


def test_levels_that_differ_little_are_two_conditions():
    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": "m"},
            "detectors": [{"name": "d", "architecture": "timm:x", "random_runs": 1}],
            "measures": {"noise": {"levels": [0.05, 0.05000001]}},
        }
    )
    names = [condition.name for condition in conditions_for(config.measures, (64, 64))]
    assert {"salt_pepper@0.05", "salt_pepper@0.05000001"} <= set(names)


def small_config(folder: Path, manifest: Path, detectors: str, *, shard_size: int) -> Config:
    """Of a small run on a CPU, as a file has it."""
    text = (
        f'name = "tiny"\n{detectors}[data]\nmanifest = "{manifest}"\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n'
    )
    text += f'[compute]\ndevice = "cpu"\nbatch_size = 8\nshard_size = {shard_size}\n'
    (folder / "config.toml").write_text(text)
    return load_config(folder / "config.toml")


@pytest.fixture(scope="module")
def explained(tmp_path_factory, images, weights, detector_table):
    folder = tmp_path_factory.mktemp("robust")
    run = explain_run(
        small_config(folder, images, detector_table("a", f"{weights}/seed[01].safetensors"), shard_size=10),
        folder / "run",
    )
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


@pytest.mark.parametrize("damage", ["row doubled", "row lost", "images moved", "conditions moved"])
def test_a_part_that_is_not_whole_is_never_reshaped(explained, tmp_path, damage):
    table = read_parquet(plan(explained)[0].path(explained.folder))
    count = len(table)
    rows = {
        "row doubled": [0, *range(count)],
        "row lost": list(range(count - 1)),
        "images moved": [1, 0, *range(2, count)],
        "conditions moved": [*range(count // 2, count), *range(count // 2)],
    }[damage]
    write_parquet(table.take(rows), tmp_path / "part.parquet")
    with pytest.raises(RunFolderError, match="does not hold each image once for each of its 16 conditions"):
        read_part(tmp_path / "part.parquet")


def test_a_file_that_was_being_written_is_taken_for_nothing(explained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(explained.folder, folder)
    model = explained.models[0].name
    left = [folder / where / ".tmp-x.tmp" for where in ("quarantine", "scores", "summary", f"maps/model={model}", ".")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    run = explain_run(explained.config, folder)
    measure_run(run, run.config)
    summarise_run(run, run.config)
    assert all(path.exists() for path in left)  # another process may be at it
    names = sorted(str(path.relative_to(folder)) for path in left)
    assert verify_run(run) == [f"left over: {name}, by a process that was stopped" for name in names]
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    explain_run(explained.config, folder)
    assert not any(path.exists() for path in left)


def test_a_shard_without_any_usable_image_is_a_part_without_rows(tmp_path, make_images, weights, detector_table):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 5, ("real", "b"): 4})
    config = small_config(tmp_path, manifest, detector_table("a", f"{weights}/seed[01].safetensors"), shard_size=4)
    last = manifest.parent / "real" / "b" / "003.png"
    vanished = last.read_bytes()

    def on_start(*_):
        last.unlink()

    run = explain_run(config, tmp_path / "run", on_start=on_start)
    for _ in range(2):
        measure_run(run, run.config)
        summarise_run(run, run.config)
    assert verify_run(run) == []
    assert len(run.quarantine()) == 2  # models
    assert len(run.scores().filter(pa.compute.equal(run.scores()["image"], 8))) == 0
    # the file comes back, the part is made anew: its quarantine goes
    last.write_bytes(vanished)
    for shard in plan(run):
        if shard.part == 2:
            shard.path(run.folder).unlink()
    again = explain_run(config, tmp_path / "run")
    assert len(again.quarantine()) == 0
    assert verify_run(again) == []


def compared_without(gone: Callable[[Model], bool], tmp_path: Path, make_images, weights, detector_table) -> Run:
    """Two detectors of two runs; a disk was lost before the shards of some of these were made."""
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 6, ("real", "b"): 6})
    tables = "".join(detector_table(name, f"{weights}/seed[01].safetensors") for name in ("a", "b"))
    config = small_config(tmp_path, manifest, tables, shard_size=4)
    run = explain_run(config, tmp_path / "run")
    for path in [path for model in run.models if gone(model) for path in run.part_paths(model)]:
        path.unlink()
    (manifest.parent / "fake").rename(tmp_path / "fake")
    (manifest.parent / "real").rename(tmp_path / "real")
    run = explain_run(config, tmp_path / "run")
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


@pytest.mark.parametrize("gone", ["a", "b"], ids=["the first", "the last"])
def test_a_detector_without_any_usable_image_does_not_take_the_others_with_it(
    tmp_path, make_images, weights, detector_table, gone
):
    run = compared_without(lambda model: model.detector == gone, tmp_path, make_images, weights, detector_table)
    other = "b" if gone == "a" else "a"
    rows = run.summary("performance").to_pandas()
    assert set(rows.detector) == {other}
    assert not rows[rows.run == "all"].auroc.isna().any()
    differences = run.summary("differences").to_pandas()
    aurocs = differences[differences.measure == "auroc"]
    assert len(aurocs)
    assert aurocs.difference.isna().all()
    assert set(aurocs["num_runs" if gone == "a" else "num_other_runs"]) == {0}
    show_run(run, Console(file=io.StringIO()))
    page = write_report(run, run.config).read_text()
    assert f"There is no AUROC of {gone}: no run of it has finite logits for images of both classes." in page
    assert f"There is no AUROC of {other}" not in page
    assert f"There is no entropy of {gone}" in page


def test_a_run_without_any_usable_image_is_in_no_mean(tmp_path, make_images, weights, detector_table):
    def gone(model: Model) -> bool:
        return (model.detector, model.run) == ("a", "seed0")

    run = compared_without(gone, tmp_path, make_images, weights, detector_table)
    rows = (
        run.summary("performance").to_pandas().query("detector == 'a' and condition == 'clean' and score == 'softmax'")
    )
    rows = rows[(rows.positives == "all") & (rows.negatives == "all")].set_index("run")
    assert np.isnan(rows.auroc["seed0"])
    for column in ("auroc", "accuracy", "n", "num_positive", "num_invalid", "ci_low", "ci_high"):
        assert rows[column]["all"] == rows[column]["seed1"], column
    differences = run.summary("differences").to_pandas().query("measure == 'auroc' and label == 'all'")
    assert set(zip(differences.num_runs, differences.num_other_runs, strict=True)) == {(1, 2)}
    assert not differences.difference.isna().any()


def test_a_disk_that_is_gone_empties_no_shard(tmp_path, make_images, weights, detector_table):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 10, ("real", "b"): 10})
    config = small_config(tmp_path, manifest, detector_table("a", f"{weights}/seed[01].safetensors"), shard_size=10)

    def lose(*_):
        for name in ("fake", "real"):
            (manifest.parent / name).rename(tmp_path / name)

    with pytest.raises(Explain2MeError, match=r"10 of the 10 images of a shard were there .* is their disk there\?"):
        explain_run(config, tmp_path / "run", on_start=lose)
    for name in ("fake", "real"):
        (tmp_path / name).rename(manifest.parent / name)
    run = explain_run(config, tmp_path / "run")
    measure_run(run, run.config)
    summarise_run(run, run.config)
    assert verify_run(run) == []
    assert len(run.quarantine()) == 0
    assert set(run.maps(["image"])["image"].to_pylist()) == set(range(20))


def test_a_gpu_without_memory_left_is_one_line(tmp_path, make_images, weights, detector_table, monkeypatch):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2})
    config = small_config(tmp_path, manifest, detector_table("a", f"{weights}/seed[01].safetensors"), shard_size=4)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    monkeypatch.setattr("explain2me.stages.shard._explain", fail)
    with pytest.raises(Explain2MeError, match=r"^CUDA out of memory; what is committed stays\. .* compute\.batch_size"):
        explain_run(config, tmp_path / "run")


def test_what_ended_workers_were_writing_is_removed(tmp_path, make_images, weights, detector_table, monkeypatch):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2})
    config = small_config(tmp_path, manifest, detector_table("a", f"{weights}/seed[01].safetensors"), shard_size=4)
    code = "import os, signal; from explain2me.run.leftovers import temporary_prefix\n"
    code += "print(temporary_prefix(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    worker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    half = tmp_path / "run" / "maps" / f"{worker.stdout.strip()}0.tmp"

    def end(*_, **__):
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        raise OSError("No space left on device")
        yield

    monkeypatch.setattr("explain2me.stages.explain.run_tasks", end)
    with pytest.raises(OSError, match="No space"):
        explain_run(config, tmp_path / "run")
    assert not half.exists()


def test_a_machine_that_is_at_the_index_when_another_begins_the_run_goes_on(tmp_path, make_images, monkeypatch):
    source = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2}, size=64)
    folder, images = tmp_path / "run", list_images(source)
    sync = files._sync
    begun: list[Path] = []

    def other_machine(path: Path) -> None:
        sync(path)
        if path.parent != folder / "index":
            return
        (folder / "run.json").write_text("{}")
        forget_chunks(folder)
        begun.append(path)

    monkeypatch.setattr(files, "_sync", other_machine)  # after the chunk was written, before it gets its name
    assert index_run(images, source, folder, Engine(), max_pixels=10**6) is None
    assert begun
    (folder / "run.json").unlink()
    monkeypatch.setattr(files, "_sync", lambda path: shutil.rmtree(folder / "index", ignore_errors=True))
    with pytest.raises(FileNotFoundError):  # nobody has begun it: something else removes files
        index_run(images, source, folder, Engine(), max_pixels=10**6)


def test_a_machine_at_the_index_when_another_found_no_usable_image_finds_so_itself(tmp_path, make_images, monkeypatch):
    source = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2}, size=64)
    folder, images = tmp_path / "run", list_images(source)
    sync, removed = files._sync, []

    def other_machine(path: Path) -> None:
        sync(path)
        if not removed and path.parent == folder / "index":
            removed.append(path)
            forget_chunks(folder)

    for path in images["path"].to_pylist():
        (source.parent / path).write_bytes(b"")
    monkeypatch.setattr(files, "_sync", other_machine)
    usable, refused = index_run(images, source, folder, Engine(), max_pixels=10**6)
    assert removed
    assert (len(usable), len(refused)) == (0, 4)


def test_the_index_of_a_run_that_another_machine_begins_may_go_at_any_moment(tmp_path, make_images, monkeypatch):
    source = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2}, size=64)
    folder, images = tmp_path / "run", list_images(source)

    def begun(*_, **__):
        (folder / "run.json").write_text("{}")
        forget_chunks(folder)
        raise FileNotFoundError(folder / "index")

    for name in ("read_parquet", "write_parquet"):
        with monkeypatch.context() as patch:
            patch.setattr(f"explain2me.stages.index.{name}", begun)
            assert index_run(images, source, folder, Engine(), max_pixels=10**6) is None
            if name == "write_parquet":
                _record_crash(folder, IndexChunk(0, 0, 4, "key", images), 2)
        (folder / "run.json").unlink()


def test_all_machines_join_the_chunk_that_was_first(tmp_path, make_images, monkeypatch):
    source = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2}, size=64)
    folder, images = tmp_path / "run", list_images(source)
    write = index.write_parquet

    def another_is_first(table, path, **options):
        write(table.slice(1), path)  # an image that it could not read
        write(table, path, **options)

    monkeypatch.setattr(index, "write_parquet", another_is_first)
    usable, _ = index_run(images, source, folder, Engine(), max_pixels=10**6)
    assert len(usable) == 3


def test_an_index_of_other_images_or_of_a_lost_disk_is_not_taken_up(tmp_path, make_images):
    engine = Engine()
    for name in ("v1", "v2"):
        make_images(tmp_path / name, counts={("fake", "a"): 2, ("real", "b"): 2}, size=64 if name == "v1" else 72)
    found = []
    for name in ("v1", "v2"):
        source = tmp_path / name / "manifest.csv"
        usable, _ = index_run(list_images(source), source, tmp_path / "run", engine, max_pixels=10**6)
        found.append(set(usable["width"].to_pylist()))
    assert found == [{64}, {72}]
    forget_chunks(tmp_path / "run")
    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": str(tmp_path / "v1" / "manifest.csv")},
            "detectors": [{"name": "d", "architecture": "timm:test_resnet", "random_runs": 2}],
            "compute": {"device": "cpu"},
        }
    )
    (tmp_path / "v1" / "fake").rename(tmp_path / "fake")
    (tmp_path / "v1" / "real").rename(tmp_path / "real")
    with pytest.raises(ManifestError, match="none of the 4 images"):
        begin_run(config, tmp_path / "again")
    (tmp_path / "fake").rename(tmp_path / "v1" / "fake")
    (tmp_path / "real").rename(tmp_path / "v1" / "real")
    assert len(begin_run(config, tmp_path / "again").image_table) == 4


def test_a_checkpoint_is_not_called_as_the_mean_over_runs_is(tmp_path, weights):
    for i, name in enumerate(("all", "seed1")):
        shutil.copy(weights / f"seed{i}.safetensors", tmp_path / f"{name}.safetensors")
    wanted = DetectorConfig(name="d", architecture="timm:test_resnet", checkpoints=str(tmp_path / "*.safetensors"))
    assert [name for name, *_ in weights_of(wanted, 0)] == ["run00", "run01"]
    alone = wanted.model_copy(update={"checkpoints": str(tmp_path / "seed*.safetensors")})
    assert [name for name, *_ in weights_of(alone, 0)] == ["seed1"]


def test_chance_exposes_a_detector_with_one_map_for_each_class(explained):
    """It predicts at random and never looks at the image: chance must be 1, whatever the labels."""
    count = len(explained.image_table)
    predicted = np.random.default_rng(0).integers(0, 2, count)
    blobs = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    partner = partners(explained.image_table, predicted, seed=1)
    known = partner >= 0
    assert known.sum() > count / 2
    assert torch.equal(blobs[predicted[known]], blobs[predicted[partner[known]]])


def test_chance_reads_the_predictions_of_the_model_whose_map_is_exchanged(explained):
    reader = MapReader(explained, plan(explained))
    for model in explained.models:
        maps = explained.maps().to_pandas()
        clean = maps[(maps.run == model.run) & (maps.condition == "clean")].sort_values("image")
        found = reader.partners(model)
        want = partners(explained.image_table, clean.predicted.to_numpy(), seed=explained.config.seed)
        assert np.array_equal(found, want)


def test_the_number_of_threads_belongs_to_the_run(explained, tmp_path):
    config = load_config(Path(explained.folder).parent / "config.toml")
    threads = explained.config.compute.threads
    assert threads == max(1, torch.get_num_threads())
    more = config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 4})})
    assert with_device(more, explained.config).compute.threads == threads
    seen = []
    before = torch.get_num_threads()
    list(run_tasks(lambda _: seen.append(torch.get_num_threads()), [1, 2], Engine(threads=2)))
    assert seen == [2, 2]
    assert torch.get_num_threads() == before


def test_float32_on_cuda_is_not_tf32():
    from explain2me.stages.shard import _exact_convolutions

    class OnCuda:
        device = torch.device("cuda")

    before = torch.backends.cudnn.allow_tf32
    with _exact_convolutions(OnCuda()):  # type: ignore[arg-type]
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_same_weights_twice_are_refused(tmp_path, weights, images, detector_table):
    for name in ("best", "last"):
        shutil.copy(weights / "seed0.safetensors", tmp_path / f"{name}.safetensors")
    text = f'name = "tiny"\n{detector_table("a", f"{tmp_path}/*.safetensors")}[data]\nmanifest = "{images}"\n'
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(Explain2MeError, match=r"best\.safetensors' and .*last\.safetensors' hold the same weights"):
        explain_run(load_config(tmp_path / "config.toml"), tmp_path / "run")


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path, weights, images, detector_table):
    folder = tmp_path / "ex[1]"
    shutil.copytree(weights, folder / "weights")
    for pattern in ("weights/seed*.safetensors", "weights/seed0.safetensors"):
        text = f'name = "tiny"\n{detector_table("a", pattern)}[data]\nmanifest = "{images}"\n[measures]\nstability = false\n'
        (folder / "config.toml").write_text(text)
        from explain2me.stages.check import check

        _, record = check(load_config(folder / "config.toml"))
        assert len(record["models"]) == (3 if "*" in pattern else 1)


@pytest.mark.parametrize(("column", "value"), [("label", "all"), ("source", "all")])
def test_the_word_for_totals_is_no_label_or_source(tmp_path, weights, detector_table, images, column, value):
    old = ",gan_b," if column == "source" else ",real,"
    manifest = images.parent / f"with-all-{column}.csv"
    manifest.write_text(images.read_text().replace(old, f",{value},"))
    toml = f'name = "tiny"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{manifest}"\n'
    (tmp_path / "config.toml").write_text(toml)
    with pytest.raises(Explain2MeError, match=f"the {column} 'all' means all of them; rename it"):
        explain_run(load_config(tmp_path / "config.toml"), tmp_path / "run")


def test_other_versions_that_go_on_with_a_run_are_recorded(explained, tmp_path, monkeypatch):
    from explain2me.stages import begin

    folder = tmp_path / "run"
    shutil.copytree(explained.folder, folder)
    monkeypatch.setattr(begin, "provenance", lambda: {"versions": {"torch": "99"}})
    for _ in range(2):
        explain_run(explained.config, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["later_versions"] == [{"torch": "99"}]
    assert record["versions"] == explained.record["versions"]


@pytest.mark.parametrize("name", ["faces.toml", "faces-study.toml", "paper.toml"])
def test_examples_load(name):
    path = Path(__file__).resolve().parents[1] / "examples" / name
    assert load_config(path).name


def test_the_paper_s_protocol():
    path = Path(__file__).resolve().parents[1] / "examples" / "paper.toml"
    config = load_config(path)
    training = config.training
    assert training is not None
    assert training.architectures == ("torchvision:resnet50", "torchvision:densenet121")
    assert [strategy.loss for strategy in training.strategies] == ["cross-entropy", "cyborg"]
    cyborg = training.strategies[1]
    assert (cyborg.alpha, cyborg.cam_class, cyborg.entropy_weight) == (0.5, "predicted", 0)
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.005, 0.9)
    assert (optimizer.weight_decay, optimizer.schedule, optimizer.step_epochs) == (1e-6, "step", 12)
    assert (optimizer.step_factor, optimizer.warmup_epochs, optimizer.gradient_clip) == (0.1, 0, None)
    assert (training.runs, training.epochs, training.batch_size, training.monitor) == (10, 50, 20, "accuracy")
    assert training.checkpoint == "best"
    drawn = {"ffhq": 4000} | dict.fromkeys(["stylegan", "stylegan2", "stylegan2_ada", "stylegan3"], 1000)
    assert config.data.sample == drawn
    named = {"architectures", "strategies", "split", "validation_split", "pretrained"}
    defaults = TrainingConfig(architectures=training.architectures)
    assert training.model_dump(exclude=named) == defaults.model_dump(exclude=named)  # as config.py says


@pytest.mark.parametrize("what", ["below a file", "not writable"])
def test_a_place_that_cannot_be_written_is_one_line(
    write_config: Callable[..., Path], tmp_path, capsys, monkeypatch, what
):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run" if what == "below a file" else Path("/proc/explain2me")
    monkeypatch.setattr("sys.argv", ["explain2me", "run", str(write_config()), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("explain2me: ")
    assert len(error.splitlines()) == 1


def test_a_truncated_score_file_is_one_line(explained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(explained.folder, folder)
    path = min((folder / "scores").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr("sys.argv", ["explain2me", "summarise", str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert path.name in capsys.readouterr().err
