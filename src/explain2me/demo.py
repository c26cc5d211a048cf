"""The demo: real faces against made ones, two training strategies, three runs of each; no file and no network.

- Real: the 100 face photographs (25x25, grey) in scikit-image's ``lfw_subset``, from Labeled Faces in the Wild.
- Fake: faces drawn from probabilistic PCA (Tipping and Bishop 1999), with 50 and with 58 components, fitted to the 60
  *training* photographs only. It has their mean, variances and correlations, so only structure beyond these gives a
  fake away; 58 components, the most that leave room for noise, are harder to tell from photographs than 50.
- Strategies: cross-entropy, and CYBORG (Boyd et al. 2023) guided by a *simulated* annotator.

The training loop is small on purpose; it serves a short training on a folder of larger images as well.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from explain2me.decode import load_image
from explain2me.detectors import load_detector
from explain2me.errors import Explain2MeError, ManifestError
from explain2me.executors.local import run_tasks
from explain2me.manifest import check_labels, image_root, list_images, resolve
from explain2me.store import atomic_path

ABOUT = (
    "Real: 100 face photographs of scikit-image's lfw_subset (25x25 pixels). Fake: faces drawn from probabilistic PCA "
    "(Tipping & Bishop 1999) fitted to the training photographs, with 50 and with 58 components (ppca50, ppca58). "
    "Detectors: a small CNN, trained here for seconds, 3 runs each, with cross-entropy and with CYBORG guidance by a "
    "SIMULATED annotator (blobs on eyes, nose and mouth; no person drew them)."
)
ARCHITECTURE = "timm:test_byobnet"
INPUT_SIZE = 160  # the smallest at which the network keeps 5x5 cells
STRATEGIES = ("cross-entropy", "guided-simulated")
NUM_RUNS = 3
NUM_COMPONENTS = {"ppca50": 50, "ppca58": 58}
SPLITS = {"train": 60, "test": 40}
"""Photographs in each split; each generator draws as many, but half as many to train on, so that labels balance."""

SIDE = 25  # of a photograph in pixels
LANDMARKS = ((8.0, 6.0), (8.0, 15.0), (14.5, 10.5), (17.5, 10.5))
"""(row, column) in pixels of the eyes, the nose and the mouth of the mean photograph."""

FLAT_RANGE = 1e-6  # of a CAM; below it, min-max scaling would only magnify rounding

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and of how much."""


def prepare(out: Path, *, seed: int = 7, progress: Progress | None = None) -> Path:
    """Make the demo's images, train its detectors and write the config of its run.

    A second call does only what is missing.

    Args:
        out: folder for ``demo.toml``, ``images/`` and ``weights/``.
        seed: of the images, the annotations and the training.
        progress: told of each step.

    Returns:
        ``out / "demo.toml"``.

    Raises:
        Explain2MeError: ``out`` holds a demo of another seed.
    """
    config = _write_config(out, seed)
    manifest = out / "images" / "manifest.csv"
    if not manifest.exists():
        make_images(manifest.parent, seed=seed, progress=progress)
    runs = [Training(out, strategy, run, seed) for strategy in STRATEGIES for run in range(NUM_RUNS)]
    missing = [run for run in runs if not run.checkpoint.exists()]
    tell = progress or (lambda what, done, total: None)
    tell("train detectors", len(runs) - len(missing), len(runs))
    # networks this small gain nothing from a second thread, and much from a second process
    trained = run_tasks(train_detector, missing, workers=min(os.cpu_count() or 1, len(runs)))
    for left, _ in zip(range(len(missing) - 1, -1, -1), trained, strict=True):
        tell("train detectors", len(runs) - left, len(runs))
    return config


class Training(NamedTuple):
    """One run of one strategy of the demo in ``out``."""

    out: Path
    strategy: str
    run: int
    seed: int

    @property
    def checkpoint(self) -> Path:
        """The file to write."""
        return self.out / "weights" / self.strategy / f"run{self.run}.safetensors"


def train_detector(training: Training) -> None:
    """Train one of the demo's detectors; the same run of both strategies starts from the same weights."""
    manifest = training.out / "images" / "manifest.csv"
    images, labels = read_split(manifest, "train", input_size=(INPUT_SIZE, INPUT_SIZE), classes=("real", "fake"))
    train_run(
        training.checkpoint,
        images,
        labels,
        architecture=ARCHITECTURE,
        human_maps=None
        if training.strategy == "cross-entropy"
        else simulated_annotations(len(images), seed=training.seed),
        seed=training.seed + training.run,
    )


