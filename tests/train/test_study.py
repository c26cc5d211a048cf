"""A study: which trainings it has, who trains them, and what is found before hours of training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from small_trainings import ARCHITECTURE, SIZE, make_config, one, spoil_the_weights

from explain2me.config.load import parse_config
from explain2me.detectors.cards import CARD
from explain2me.errors import Explain2MeError
from explain2me.train.study import check_devices, check_study, plan_study, train_missing
from explain2me.train.training import LOCK, build_detector

PLAIN = [{"name": "plain"}]
LEVELS = [{"kind": "gaussian", "levels": [0.1]}] * 2


def test_a_training_of_another_process_is_left_out(tmp_path, manifest):
    config = make_config(manifest, epochs=1)
    held = one(config, tmp_path)
    held.folder.mkdir(parents=True)
    told = []
    with (
        FileLock(held.folder / LOCK),
        pytest.raises(
            Explain2MeError,
            match=r"^another process is training test_resnet-plain run 0; .* \(1 of 2 trainings are locked, the others are fin",
        ),
    ):
        train_missing(plan_study(config, tmp_path), on_trained=lambda each, *_: told.append(each.outcome()))
    assert [training.done for training in plan_study(config, tmp_path).trainings] == [False, True]
    assert told[1].startswith("test_resnet-guided run 0, best of 1 epochs")
    assert train_missing(plan_study(config, tmp_path)) == []


def test_every_architecture_is_built_before_the_first_is_trained(tmp_path, manifest):
    config = make_config(manifest, architectures=[ARCHITECTURE, "timm:test_resnett"])
    with pytest.raises(Explain2MeError, match="unknown architecture 'timm:test_resnett'"):
        train_missing(plan_study(config, tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("sets", "training", "message"),
    [
        ({}, {"runs": 1}, "needs at least 2 of each detector, got training.runs = 1"),
        ({"data": {"sample": 9}}, {}, "expected at least 9 images of the source 'camera', got 8"),
        ({"data": {"split": "tset"}}, {}, "did you mean 'test'"),
        ({}, {"input_size": [96, 64]}, "measures.resilience .* needs a square input, got 96x64"),
        (
            {},
            {"input_size": 32, "architectures": ["torchvision:resnet18"], "strategies": PLAIN},
            "detector 'resnet18-plain': .*no map of more than one cell",
        ),
        ({"salience": {"target": "fakee"}}, {}, "salience.target: .* did you mean 'fake'"),
        ({"measures": {"noise": LEVELS}}, {}, "expected different conditions, got 'gaussian@0.1' twice"),
        ({"compute": {"device": "cuda:63"}}, {}, "compute.device = 'cuda:63'"),
        (
            {"detectors": [{"name": "other", "architecture": ARCHITECTURE, "checkpoints": "no/such*"}]},
            {},
            "'other': no file matches",
        ),
    ],
    ids=["runs", "sample", "split", "square", "grid", "target", "conditions", "device", "checkpoints"],
)
def test_what_would_stop_the_comparison_is_found_before_training(tmp_path, manifest, sets, training, message):
    tree = json.loads(make_config(manifest, **({"runs": 2} | training)).model_dump_json())
    for name, values in sets.items():
        tree[name] = tree[name] | values if isinstance(values, dict) else values
    with pytest.raises(Explain2MeError, match=message):
        check_study(plan_study(parse_config(tree), tmp_path))


def test_a_finished_study_needs_no_device_to_train_on(manifest, finished_study):
    tree = json.loads(finished_study.config.model_dump_json())
    tree["training"]["device"] = "cuda:63"
    without = parse_config(tree)
    assert train_missing(plan_study(without, finished_study.out)) == []
    check_study(plan_study(without, finished_study.out))
    tree["training"]["runs"] = 3
    with pytest.raises(Explain2MeError, match=r"training\.device = 'cuda:63'"):
        check_study(plan_study(parse_config(tree), finished_study.out))


@pytest.mark.parametrize("wrong", ["mean-of:/no/such", "manifest"])
def test_human_maps_are_read_before_the_first_training(tmp_path, manifest, wrong):
    text = manifest.read_text().replace("map01.png", "missing.png")
    other = manifest.parent / "missing.csv"
    other.write_text(text)
    strategies = [{"name": "plain"}, {"name": "guided", "loss": "cyborg", "salience": wrong}]
    with pytest.raises(Explain2MeError, match=r"missing\.png|expected a folder of maps"):
        train_missing(plan_study(make_config(other, strategies=strategies, epochs=1), tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_study_that_can_be_compared_is_let_through(tmp_path, manifest):
    check_study(plan_study(make_config(manifest, runs=2), tmp_path))


def test_trainings_of_several_gpus_do_not_share_them(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for change in ({"devices": 2}, {"workers": 2}):
        check_devices(make_config(manifest, device="cuda", **change).training, "local")
    config = make_config(manifest, device="cuda", devices=2, workers=2)
    with pytest.raises(Explain2MeError, match=r"workers = 2 with training\.devices = 2: .* would share their GPUs"):
        train_missing(plan_study(config, tmp_path))


def test_a_study_may_have_more_runs_but_not_another_comparison(study):
    from explain2me.stages.begin import begin_run

    begin_run(plan_study(study.config, study.out).comparison, study.out / "run")
    check_study(plan_study(study.config, study.out))
    tree = json.loads(study.config.model_dump_json())
    tree["training"]["runs"] = 3
    check_study(plan_study(parse_config(tree), study.out))
    tree["compute"]["batch_size"] = 3
    with pytest.raises(
        Explain2MeError, match=r"run' holds the comparison .*Move that folder away, .*what was trained stays"
    ):
        check_study(plan_study(parse_config(tree), study.out))


def test_labels_to_test_are_those_that_were_trained(tmp_path, manifest):
    lines = manifest.read_text().replace("fake,camera,test", "odd,camera,test")
    other = manifest.parent / "odd_test.csv"
    other.write_text(lines)
    config = make_config(other, runs=2, epochs=1)
    with pytest.raises(Explain2MeError, match="'odd'"):
        check_study(plan_study(config, tmp_path))


def test_runs_differ_and_strategies_start_alike(finished_study):
    every = plan_study(*finished_study).trainings
    digests = {json.loads((each.folder / CARD).read_text())["files"]["last.safetensors"] for each in every}
    assert len(digests) == len(every) == 6
    begun = {(each.strategy.name, each.run): build_detector(each, 2).weights_sha256 for each in every}
    assert begun["plain", 1] == begun["guided", 1] == begun["averaged", 1] != begun["plain", 0]


def test_shards_share_the_trainings(study):
    every = plan_study(*study).trainings
    for training in every[:2]:
        shutil.rmtree(training.folder)
    started = []
    left = train_missing(plan_study(*study), shard=(1, 2), on_start=lambda *told: started.append(told))
    assert left == [every[0]]
    assert started == [([every[1]], 3)]
    assert train_missing(plan_study(*study), shard=(0, 2)) == []


def test_evaluation_lists_what_was_trained(tmp_path, manifest):
    config = make_config(manifest, runs=2)
    found = plan_study(config, tmp_path).comparison
    assert found.training is None
    assert [detector.name for detector in found.detectors] == ["test_resnet-plain", "test_resnet-guided"]
    assert [Path(path).parent.name for path in found.detectors[0].checkpoints] == ["run00", "run01"]
    assert found.detectors[0].input_size == SIZE


def test_evaluation_reads_images_as_the_weights_were_trained_from(tmp_path, manifest):
    named = "IMAGENET1K_SWAG_E2E_V1"
    for change, side in (({}, 384), ({"input_size": 384}, 384), ({"pretrained": True}, None)):
        options = {"architectures": ["torchvision:vit_b_16"], "pretrained": named, "input_size": None} | change
        (found, *_) = plan_study(make_config(manifest, **options), tmp_path).comparison.detectors
        size = found.input_size if isinstance(found.input_size, int | None) else found.input_size[0]
        assert (size, found.interpolation) == (side, None if side is None else "bicubic")


def test_the_others_go_on_where_a_training_diverges(tmp_path, manifest):
    config = make_config(manifest, epochs=1, strategies=[{"name": "first"}, {"name": "second"}])
    told = []

    def on_step(done, total, text):
        if not told and done == 2:
            spoil_the_weights()

    with pytest.raises(
        Explain2MeError, match=r"^1 of 2 trainings diverged, the others are finished\. .*-first run 0: the l"
    ):
        train_missing(
            plan_study(config, tmp_path), on_step=on_step, on_trained=lambda each, *_: told.append(each.outcome())
        )
    assert [training.done for training in plan_study(config, tmp_path).trainings] == [False, True]
    assert re.match(r"test_resnet-first run 0: the loss is not finite in epoch 1, step 3", told[0])
    assert train_missing(plan_study(config, tmp_path)) == []
    assert not list(tmp_path.rglob("diverged*"))


def test_a_training_can_be_counted_though_its_config_holds_a_dict(tmp_path: Path) -> None:
    from explain2me.workers import repeating

    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": "m", "sample": {"a": 1}},
            "training": {"architectures": ["timm:test_resnet"]},
        }
    )
    training = plan_study(config, tmp_path).trainings[0]
    assert repeating()(training) == [training]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainings_in_workers_give_the_same_weights(manifest: Path, tmp_path: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    one_config = make_config(manifest, epochs=1)
    two_config = make_config(manifest, epochs=1, workers=2).model_copy(
        update={"compute": one_config.compute.model_copy(update={"executor": executor})}
    )
    assert train_missing(plan_study(one_config, tmp_path / "one")) == []
    told = []
    assert train_missing(plan_study(two_config, tmp_path / "two"), on_step=lambda *args: told.append(args)) == []
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert {text.partition(", epoch 1: train_loss")[0] for *_, text in told} == {
        f"{training.detector} run 0" for training in plan_study(two_config, tmp_path).trainings
    }
    if executor == "ray":
        import ray

        ray.shutdown()
    for training in plan_study(one_config, tmp_path / "one").trainings:
        other = tmp_path / "two" / training.folder.relative_to(tmp_path / "one")
        assert (other / CARD).exists()
        weights = [load_file(folder / "best.safetensors") for folder in (training.folder, other)]
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
