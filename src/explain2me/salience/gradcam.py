"""Grad-CAM for any image classifier, exact, at the cost of the bare forward pass.

The forward pass runs without gradients up to one tensor A, by default the tensor that enters global pooling. There it
is cut: A goes on as a leaf of the autograd graph, so that only the head behind A is differentiated. Which tensor A is,
and the cut, are in :mod:`explain2me.salience.layers`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.grids import Grid
from explain2me.salience.layers import CallInput, Cut, ModuleTensor, find_layer, named_module, refuse_compiled


class GradCAMResult(NamedTuple):
    """Raw maps (after ReLU, not scaled, native resolution) and the logits of the same pass; float32 (float64 stays)."""

    maps: Float[Tensor, "N ... h w"]
    logits: Float[Tensor, "N num_logits"]


def gradcam(activations: Float[Tensor, "N C h w"], gradients: Float[Tensor, "N C h w"]) -> Float[Tensor, "N h w"]:
    """Grad-CAM of each image: ``ReLU(sum_k a_k A_k)``, a_k the spatial mean of the gradient of the score by A_k.

    At least 0, not scaled; high where the class finds its evidence. All zero where no cell speaks for the class, which
    can happen with a right prediction. Half precision is summed in float32. Selvaraju et al. 2017, eq. 1 and 2.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    >>> gradients = torch.tensor([[[[2.0, 2.0]], [[-1.0, -1.0]]]])
    >>> gradcam(activations, gradients)
    tensor([[[0., 4.]]])
    """
    if activations.ndim != 4 or activations.shape != gradients.shape:
        raise ValueError(
            "activations and gradients must have one shape (N, C, h, w), "
            f"got {tuple(activations.shape)} and {tuple(gradients.shape)}; give both of the same layer and batch"
        )
    weights = _at_least_float32(gradients).mean((2, 3), keepdim=True)
    return (_at_least_float32(activations) * weights).sum(1).relu()


def predicted_classes(logits: Float[Tensor, "N num_logits"]) -> Int[Tensor, " N"]:
    """The predicted class of each image: that of the largest logit; with a single logit, class 1 where it is above 0.

    >>> predicted_classes(torch.tensor([[0.1, 2.0], [3.0, -1.0]]))
    tensor([1, 0])
    >>> predicted_classes(torch.tensor([[-0.5], [0.5]]))
    tensor([0, 1])
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, num_logits), got {tuple(logits.shape)}")
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def choose_predicted(logits: Float[Tensor, "N num_logits"]) -> Int[Tensor, "N 1"]:
    """The predicted class of each image as the one class to explain: the ``choose`` of an explainer.

    >>> choose_predicted(torch.tensor([[0.1, 2.0], [3.0, -1.0]]))
    tensor([[1],
            [0]])
    """
    return predicted_classes(logits)[:, None]