# ------------------------------------------------------------------------------------------------------------ images


def make_images(folder: Path, *, seed: int, progress: Progress | None = None) -> Path:
    """Write photographs and made faces as ``label/source/NNN.png`` and list them; the manifest comes last.

    Args:
        folder: made if missing.
        seed: decides the split of the photographs and the faces drawn.
        progress: told after each source.

    Returns:
        The manifest, with the columns path, label, source, split.
    """
    rng = np.random.default_rng(seed)
    photographs = face_photographs()[rng.permutation(sum(SPLITS.values()))]
    training = photographs[: SPLITS["train"]].reshape(-1, SIDE * SIDE)
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    sources = {("real", "lfw_subset"): (photographs, splits)}
    for name, num_components in NUM_COMPONENTS.items():
        chosen = splits[SPLITS["train"] // len(NUM_COMPONENTS) :]
        faces = draw_faces(fit_ppca(training, num_components), len(chosen), rng=rng)
        sources["fake", name] = faces.reshape(-1, SIDE, SIDE), chosen
    lines = ["path,label,source,split"]
    for done, ((label, source), (faces, chosen)) in enumerate(sources.items(), start=1):
        for i, (face, split) in enumerate(zip(faces, chosen, strict=True)):
            path = f"{label}/{source}/{i:03d}.png"
            _write_png(face, folder / path)
            lines.append(f"{path},{label},{source},{split}")
        if progress:
            progress("make images", done, len(sources))
    manifest = folder / "manifest.csv"
    with atomic_path(manifest) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def face_photographs() -> Float[np.ndarray, "100 25 25"]:
    """The face photographs of ``skimage.data.lfw_subset``, grey in [0, 1], read from the installed package only."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / "lfw_subset.npy"
    try:
        return np.load(path)[:100]
    except FileNotFoundError:
        raise Explain2MeError(
            "scikit-image is installed without its lfw_subset.npy, which holds the demo's photographs; "
            "install scikit-image from its wheel"
        ) from None


class Ppca(NamedTuple):
    """Probabilistic PCA: ``mean + factors @ z + sigma * noise``, with z and noise standard normal.

    ``mean`` (d,), ``factors`` (d, q), ``sigma`` in the units of the data.
    """

    mean: Float[np.ndarray, " d"]
    factors: Float[np.ndarray, "d q"]
    sigma: float


def fit_ppca(data: Float[np.ndarray, "N d"], num_components: int) -> Ppca:
    """Fit by maximum likelihood: eq. 7 and 8 of Tipping and Bishop 1999.

    >>> model = fit_ppca(np.array([[3.0, 1.0], [-3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]), 1)
    >>> model.mean.tolist(), round(model.sigma**2, 6), abs(model.factors[:, 0]).round(6).tolist()
    ([0.0, 1.0], 0.5, [2.0, 0.0])
    """
    mean = data.mean(0)
    _, singular, axes = np.linalg.svd(data - mean, full_matrices=False)
    variances = singular**2 / len(data)
    kept, dropped = variances[:num_components], variances[num_components:]
    noise = dropped.sum() / (data.shape[1] - num_components)
    return Ppca(mean, axes[:num_components].T * np.sqrt(kept - noise), float(np.sqrt(noise)))


def draw_faces(model: Ppca, count: int, *, rng: np.random.Generator) -> Float[np.ndarray, "N d"]:
    """Draw ``count`` samples of the model, its noise included."""
    dimensions, num_components = model.factors.shape
    latent = rng.standard_normal((count, num_components))
    return model.mean + latent @ model.factors.T + model.sigma * rng.standard_normal((count, dimensions))


def read_split(
    manifest: Path, split: str | None, *, input_size: tuple[int, int], classes: tuple[str, ...]
) -> tuple[UInt8[Tensor, "N 3 H W"], Int[Tensor, " N"]]:
    """All images of one split of a manifest, resized to ``input_size``, with their labels as positions in ``classes``.

    Raises:
        Explain2MeError: the manifest is wrong, a label is not among ``classes``, or an image cannot be used.
    """
    table = list_images(manifest, split=split)
    if table["label"].null_count:
        raise ManifestError(
            f"{str(manifest)!r}: training needs labels, and this manifest has none; add a column 'label'"
        )
    check_labels(table, classes)
    root = image_root(manifest)
    images = [load_image(resolve(root, path), input_size) for path in table["path"].to_pylist()]
    return torch.stack(images), torch.tensor([classes.index(label) for label in table["label"].to_pylist()])


# ---------------------------------------------------------------------------------------------- simulated annotation


def simulated_annotations(count: int, *, seed: int) -> Float[Tensor, "N 25 25"]:
    """Maps that a simulated annotator would draw: a blob on each eye, the nose and the mouth, in [0, 1].

    The blobs stand at the places of the mean photograph, moved about by a pixel each: the annotator does not look at
    the image. Nothing here comes from people.
    """
    rng = np.random.default_rng([seed, 1])
    centres = np.array(LANDMARKS) + rng.normal(0, 0.7, (count, len(LANDMARKS), 2))
    widths = rng.uniform(1.5, 2.5, (count, len(LANDMARKS), 1, 1))
    grid = np.arange(SIDE)
    rows = grid[:, None] - centres[..., 0, None, None]
    columns = grid[None, :] - centres[..., 1, None, None]
    blobs = np.exp(-(rows**2 + columns**2) / (2 * widths**2))
    return torch.from_numpy(blobs.max(1)).float()


# ---------------------------------------------------------------------------------------------------------- training


def train_run(
    checkpoint: Path,
    images: UInt8[Tensor, "N 3 H W"],
    labels: Int[Tensor, " N"],
    *,
    architecture: str,
    seed: int,
    human_maps: Float[Tensor, "N h w"] | None = None,
    num_classes: int = 2,
    epochs: int = 12,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    alpha: float = 0.5,
    max_shift: float = 0.04,
    device: str = "cpu",
    on_epoch: Callable[[int, int], None] | None = None,
) -> Path:
    """Train one run from random weights and save it; the global random state stays as it was.

    SGD with momentum 0.9 and a cosine to zero. Each image is mirrored half of the time and shifted, its human map with
    it.

    Args:
        checkpoint: safetensors file to write.
        images: all of them, in memory, at the model's input size.
        labels: class of each, as the position of its logit.
        architecture: ``timm:NAME`` or ``torchvision:NAME``, ending in global average pooling and a linear head.
        seed: of the weights, the order and the augmentation.
        human_maps: one per image, of any resolution; NaN where there is none. Given: CYBORG; None: cross-entropy.
        num_classes: logits.
        epochs: passes over the images.
        batch_size: images a step; a smaller last batch is left out.
        learning_rate: at the start.
        alpha: weight of cross-entropy in CYBORG, in [0, 1].
        max_shift: largest shift as a fraction of the side.
        device: to train on.
        on_epoch: called with the epochs done and their number.

    Returns:
        ``checkpoint``.

    Raises:
        ValueError: labels or human maps do not go with the images, or a batch would be larger than all of them.
    """
    _check_training(images, labels, human_maps, batch_size)
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)  # dropout, where the architecture has it
        size = (images.shape[2], images.shape[3])
        detector = load_detector(architecture, num_classes=num_classes, input_size=size, seed=seed)
        model = detector.model.to(device).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            for picked in _steps(len(images), batch_size, generator):
                maps = None if human_maps is None else human_maps[picked]
                pixels, maps = augment(images[picked], maps, max_shift=max_shift, generator=generator)
                inputs, targets = detector.preprocess(pixels.to(device)), labels[picked].to(device)
                if maps is None:
                    loss = F.cross_entropy(model(inputs), targets)
                else:
                    logits, cams = class_activation_maps(model, inputs, targets)
                    loss = cyborg_loss(logits, targets, cams, maps.to(device), alpha=alpha)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
            schedule.step()
            if on_epoch:
                on_epoch(epoch + 1, epochs)
    with atomic_path(checkpoint) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, temporary)
    return checkpoint


def cyborg_loss(
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    cams: Float[Tensor, "N h w"],
    human_maps: Float[Tensor, "N a b"],
    *,
    alpha: float = 0.5,
) -> Float[Tensor, ""]:
    """Mean over images of ``alpha * CE + (1 - alpha) * MSE(minmax(CAM), minmax(human map))``; Boyd et al. 2023.

    An image whose human map is not finite or is flat has none, and contributes its cross-entropy alone. A flat CAM
    scales to zeros, without a gradient. Human maps are resized to the CAMs.
    """
    errors = F.cross_entropy(logits, labels, reduction="none")
    has_map = human_maps.isfinite().all(2).all(1)
    human_maps = torch.where(has_map[:, None, None], human_maps, 0.0)
    resized = F.interpolate(human_maps[:, None], cams.shape[1:], mode="bilinear", antialias=True)[:, 0]
    wanted, says_where = _minmax(resized)
    differences = (_minmax(cams)[0] - wanted).square().mean((1, 2))
    return torch.where(has_map & says_where, alpha * errors + (1 - alpha) * differences, errors).mean()


def class_activation_maps(
    model: nn.Module, inputs: Float[Tensor, "N 3 H W"], classes: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N h w"]]:
    """Logits, and for each image the head's weights of its class times the last feature maps, both with gradients.

    Raises:
        ValueError: the model does not end in a pooling module and a linear head.
    """
    pools = [module for name, module in model.named_modules() if name.split(".")[-1] in ("global_pool", "avgpool")]
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not pools or not heads:
        raise ValueError(
            f"CYBORG needs a model that ends in a pooling module and a linear head, got {type(model).__name__}; "
            f"train it with cross-entropy"
        )
    kept: list[Tensor] = []
    hook = pools[-1].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        logits = model(inputs)
    finally:
        hook.remove()
    return logits, torch.einsum("nc,nchw->nhw", heads[-1].weight[classes], kept[-1])


def augment(
    images: UInt8[Tensor, "N 3 H W"],
    human_maps: Float[Tensor, "N h w"] | None,
    *,
    max_shift: float,
    generator: torch.Generator,
) -> tuple[UInt8[Tensor, "N 3 H W"], Float[Tensor, "N h w"] | None]:
    """Mirror half of the images and shift each by up to ``max_shift`` of its side, edges repeated; maps go along."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    shifts = (2 * torch.rand(len(images), 2, generator=generator) - 1) * max_shift
    return _moved(images, mirrored, shifts), None if human_maps is None else _moved(human_maps, mirrored, shifts)


def _moved(pixels: Tensor, mirrored: Bool[Tensor, " N"], shifts: Float[Tensor, "N 2"]) -> Tensor:
    """(N, ..., H, W) by whole pixels; the shifts are fractions of the sides."""
    height, width = pixels.shape[-2:]
    moved = torch.empty_like(pixels)
    for i, (down, right) in enumerate(shifts.tolist()):
        rows = (torch.arange(height) - round(down * height)).clamp(0, height - 1)
        columns = (torch.arange(width) - round(right * width)).clamp(0, width - 1)
        moved[i] = pixels[i][..., rows, :][..., columns.flip(0) if mirrored[i] else columns]
    return moved


def _minmax(maps: Float[Tensor, "N h w"]) -> tuple[Float[Tensor, "N h w"], Bool[Tensor, " N"]]:
    """Each map, of any sign, scaled to [0, 1], and whether it varies; zeros without a gradient where it does not."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varies = high - low > FLAT_RANGE
    scaled = (maps - low) / torch.where(varies, high - low, 1.0)
    return torch.where(varies, scaled, 0.0), varies[:, 0, 0]


def _steps(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    return (part for part in torch.split(order, batch_size) if len(part) == batch_size)


def _check_training(images: Tensor, labels: Tensor, human_maps: Tensor | None, batch_size: int) -> None:
    for name, others in (("labels", labels), ("human_maps", human_maps)):
        if others is not None and len(others) != len(images):
            raise ValueError(f"expected one of {name} for each of {len(images)} images, got {len(others)}")
    if not 0 < batch_size <= len(images):
        raise ValueError(f"expected a batch_size of 1 to {len(images)}, the number of images, got {batch_size}")


# ------------------------------------------------------------------------------------------------------------- files


def _write_config(out: Path, seed: int) -> Path:
    """Write demo.toml, which says what the folder holds, before anything else."""
    detectors = "".join(
        f'\n[[detectors]]\nname = "{name}"\narchitecture = "{ARCHITECTURE}"\ninput_size = {INPUT_SIZE}\n'
        f'checkpoints = "weights/{name}/*.safetensors"\n'
        for name in STRATEGIES
    )
    text = (
        f'name = "demo"\nseed = {seed}\n\n[data]\nmanifest = "images/manifest.csv"\nsplit = "test"\n'
        f'positive = "fake"\n{detectors}\n[compute]\nworkers = 2\n'
    )
    path = out / "demo.toml"
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        raise Explain2MeError(f"{str(path)!r} belongs to another demo (another seed?); give a new folder with --out")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _write_png(face: Float[np.ndarray, "25 25"], path: Path) -> None:
    """Grey [0, 1] to 8 bits, then enlarged to the input size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (255 * face.clip(0, 1)).round().astype(np.uint8)
    Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC).save(path)
