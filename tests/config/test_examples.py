"""The example configs load, and one is the protocol of the paper."""

from pathlib import Path

import pytest

from explain2me.config.load import load_config
from explain2me.config.training import TrainingConfig


@pytest.mark.parametrize("name", ["faces.toml", "faces-study.toml", "paper.toml"])
def test_examples_load(name):
    path = Path(__file__).resolve().parents[2] / "examples" / name
    assert load_config(path).name


def test_the_protocol_of_the_paper():
    path = Path(__file__).resolve().parents[2] / "examples" / "paper.toml"
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