class GradCAM:
    """``with GradCAM(model) as cam: maps, logits = cam(images)``: salience maps of a classifier.

    Inside the block the model is in eval mode; on leaving it every module's mode is put back, also after an exception.
    Hooks exist only during a call. Parameters, their ``grad`` and ``requires_grad``, and the random number generators
    are left as they are; ``torch.no_grad()`` and ``torch.inference_mode()`` around a call change nothing. Under
    ``torch.autocast`` with float32 weights what lies behind A runs in float32.

    Args:
        model: takes images (N, 3, H, W), returns logits (N, num_logits), or (N,) for a single logit; an output with a
            field ``logits`` is understood too. With a single logit the score of class 1 is +logit, of class 0 -logit.
        layer: ``"auto"``, or the dotted name of a module whose output is mapped: (N, C, h, w), (N, h, w, C), or tokens
            (N, L, C) on a grid (class and register tokens in front are left out). Of a module used several times the
            last use counts. ``"auto"`` is the tensor that enters the last global pooling; without global pooling the
            last map that is flattened; with a class token the tokens behind the first norm of the last block. A pooling
            that is written out (generalised mean: x^p, mean, root) is cut at its mean, so the map is that of x^p.

    ``layer`` says after a call which tensor was taken, for the record.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = nn.init.constant_(model[2].weight, 1.0)
    >>> with GradCAM(model) as cam:
    ...     maps, logits = cam(torch.tensor([[[[1.0, -3.0]]]]))
    >>> maps, cam.layer
    (tensor([[[0.5000, 0.0000]]]), 'auto: input of adaptive_avg_pool2d (N, 1, 1, 2)')
    """

    def __init__(self, model: nn.Module, layer: str = "auto") -> None:
        self.model = model
        self.layer = layer
        self._asked = layer
        self._modes: dict[nn.Module, bool] | None = None
        self._float32 = True
        self._found: dict[tuple[int, ...], CallInput | ModuleTensor] = {}

    def __enter__(self) -> Self:
        if self._modes is not None:
            raise RuntimeError("this GradCAM is open already; make a second GradCAM(model) for a block inside a block")
        if self._asked != "auto":
            named_module(self.model, self._asked)
        refuse_compiled(self.model, self._asked)
        self._float32 = all(p.dtype == torch.float32 for p in self.model.parameters() if p.is_floating_point())
        self._modes = {module: module.training for module in self.model.modules()}
        for module in self._modes:
            module.training = False  # not eval(): some models do more there, which nothing would undo
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        modes, self._modes = self._modes or {}, None
        for module, training in modes.items():
            module.training = training

    def __call__(self, images: Float[Tensor, "N 3 H W"], classes: Int[Tensor, "N ..."] | None = None) -> GradCAMResult:
        """Maps for ``classes``, from one forward pass.

        Args:
            images: preprocessed images (N, 3, H, W), N at least 1.
            classes: None for the predicted class, (N,) for one class of each image, (N, K) for K of them.

        Returns:
            maps (N, h, w), or (N, K, h, w) for classes (N, K), and logits (N, num_logits).

        Raises:
            ValueError: wrong shape or type, a class that the head does not have, a model that returns no logits.
            LayerError: the layer is not reached, or has no spatial map, or the logits do not depend on it.
        """
        if classes is None:
            maps, logits = self.explain(images, choose_predicted)
            return GradCAMResult(maps[:, 0], logits)
        _check_classes(classes, images)
        maps, logits = self.explain(images, lambda _: classes.reshape(len(classes), -1))
        return GradCAMResult(maps[:, 0] if classes.ndim == 1 else maps, logits)

    def explain(self, images: Float[Tensor, "N 3 H W"], choose: Callable[[Tensor], Tensor]) -> GradCAMResult:
        """Maps (N, K, h, w) for the classes (N, K) that ``choose`` picks once it has seen the logits (N, num_logits).

        So a class may depend on the prediction, and there is still one forward pass. Errors as in a call.
        """
        _check_images(images)
        if self._modes is None:
            raise RuntimeError("GradCAM works inside its block only: `with GradCAM(model) as cam: cam(images)`")
        with torch.inference_mode(False):
            if images.is_inference():  # neither gradients nor counts of what is overwritten can be had of it
                images = images.clone()
            place = self._place(images)
            with torch.no_grad(), _rng_and_autocast_kept(images):
                cut = Cut(leave_autocast=self._float32)
                with _branches_told(cut, images):
                    output = place.run(self.model, images, cut)
                scores = _logits(output, len(images))
            leaf, grid = cut.finished(place.layer)
            self.layer = cut.layer
            logits = _at_least_float32(scores.detach())
            classes = choose(logits)
            _check_classes(classes, images, num_logits=logits.shape[1])
            with torch.autocast(images.device.type, enabled=False):  # a backward pass must not round to bfloat16
                maps = _maps(_signed(scores, classes.to(scores.device)), classes, leaf, grid, self.layer)
        return GradCAMResult(maps, logits)

    def _place(self, images: Tensor) -> CallInput | ModuleTensor:
        if self._asked != "auto":
            return ModuleTensor(self._asked)
        size = tuple(images.shape[1:])
        if size not in self._found:
            with _rng_and_autocast_kept(images):
                self._found[size] = find_layer(self.model, images)
        return self._found[size]


