"""Small networks with every trap, random pictures for them, and their Grad-CAM by the formula."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def naive(
    model: nn.Module,
    module: nn.Module,
    images: Tensor,
    classes: Tensor,
    to_nchw: Callable[[Tensor], Tensor] = lambda x: x,
) -> np.ndarray:
    """Maps (N, K, h, w) from the formula: one full backward pass for each image and class, summed in numpy."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda *arguments: kept.append(arguments[-1]))
    modes = {part: part.training for part in model.modules()}
    model.eval()
    maps = np.zeros((*classes.shape, 0, 0))
    for n in range(len(images)):
        for k, c in enumerate(classes[n].tolist()):
            kept.clear()
            logits = model(images[n : n + 1]).reshape(1, -1)
            score = (logits[0, 0] if c else -logits[0, 0]) if logits.shape[1] == 1 else logits[0, c]
            (gradient,) = torch.autograd.grad(score, kept[-1])
            a, g = (to_nchw(x.detach())[0].double().numpy() for x in (kept[-1], gradient))
            cam = np.zeros(a.shape[1:])
            for channel in range(len(a)):
                cam += g[channel].mean() * a[channel]
            if maps.size == 0:
                maps = np.zeros((*classes.shape, *cam.shape))
            maps[n, k] = np.maximum(cam, 0)
    handle.remove()
    for part, training in modes.items():
        part.training = training
    return maps


def close(got: Tensor, want: np.ndarray, rtol: float = 1e-5) -> None:
    """Equal to ``rtol`` of the largest value; neither side may be all zero."""
    assert got.shape == want.shape
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=rtol * np.abs(want).max())


class Body(nn.Module):
    """A small CNN with every trap: squeeze-and-excitation pooling before the end, in-place ReLU behind the last map."""

    def __init__(self, end: str, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.end = end
        self.drop = nn.Dropout(0.5)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.act(self.last(x))
        ends: dict[str, Callable[[], Tensor]] = {
            "adaptive": lambda: F.adaptive_avg_pool2d(x, 1).flatten(1),
            "avg_pool": lambda: F.avg_pool2d(x, x.shape[2:]).flatten(1),
            "mean": lambda: x.mean((2, 3)),
            "mean keyword": lambda: torch.mean(x, dim=(-1, -2)),
            "flat mean": lambda: x.flatten(2).mean(-1),
            "nhwc": lambda: x.permute(0, 2, 3, 1).mean((1, 2)),
            "tokens": lambda: x.flatten(2).transpose(1, 2).mean(1),
            "max": lambda: F.adaptive_max_pool2d(x, 1).flatten(1),
            "avg and max": lambda: 0.5 * F.adaptive_avg_pool2d(x, 1).flatten(1) + 0.5 * x.amax((2, 3)),
            "einsum": lambda: torch.einsum("nchw->nc", x),
            "attention": lambda: torch.cat([x.mean((2, 3)), (x * x[:, :1].sigmoid()).sum((2, 3))], 1)[:, 6:18],
            "flatten": lambda: x.flatten(1),
        }
        return self.head(self.drop(ends[self.end]()))


ENDS = [
    "adaptive",
    "avg_pool",
    "mean",
    "mean keyword",
    "flat mean",
    "nhwc",
    "tokens",
    "max",
    "avg and max",
    "einsum",
    "flatten",
]


def small(end: str = "adaptive", num_logits: int = 3, *, hidden: bool = False, seed: int = 0, cells: int = 48) -> Body:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = 12 * (cells if end == "flatten" else 1)
        parts = [nn.Linear(width, 7), nn.GELU(), nn.Linear(7, num_logits)] if hidden else [nn.Linear(width, num_logits)]
        return Body(end, nn.Sequential(*parts))


def pictures(n: int = 3, h: int = 12, w: int = 16, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n * 1000 + h), dtype=dtype)


def every_class(images: Tensor, num_classes: int) -> Tensor:
    return torch.arange(num_classes).expand(len(images), num_classes)
