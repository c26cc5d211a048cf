"""Loss, accuracy and AUROC of an epoch: against values worked by hand, with ties and undefined scores."""

import math

import pytest
import torch
from lightning.fabric import Fabric

from explain2me.train.data import Example
from explain2me.train.metrics import ranking, validate


def test_the_best_epoch_is_not_chosen_by_ties():
    logits = torch.tensor([[0.0, 20.0], [0.0, 21.0], [0.0, 22.0], [1.0, 0.0]])
    found = ranking(logits, 1)
    assert found.diff()[:2].gt(0).all()
    assert ((found > 0) & (found < 1)).all()
    assert found[3] == found.min()
    several = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert ranking(several, 2).argsort().tolist() == several.double().softmax(1)[:, 2].argsort().tolist()


class Scores(torch.nn.Module):
    """Takes the logit of class 1 for an image."""

    def forward(self, images):
        return torch.stack([torch.zeros(len(images)), images], 1), None


@pytest.mark.parametrize(
    ("scores", "auroc"),
    [
        ([1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 2.5], 20 / 30),  # by hand: 0 + 6 + 6 + 6 + 2 pairs are in order
        ([1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 2], 19.5 / 30),  # a tie counts one half
        ([1, 2, 3, 4, 5, 6, 0, 7, 8, 9, math.nan], math.nan),
    ],
)
def test_epochs_that_order_the_images_alike_tie(scores, auroc):
    """AUROC is a number of pairs, here of 30, and not what float32 makes of it."""
    labels = torch.tensor([0] * 6 + [1] * 5)
    batches = [Example(torch.tensor(scores)[part], labels[part], torch.zeros(1)) for part in torch.arange(11).split(4)]
    metrics = validate(Fabric(accelerator="cpu", devices=1), Scores(), batches, positive=1, num_images=11)
    assert metrics["val_auroc"] == auroc or (math.isnan(metrics["val_auroc"]) and math.isnan(auroc))
    logits = torch.tensor(scores, dtype=torch.float64)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    assert metrics["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-6, nan_ok=True)
    assert metrics["val_accuracy"] == pytest.approx(4 / 11)


def test_an_auroc_of_one_class_is_undefined():
    batches = [Example(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]), torch.zeros(1))]
    metrics = validate(Fabric(accelerator="cpu", devices=1), Scores(), batches, positive=1, num_images=2)
    assert math.isnan(metrics["val_auroc"])
    assert metrics["val_accuracy"] == 1