def _maps(
    scores: Float[Tensor, "N K"], classes: Int[Tensor, "N K"], leaf: Tensor, grid: Grid, layer: str
) -> Float[Tensor, "N K h w"]:
    if not scores.requires_grad:
        raise LayerError(
            f"the logits do not depend on the {layer}; name a layer that leads to them, one that the model does not run under a "
            f"torch.no_grad() of its own"
        )
    maps: list[Tensor] = []
    for k, column in enumerate(classes.unbind(1)):
        twin = next((j for j in range(k) if torch.equal(classes[:, j], column)), None)
        maps.append(_map(scores[:, k], leaf, grid, layer) if twin is None else maps[twin])
    return torch.stack(maps, 1)


def _map(score: Float[Tensor, " N"], leaf: Tensor, grid: Grid, layer: str) -> Float[Tensor, "N h w"]:
    (gradients,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True, allow_unused=True)
    if gradients is None:
        raise LayerError(f"the logits do not depend on the {layer}; name a layer that leads to them")
    cells = grid.spread(gradients)
    if grid.num_prefix and not cells.any() and gradients.any():
        raise LayerError(
            f"the logits depend on the class token of the {layer} only, not on its grid; "
            "name a layer inside the last block or before it (its first norm, say), or take 'auto'"
        )
    return gradcam(grid.spread(leaf.detach()), cells)


def _signed(logits: Float[Tensor, "N num_logits"], classes: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """The score of each class: its logit; with a single logit, +logit for class 1 and -logit for class 0."""
    return logits * (2 * classes - 1) if logits.shape[1] == 1 else logits.gather(1, classes)


def _logits(output: object, num_images: int) -> Float[Tensor, "N num_logits"]:
    """The logits in what a model returned."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model must return logits (N, num_logits), got {_kind(output)}; wrap it in a module that returns them"
        )
    if found.ndim == 0 and num_images == 1:  # .squeeze() at the end of a model of one logit
        found = found[None]
    logits = found[:, None] if found.ndim == 1 else found.flatten(1) if found.shape[2:].numel() == 1 else found
    if logits.ndim != 2 or len(logits) != num_images or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"the model must return logits of shape ({num_images}, num_logits), got {found.dtype} of shape "
            f"{tuple(found.shape)}; GradCAM explains image classifiers"
        )
    return logits


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"images must be floating point of shape (N, C, H, W), N at least 1, got {images.dtype} of shape "
            f"{tuple(images.shape)}; preprocess uint8 images (Detector.preprocess), give one image as images[None]"
        )


def _check_classes(classes: Tensor, images: Tensor, *, num_logits: int | None = None) -> None:
    shapes = (2,) if num_logits is not None else (1, 2)
    whole = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    if not whole or classes.ndim not in shapes or len(classes) != len(images) or classes.numel() == 0:
        raise ValueError(
            f"classes must be integers of shape {'(N,) or ' if 1 in shapes else ''}(N, K) with N = {len(images)}, "
            f"a row for each image, got {classes.dtype} of shape {tuple(classes.shape)}"
        )
    if num_logits is None:
        return
    num_classes = max(num_logits, 2)
    if classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            f"classes must be in 0..{num_classes - 1} for {num_logits} logits, got values from {int(classes.min())} to "
            f"{int(classes.max())}"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _kind(output: object) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with the keys {list(output)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


@contextlib.contextmanager
def _branches_told(cut: Cut, images: Tensor) -> Iterator[None]:
    """What went on in float32 behind the cut met what another branch had computed under autocast."""
    autocast = torch.is_autocast_enabled(images.device.type)
    try:
        yield
    except RuntimeError as error:
        of_types = any(word in str(error) for word in ("dtype", "scalar type", "bias type"))
        missing = isinstance(error, NotImplementedError)
        if missing or not (of_types and autocast and cut.leave_autocast and cut.leaf is not None):
            raise
        raise LayerError(
            f"the {cut.layer} lies on one of several branches, which cannot go on in float32 alone ({error!s:.120}); name a "
            f"layer behind the place where they meet, take 'auto', or run in float32"
        ) from error


@contextlib.contextmanager
def _rng_and_autocast_kept(images: Tensor) -> Iterator[None]:
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind)
    with torch.random.fork_rng([images.device] if kind == "cuda" else []):
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, autocast)
