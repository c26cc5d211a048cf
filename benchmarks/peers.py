"""The work of a run as it is done without explain2me: TorchCAM, scikit-image and SciPy, and one image at a time.

Where there was a choice, the faster one for the peers was taken; README.md lists these choices.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.ndimage
import scipy.stats
import skimage.measure
import skimage.metrics
import skimage.transform
import skimage.util
import torch
from captum.attr import LayerGradCam
from PIL import Image
from pytorch_grad_cam import GradCAM as PytorchGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCAM

SIZE = 224
SHIFT = 16
SIGMA_SMOOTH = 5.0
SIGMA_MAX = 10.0
STACK_LEVELS = 16
AMOUNT = 0.05
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
TARGET_LAYER = {"torchvision:resnet50": "layer4", "torchvision:densenet121": "features"}
"""The layer behind which TorchCAM gives the map of the tensor that enters pooling."""

SHIFTS = {
    "shift_DR": (1, 1),
    "shift_R": (0, 1),
    "shift_UR": (-1, 1),
    "shift_D": (1, 0),
    "shift_U": (-1, 0),
    "shift_DL": (1, -1),
    "shift_L": (0, -1),
    "shift_UL": (-1, -1),
}
"""Steps down and to the right."""


class Turn(NamedTuple):
    """A flip or rotation of arrays (h, w) or (h, w, 3), and the way back."""

    apply: Callable[[np.ndarray], np.ndarray]
    undo: Callable[[np.ndarray], np.ndarray]


TURNS = {
    "flip_LR": Turn(np.fliplr, np.fliplr),
    "flip_UD": Turn(np.flipud, np.flipud),
    "rotate_90CC": Turn(lambda a: np.rot90(a, 1), lambda a: np.rot90(a, -1)),
    "rotate_90CW": Turn(lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 1)),
}
NOISE = f"salt_pepper@{AMOUNT:g}"
REMOVALS = ("focus_salient", "focus_nonsalient")


class Clock:
    """Sums seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``stage``."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Maps(NamedTuple):
    """A batch under one condition: ``maps`` and ``fixed`` (N, h, w), ``logits`` (N, C), ``classes`` (N,) predicted."""

    maps: np.ndarray
    fixed: np.ndarray
    logits: np.ndarray
    classes: np.ndarray


