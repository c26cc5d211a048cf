"""The loop: the same bytes after an interrupt, what a config decides, and trainings that diverge."""

import gc
import json
import re
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from small_trainings import ARCHITECTURE, SIZE, Stop, make_config, one, spoil_the_weights, stop_after

import explain2me.train.loop
from explain2me.config.training import OptimizerConfig
from explain2me.detectors.cards import CARD
from explain2me.detectors.load import load_detector
from explain2me.errors import Explain2MeError
from explain2me.train.cams import class_activation_maps
from explain2me.train.data import EpochSampler, Examples
from explain2me.train.loop import learning_rate, make_optimizer, train_detector
from explain2me.train.losses import guided_loss
from explain2me.train.study import plan_study
from explain2me.train.training import RESUME


@pytest.mark.parametrize("steps", [4, 7], ids=["within an epoch", "after two epochs"])
def test_an_interrupt_changes_no_bit(tmp_path, uninterrupted, steps):
    whole, broken = one(uninterrupted.config, uninterrupted.out), one(uninterrupted.config, tmp_path)
    with pytest.raises(Stop):
        train_detector(broken, stop_after(steps))
    assert not broken.done
    assert (broken.folder / RESUME).exists()
    train_detector(broken)
    for name in ("best.safetensors", "last.safetensors", "metrics.csv"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    cards = [json.loads((training.folder / CARD).read_text()) for training in (whole, broken)]
    assert len(cards[0]["curve"]) == 3
    for card in cards:
        del card["seconds"]
    assert cards[0] == cards[1]
    assert {path.name for path in broken.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_a_training_uses_its_own_folder_and_generator_alone(tmp_path, manifest, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the caller's generators on GPUs are not ours")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    training = one(make_config(manifest, epochs=1), tmp_path)
    train_detector(training)
    (training.folder / RESUME).write_bytes(b"of a process that was killed right after it wrote the card")
    train_detector(training)
    assert not (training.folder / RESUME).exists()


def test_a_training_that_is_over_holds_no_images(tmp_path, manifest):
    gc.collect()
    gc.disable()
    try:
        train_detector(one(make_config(manifest, epochs=1), tmp_path))
        assert not [thing for thing in gc.get_objects() if type(thing) is Examples]
    finally:
        gc.enable()


@pytest.mark.slow
def test_an_interrupt_changes_no_bit_where_processes_read_the_images(tmp_path, manifest):
    plain, config = make_config(manifest, epochs=2), make_config(manifest, epochs=2, loaders=1)
    trained = [one(config, tmp_path / name) for name in ("plain", "whole", "broken")]
    train_detector(one(plain, tmp_path / "plain"))
    train_detector(trained[1])
    with pytest.raises(Stop):
        train_detector(trained[2], stop_after(4))
    train_detector(trained[2])
    weights = [(training.folder / "last.safetensors").read_bytes() for training in trained]
    assert weights[0] == weights[1] == weights[2]


def test_a_training_keeps_its_number_of_threads(tmp_path, manifest):
    config = make_config(manifest, epochs=2)
    training = one(config, tmp_path)
    seen = []

    def on_step(done: int, total: int, text: str) -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 4:
            raise Stop

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(Stop):
            train_detector(training, on_step)
        torch.set_num_threads(2)
        train_detector(training, on_step)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert json.loads((training.folder / CARD).read_text())["threads"] == 1


@pytest.mark.parametrize("all_the_same", [False, True], ids=["skipped", "computed"])
def test_guidance_that_weighs_nothing_changes_no_bit(tmp_path, manifest, finished_study, monkeypatch, all_the_same):
    if all_the_same:  # alpha = 1 reads no activation maps; here it does
        monkeypatch.setattr(
            "explain2me.config.training.StrategyConfig.guided", property(lambda self: self.loss == "cyborg")
        )
    plain = one(finished_study.config, finished_study.out)
    guided = one(
        make_config(manifest, epochs=1, strategies=[{"name": "guided", "loss": "cyborg", "alpha": 1.0}]), tmp_path
    )
    train_detector(guided)
    weights = [(training.folder / "last.safetensors").read_bytes() for training in (plain, guided)]
    assert weights[0] == weights[1]


def test_an_epoch_that_spoils_the_weights_is_not_kept(tmp_path, manifest):
    training = one(make_config(manifest, epochs=2), tmp_path)

    def on_step(done, total, text):
        if done == 6:  # the last step of the second epoch: every loss was finite
            spoil_the_weights()

    with pytest.raises(Explain2MeError, match="is not finite after epoch 2"):
        train_detector(training, on_step)
    assert not training.done
    kept = load_detector(ARCHITECTURE, training.folder / "last.safetensors", num_classes=2, input_size=SIZE)
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())


def test_large_seeds(tmp_path, manifest):
    config = make_config(manifest, epochs=1).model_copy(update={"seed": 2**63 - 1000})
    train_detector(one(config, tmp_path))


@pytest.mark.parametrize("pretrained", ["inception_v3", "googlenet"])
def test_pretrained_weights_get_no_second_normalisation(monkeypatch, pretrained):
    """Their checkpoints are read into a model without it."""
    import torchvision

    plain = torchvision.models.get_model(pretrained, init_weights=False)
    weights = plain.state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    trained = load_detector(f"torchvision:{pretrained}", num_classes=2, pretrained=True, new_head=True).model
    assert plain.transform_input is False
    assert trained.transform_input is False


def test_a_finished_training_is_left_alone_and_the_random_state_too(finished):
    assert finished.random_states_kept
    folder = finished.training.folder
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    train_detector(finished.training)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_each_step_is_told_with_the_last_epoch_in_words(finished):
    assert [step[:2] for step in finished.steps] == [(i + 1, 75) for i in range(75)]
    texts = [text for *_, text in finished.steps]
    assert texts[:3] == ["epoch 1"] * 3
    assert all(text.startswith(f"epoch {i // 3}: train_loss ") for i, text in enumerate(texts) if i >= 3)


def test_class_balance_trains(tmp_path, manifest):
    unequal = manifest.parent / "unequal.csv"
    unequal.write_text(re.sub("(0[1357].png),fake", r"\1,real", manifest.read_text()))
    weights = set()
    for name in ("none", "weights", "sampling"):
        training = one(make_config(unequal, class_balance=name, epochs=1), tmp_path / name, 1)
        train_detector(training)
        weights.add((training.folder / "last.safetensors").read_bytes())
    assert len(weights) == 3


@pytest.mark.parametrize(
    ("strategy", "called"),
    [
        ({"loss": "cyborg", "alpha": 0.3, "entropy_weight": 0.7}, "guided_loss"),
        ({"entropy_weight": 0.7}, "guided_loss"),
        ({}, "cross_entropy"),
    ],
    ids=["both", "entropy alone", "neither"],
)
def test_what_the_config_weighs_reaches_the_loss(tmp_path, manifest, monkeypatch, strategy, called):
    unequal = tmp_path / "unequal.csv"
    lines = manifest.read_text().replace("\n", f"\n{manifest.parent}/").replace(",map", f",{manifest.parent}/map")
    lines = re.sub("(0[1357].png),fake", r"\1,real", lines).removesuffix(f"{manifest.parent}/")  # 16 real, 8 fake
    unequal.write_text(lines)
    seen = []
    real = getattr(explain2me.train.loop, called)

    def loss(*tensors, **options):
        seen.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(f"explain2me.train.loop.{called}", loss)
    strategies = [{"name": "one"} | strategy]
    config = make_config(unequal, strategies=strategies, class_balance="weights", epochs=1, validation_split=None)
    train_detector(one(config, tmp_path))
    assert len(seen) == 3
    for options in seen:
        torch.testing.assert_close(options["class_weights"], torch.tensor([0.75, 1.5]))
        if called == "guided_loss":
            assert (options["entropy_weight"], options["alpha"]) == (0.7, strategy.get("alpha", 0.5))
            assert (options["human_maps"] is not None) == ("loss" in strategy)


def test_the_learning_rate_of_each_epoch_is_that_of_the_schedule(uninterrupted):
    training = one(uninterrupted.config, uninterrupted.out)
    expected = {"plain": [0.005, 0.0075, 0.0025], "guided": [0.001] * 3}[training.strategy.name]
    lines = [line.split(",")[:2] for line in (training.folder / "metrics.csv").read_text().splitlines()]
    assert lines[0] == ["epoch", "learning_rate"]
    assert [float(rate) for _, rate in lines[1:]] == pytest.approx(expected)


@pytest.mark.parametrize("cam_class", ["predicted", "true"])
def test_the_class_whose_map_is_guided(tmp_path, manifest, monkeypatch, cam_class):
    guided, wanted, others = [], [], []

    def maps(features, weights, classes):
        guided.append(classes)
        return class_activation_maps(features, weights, classes)

    def loss(logits, labels, **options):
        (wanted if cam_class == "true" else others).append(labels)
        (others if cam_class == "true" else wanted).append(logits.argmax(1))
        return guided_loss(logits, labels, **options)

    monkeypatch.setattr(explain2me.train.loop, "class_activation_maps", maps)
    monkeypatch.setattr(explain2me.train.loop, "guided_loss", loss)
    strategies = [{"name": "guided", "loss": "cyborg", "cam_class": cam_class}]
    train_detector(one(make_config(manifest, strategies=strategies, epochs=1), tmp_path))
    assert len(guided) == 3
    assert all(map(torch.equal, guided, wanted))
    assert not all(map(torch.equal, guided, others))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"name": "sgd", "momentum": 0.7, "weight_decay": 0.03, "learning_rate": 0.002}, torch.optim.SGD),
        ({"name": "adamw", "weight_decay": 0.03, "learning_rate": 0.002}, torch.optim.AdamW),
    ],
    ids=["sgd", "adamw"],
)
def test_the_optimizer_is_the_one_that_was_asked_for(config, kind):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = make_optimizer(model, OptimizerConfig(**config))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    expected = {"lr": 0.002, "weight_decay": 0.03} | ({"momentum": 0.7} if kind is torch.optim.SGD else {})
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("clip", [0.01, None])
def test_a_step_takes_the_clipped_gradients_of_its_own_batch(tmp_path, manifest, monkeypatch, clip):
    norms, calls = [], []

    class Watched(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append("zero_grad")
            super().zero_grad(set_to_none)

        def step(self, closure=None):
            calls.append("step")
            gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    train_detector(one(make_config(manifest, optimizer={"gradient_clip": clip}, epochs=1), tmp_path))
    assert calls == ["zero_grad", "step"] * 3
    assert max(norms) == pytest.approx(clip, rel=1e-3) if clip else min(norms) > 0.02


def test_each_epoch_has_its_own_order_and_augmentation_also_after_an_interrupt(tmp_path, manifest, monkeypatch):
    seen = []

    class Watched(Examples):
        def __getitem__(self, key):
            seen.append(key)
            return super().__getitem__(key)

    monkeypatch.setattr(explain2me.train.loop, "Examples", Watched)
    training = one(make_config(manifest, epochs=3, validation_split=None, strategies=[{"name": "plain"}]), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(6))
    train_detector(training)
    orders = [list(EpochSampler(24, training.seed, epoch=epoch)) for epoch in (0, 1, 1, 2)]  # the second is repeated
    assert seen == [key for order in orders for key in order]


def test_bfloat16_trains_float32_weights(tmp_path, manifest, finished_study):
    exact = plan_study(*finished_study).trainings[2]
    rounded = one(make_config(manifest, precision="bfloat16", epochs=1), tmp_path, 1)
    assert (exact.strategy, exact.seed) == (rounded.strategy, rounded.seed)
    train_detector(rounded)
    weights = [load_file(training.folder / "last.safetensors") for training in (exact, rounded)]
    floats = [name for name, value in weights[0].items() if value.is_floating_point()]
    assert {weights[1][name].dtype for name in floats} == {torch.float32}
    apart = [(weights[0][name] - weights[1][name]).abs().max().item() for name in floats]
    assert 0 < max(apart) < 0.5  # computed otherwise, but the same training


def test_schedules():
    step = OptimizerConfig(learning_rate=2, warmup_epochs=2, step_epochs=3)
    assert [learning_rate(step, epoch, 9) for epoch in range(5)] == pytest.approx([2 / 3, 4 / 3, 2, 0.2, 0.2])
    cosine = [learning_rate(OptimizerConfig(learning_rate=1, schedule="cosine"), epoch, 4) for epoch in range(4)]
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert learning_rate(OptimizerConfig(learning_rate=1, schedule="constant"), 3, 4) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["timm:test_resnett"]}, "unknown architecture"),
        ({"batch_size": 25}, "batch_size = 25 is more than the 24 images"),
        ({"devices": 9, "batch_size": 1}, "at least one image to validate with on each, got 8"),
        ({"pretrained": "V9", "architectures": ["torchvision:resnet18"]}, "no such weights; known: 'IMAGENET1K_V1'"),
        ({"pretrained": "IMAGENET1K_V1"}, "names weights of torchvision"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"validation_split": "train"}, "are in the split to train on and in the one to validate with"),
        ({"split": "test", "validation_split": None}, "8 images would be trained on and tested"),
        ({"split": None, "validation_split": None}, "8 images would be trained on and tested"),
        ({"validation_split": "test"}, "8 images would be validated with and tested"),
        ({"sample": 25}, "expected at least 25 images of the source 'camera', got 24"),
        ({"sample": {"camra": 3}}, "there is no source 'camra'; did you mean 'camera'"),
        (
            {"strategies": [{"name": "a", "loss": "cyborg", "salience": "mean-of:/no/such"}]},
            "expected a folder of maps",
        ),
        (
            {"architectures": ["timm:test_vit"], "strategies": [{"name": "a", "loss": "cyborg"}]},
            "needs a linear head right behind global average pooling",
        ),
        (
            {"input_size": 20, "strategies": [{"name": "a", "loss": "cyborg"}]},
            "ResNet: images of 20 x 20 pixels leave no map to guide in front of .*; set a larger input_size, such as 224",
        ),
        (
            {"optimizer": {"learning_rate": 1e30}},
            "the loss is not finite in epoch 1, step 2; lower",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input(tmp_path, manifest, change, message):
    with pytest.raises(Explain2MeError, match=message):
        train_detector(one(make_config(manifest, **change), tmp_path))


def test_a_training_that_diverges_keeps_its_last_whole_epoch(tmp_path, manifest):
    config = make_config(manifest, epochs=3, optimizer={"schedule": "step", "step_epochs": 1, "step_factor": 1.0})
    training = one(config, tmp_path)

    def on_step(done, total, text):
        if done == 4:  # in the second epoch: weights that give no finite loss
            spoil_the_weights()

    with pytest.raises(Explain2MeError, match="not finite in epoch 2"):
        train_detector(training, on_step)
    assert not training.done
    kept = load_detector(ARCHITECTURE, training.folder / "last.safetensors", num_classes=2, input_size=SIZE)
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["timm:legacy_xception", "timm:inception_v3", "torchvision:inception_v3"])
def test_architectures_at_299(tmp_path, manifest, architecture):
    config = make_config(manifest, architectures=[architecture], input_size=None, epochs=1, batch_size=4, sample=None)
    training = one(config, tmp_path, 1)
    train_detector(training)
    detector = load_detector(architecture, training.checkpoint, num_classes=2)
    assert detector.input_size == (299, 299)
    if "xception" in architecture:
        assert detector.mean == detector.std == (0.5, 0.5, 0.5)
