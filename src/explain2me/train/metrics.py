"""Loss, accuracy and AUROC of an epoch, over the images of all devices."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.fabric import Fabric
from torch import Tensor, nn

from explain2me.salience.gradcam import predicted_classes
from explain2me.statistics.bootstrap import weighted_auroc
from explain2me.train.data import Example
from explain2me.train.losses import cross_entropy


@dataclass
class EpochSums:
    """Sums over the images of an epoch. They stay on the device, so that no step waits for it."""

    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    count: int = 0
    batches: int = 0
    bad_batch: Tensor | int = -1
    """Number of the first batch, from 0, whose loss is not finite; -1: there is none."""

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, its logits and labels."""
        loss, logits = loss.detach(), logits.detach()
        self.loss = self.loss + loss.to(widest(loss.device)) * len(labels)
        self.correct = self.correct + (predicted_classes(logits) == labels).sum()
        self.count += len(labels)
        bad_batch = torch.as_tensor(self.bad_batch, device=loss.device)
        self.bad_batch = torch.where((bad_batch < 0) & ~loss.isfinite(), self.batches, bad_batch)
        self.batches += 1

    def means(self, fabric: Fabric, prefix: str) -> dict[str, float]:
        """Mean loss and accuracy over the images of all devices."""
        values = [float(self.loss), float(self.correct), float(self.count)]
        totals: Any = torch.tensor(values, dtype=widest(fabric.device), device=fabric.device)
        if fabric.world_size > 1:
            totals = fabric.all_reduce(totals, reduce_op="sum")
        loss, correct, count = totals.tolist()
        return {f"{prefix}_loss": loss / max(count, 1), f"{prefix}_accuracy": correct / max(count, 1)}


@torch.no_grad()
def validate(
    fabric: Fabric, network: nn.Module, batches: Iterable[Example], *, positive: int, num_images: int
) -> dict[str, float]:
    """Metrics over the validation images.

    Args:
        fabric: with one process or several.
        network: returns logits first; left in evaluation mode.
        batches: the share of this process. With several devices each has at least one batch: the first forward pass
            sends the statistics of batch normalisation from the first device to the others.
        positive: class of the AUROC.
        num_images: of all shares.
    """
    network.eval()
    sums, scores = EpochSums(), []
    for batch in batches:
        image, label, _ = fabric.to_device(tuple(batch))
        logits = network(image)[0].float()
        sums.add(cross_entropy(logits, label), logits, label)
        score = ranking(logits, positive)
        scores.append(torch.stack([score, (label == positive).to(score)], 1))
    return sums.means(fabric, "val") | {"val_auroc": _auroc(_of_all_devices(fabric, torch.cat(scores), num_images))}


def _of_all_devices(fabric: Fabric, rows: Float[Tensor, "n 2"], num_images: int) -> Float[Tensor, "N 2"]:
    """Gather the rows of all processes: process r holds images r, r + world_size, and so on."""
    if fabric.world_size == 1:
        return rows
    counts = [len(range(rank, num_images, fabric.world_size)) for rank in range(fabric.world_size)]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))  # all_gather takes equal shapes
    gathered: Any = fabric.all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def _auroc(rows: Float[Tensor, "N 2"]) -> float:
    """Exact, so that epochs that order the images alike tie; NaN for one class, or a score that is not finite."""
    scores, positive = rows.cpu().double().numpy().T
    auroc = weighted_auroc(scores, positive == 1, np.ones((1, len(scores))))[0]
    return float(auroc) if np.isfinite(scores).all() else math.nan


def ranking(logits: Float[Tensor, "N num_logits"], positive: int) -> Float[Tensor, " N"]:
    """Score in (0, 1) that orders images as the softmax of the positive class does, also where that rounds to 1.

    >>> ranking(torch.tensor([[0.0, 0.0], [0.0, 60.0], [0.0, 61.0]]), 1)
    tensor([0.5000, 0.9918, 0.9919], dtype=torch.float64)
    """
    logits = logits.to(widest(logits.device))
    others = torch.cat([logits[:, :positive], logits[:, positive + 1 :]], 1)
    return (torch.nn.functional.softsign(logits[:, positive] - others.logsumexp(1)) + 1) / 2


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