def peer_run(
    model: nn.Module, layer: str, files: Sequence[Path], folder: Path, *, batch_size: int, tuned: bool
) -> dict[str, float]:
    """Maps and scores of all files under all conditions, as Parquet; returns seconds by stage.

    Not ``tuned``: as the libraries' own first examples do it, a forward pass for each of the two classes and a filter
    for each step of the blur's strength.
    """
    clock = Clock()
    folder.mkdir(parents=True)
    batches: list[dict[str, Maps]] = []
    for start in range(0, len(files), batch_size):
        with clock("decode"):
            images = np.stack([decode(path) for path in files[start : start + batch_size]])
        batches.append(_explain_batch(model, layer, images, seed=start, tuned=tuned, clock=clock))
    found = {name: Maps(*map(np.concatenate, zip(*(b[name] for b in batches), strict=True))) for name in batches[0]}
    with clock("scores"):
        rows = list(_scores(found))
    with clock("write"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet", compression="zstd")
        pq.write_table(_maps_table(found), folder / "maps.parquet", compression="zstd")
    return clock.seconds


def one_at_a_time(
    rebuild: Callable[[], nn.Module], layer: str, files: Sequence[Path], *, filters: int = 100
) -> dict[str, float]:
    """Every image on its own, its model built and loaded for it; a filter for each step of the blur's strength."""
    clock = Clock()
    rows = []
    for i, path in enumerate(files):
        with clock("rebuild"):
            model = rebuild()
        with clock("decode"):
            image = decode(path)
        with clock("maps"):
            clean = _explain(model, layer, image[None], None)
        found = {"clean": clean}
        for name, changed in _noise_and_transforms(image[None], seed=i):
            with clock("maps"):
                found[name] = _explain(model, layer, changed, clean.classes)
        for name in REMOVALS:
            with clock("blur"):
                strength = blur_strength(clean.maps[0], remove=name)
                changed = blur_by_levels(image, strength, levels=filters)[None]
            with clock("maps"):
                found[name] = _explain(model, layer, changed, clean.classes)
        with clock("scores"):
            rows += list(_scores(found))
    return clock.seconds


def decode(path: Path) -> np.ndarray:
    """One file as uint8 (SIZE, SIZE, 3)."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    return np.array(rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def preprocess(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to normalised float32 (N, 3, H, W)."""
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # as torchvision reads images: the default layout
    return (torch.from_numpy(planes).float() / 255 - MEAN) / STD


def map_makers(model: nn.Module, layer: str) -> Mapping[str, Callable[[Tensor, Tensor], object]]:
    """Name -> function of (images, classes) that makes Grad-CAM maps for a batch, by library."""
    captum = LayerGradCam(model, model.get_submodule(layer))
    hooked = copy.deepcopy(model)  # its hooks stay
    grad_cam = PytorchGradCAM(model=hooked, target_layers=[hooked.get_submodule(layer)])

    def by_torchcam(images: Tensor, classes: Tensor) -> Tensor:
        with TorchCAM(model, layer) as cam:
            return cam(classes.tolist(), model(images), normalized=False)[0]

    def by_captum(images: Tensor, classes: Tensor) -> Tensor:
        return captum.attribute(images, target=classes, relu_attributions=True)[:, 0].detach()

    def by_grad_cam(images: Tensor, classes: Tensor) -> np.ndarray:
        return grad_cam(input_tensor=images, targets=[ClassifierOutputTarget(c) for c in classes.tolist()])

    return {"TorchCAM": by_torchcam, "Captum": by_captum, "pytorch-grad-cam": by_grad_cam}


def blur_strength(salience: np.ndarray, *, remove: str) -> np.ndarray:
    """Where a removal keeps the image: (SIZE, SIZE) in [0, 1], 1 = sharp."""
    t = np.clip(skimage.transform.resize(_minmax(salience), (SIZE, SIZE), order=3, mode="edge"), 0, 1)
    t = 1 - t if remove == "focus_salient" else t
    smooth = scipy.ndimage.gaussian_filter(t, SIGMA_SMOOTH)
    return smooth / smooth.max()


def blur_stack(image: np.ndarray) -> np.ndarray:
    """The image under STACK_LEVELS Gaussians, float32 (levels, SIZE, SIZE, 3); both removals take from it."""
    sigmas = np.linspace(0, 1, STACK_LEVELS) ** 2 * SIGMA_MAX
    pixels = image.astype(np.float32)
    return np.stack([pixels, *(scipy.ndimage.gaussian_filter(pixels, (s, s, 0), mode="reflect") for s in sigmas[1:])])


def blur_from_stack(stack: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Each pixel between the two levels next to its sigma, uint8 (SIZE, SIZE, 3)."""
    place = (1 - strength) ** 2 * (STACK_LEVELS - 1)  # sigma = 10 (1 - s)^4 and the levels go as the square
    low = np.minimum(place.astype(np.intp), STACK_LEVELS - 2)
    share = (place - low)[..., None]
    rows, columns = np.indices(strength.shape, sparse=True)
    mixed = stack[low, rows, columns] * (1 - share) + stack[low + 1, rows, columns] * share
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def blur_by_levels(image: np.ndarray, strength: np.ndarray, *, levels: int = 100) -> np.ndarray:
    """The strength cut into steps, one filter of the whole image for each step that occurs, cut to 8 bits."""
    steps = np.floor(strength * levels) / levels
    result = np.empty_like(image)
    for step in np.unique(steps):
        sigma = SIGMA_MAX * (1 - step) ** 4
        result[steps == step] = scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="reflect")[steps == step]
    return result


def _explain_batch(
    model: nn.Module, layer: str, images: np.ndarray, *, seed: int, tuned: bool, clock: Clock
) -> dict[str, Maps]:
    with clock("maps"):
        clean = _explain(model, layer, images, None)
    found = {"clean": clean}
    explain = _explain if tuned else _explain_twice
    changes = _noise_and_transforms(images, seed=seed)
    while True:
        with clock("noise, transforms"):
            name, changed = next(changes, ("", images))
        if not name:
            break
        with clock("maps"):
            found[name] = explain(model, layer, changed, clean.classes)
    remove = _both_removals if tuned else _removals_by_levels
    with clock("blur"):
        blurred = np.stack([remove(*pair) for pair in zip(images, clean.maps, strict=True)], axis=1)
    for name, changed in zip(REMOVALS, blurred, strict=True):
        with clock("maps"):
            found[name] = explain(model, layer, changed, clean.classes)
    return found


def _noise_and_transforms(images: np.ndarray, *, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    noisy = [skimage.util.random_noise(x, "s&p", amount=AMOUNT, rng=seed + i) for i, x in enumerate(images)]
    yield NOISE, np.rint(np.stack(noisy) * 255).astype(np.uint8)
    for name, (down, right) in SHIFTS.items():
        padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
        top, left = SHIFT * (1 - down), SHIFT * (1 - right)
        yield name, padded[:, top : top + SIZE, left : left + SIZE]
    for name, turn in TURNS.items():
        yield name, np.stack([turn.apply(image) for image in images])


def _both_removals(image: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """Blurred once for each of REMOVALS, (2, SIZE, SIZE, 3); a map with nothing in it changes nothing."""
    if not salience.max() > salience.min():
        return np.stack([image, image])
    stack = blur_stack(image)
    return np.stack([blur_from_stack(stack, blur_strength(salience, remove=name)) for name in REMOVALS])


def _removals_by_levels(image: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """The same with a filter for each step of the strength."""
    if not salience.max() > salience.min():
        return np.stack([image, image])
    return np.stack([blur_by_levels(image, blur_strength(salience, remove=name)) for name in REMOVALS])


def _explain(model: nn.Module, layer: str, images: np.ndarray, clean: np.ndarray | None) -> Maps:
    """Maps for the predicted and for the clean image's class, from one forward pass; the same ones where they agree."""
    with TorchCAM(model, layer) as cam:
        scores = model(preprocess(images))
        classes = scores.argmax(1).numpy()
        other = clean is not None and bool((clean != classes).any())
        maps = cam(classes.tolist(), scores, normalized=False, retain_graph=other)[0].numpy()
        fixed = cam(clean.tolist(), scores, normalized=False)[0].numpy() if clean is not None and other else maps
    return Maps(maps, fixed, scores.detach().numpy(), classes)


def _explain_twice(model: nn.Module, layer: str, images: np.ndarray, clean: np.ndarray) -> Maps:
    """The same with a forward pass for each of the two classes."""
    ours = _explain(model, layer, images, None)
    with TorchCAM(model, layer) as cam:
        fixed = cam(clean.tolist(), model(preprocess(images)), normalized=False)[0].numpy()
    return ours._replace(fixed=fixed)


def _scores(found: Mapping[str, Maps]) -> Iterator[dict[str, object]]:
    """One row an image, condition and variant; the chance level with the next image as the other one."""
    clean = found["clean"].maps
    count, levels = len(clean), clean[0].size
    for i, salience in enumerate(clean):
        cut = np.floor(255 * _minmax(salience)).astype(np.uint8)
        intensity = skimage.measure.shannon_entropy(cut) / math.log2(levels)
        spatial = scipy.stats.entropy(salience.ravel(), base=2) / math.log2(levels)
        row = {"image": i, "measure": "entropy", "condition": "clean", "chance": None}
        yield from (row | {"variant": "intensity", "value": intensity}, row | {"variant": "spatial", "value": spatial})
    wide_clean = [_upsample(salience) for salience in clean]
    for name, batch in found.items():
        if name == "clean":
            continue
        similarity, ours = (_overlap_ssim(name), wide_clean) if name in SHIFTS else (global_ssim, clean)
        theirs = _comparable(name, batch.maps)
        kept = batch.classes == found["clean"].classes
        others = theirs if kept.all() else _comparable(name, batch.fixed)
        for i in range(count):
            partner = (i + 1) % count
            value, chance = similarity(ours[i], theirs[i]), similarity(ours[i], theirs[partner])
            row = {"image": i, "measure": name.partition("_")[0], "condition": name}
            yield row | {"variant": "predicted", "value": value, "chance": chance}
            if not (kept[i] and kept[partner]):
                value, chance = similarity(ours[i], others[i]), similarity(ours[i], others[partner])
            yield row | {"variant": "fixed", "value": value, "chance": chance}


def _comparable(name: str, maps: np.ndarray) -> list[np.ndarray]:
    if name in SHIFTS:
        return [_upsample(salience) for salience in maps]
    return [TURNS[name].undo(salience) for salience in maps] if name in TURNS else list(maps)


def _overlap_ssim(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    spans = []
    for step in SHIFTS[name]:
        stay, gone = slice(SHIFT, None), slice(None, -SHIFT)
        spans.append({0: (slice(None), slice(None)), 1: (gone, stay), -1: (stay, gone)}[step])
    (clean_rows, rows), (clean_columns, columns) = spans
    return lambda clean, shifted: global_ssim(clean[clean_rows, clean_columns], shifted[rows, columns])


def global_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM with the largest window that fits, on maps scaled to [0, 1]; NaN where one has nothing in it."""
    if not (a.max() > a.min() and b.max() > b.min()):
        return float("nan")
    window = min(a.shape) - (min(a.shape) + 1) % 2
    return float(skimage.metrics.structural_similarity(_minmax(a), _minmax(b), win_size=window, data_range=1))


def _upsample(salience: np.ndarray) -> np.ndarray:
    return skimage.transform.resize(salience, (SIZE, SIZE), order=1, mode="edge")


def _minmax(salience: np.ndarray) -> np.ndarray:
    low, high = salience.min(), salience.max()
    return (salience - low) / (high - low) if high > low else np.zeros_like(salience)


def _maps_table(found: Mapping[str, Maps]) -> pa.Table:
    tables = []
    for name, batch in found.items():
        count = len(batch.maps)
        columns = {"image": np.arange(count), "condition": [name] * count, "predicted": batch.classes}
        columns |= {"logits": list(batch.logits), "map": list(batch.maps.reshape(count, -1))}
        tables.append(pa.table(columns | {"map_fixed": list(batch.fixed.reshape(count, -1))}))
    return pa.concat_tables(tables)
