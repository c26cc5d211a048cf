"""The demo: real faces against made ones, two training strategies, three runs of each; no file and no network.

The real faces are from Labeled Faces in the Wild. The made faces have the mean, variances and correlations of the
*training* photographs only, so only structure beyond these gives a fake away; 58 components, the most that leave room
for noise, are harder to tell from photographs than 50. CYBORG (Boyd et al. 2023) is guided by a *simulated* annotator.

The rest is a study as any other: ``demo.toml`` says what is trained and compared, :mod:`explain2me.train.study` does it.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from explain2me.errors import Explain2MeError
from explain2me.run.files import atomic_path

ABOUT = (
    "Real: 100 face photographs of scikit-image's lfw_subset (25x25 pixels). Fake: faces drawn from probabilistic PCA "
    "(Tipping & Bishop 1999) fitted to the training photographs, with 50 and with 58 components (ppca50, ppca58). "
    "Detectors: a small CNN, trained here for seconds, 3 runs each, with cross-entropy and with CYBORG guidance by a "
    "SIMULATED annotator (blobs on eyes, nose and mouth; no person drew them)."
)
ARCHITECTURE = "timm:test_byobnet"
INPUT_SIZE = 160  # the smallest at which the network keeps 5x5 cells
NUM_RUNS = 3
NUM_COMPONENTS = {"ppca50": 50, "ppca58": 58}
SPLITS = {"train": 60, "test": 40}
"""Photographs in each split; each generator draws as many, but half as many to train on, so that labels balance."""

SIDE = 25  # of a photograph in pixels
LANDMARKS = ((8.0, 6.0), (8.0, 15.0), (14.5, 10.5), (17.5, 10.5))
"""(row, column) in pixels of the eyes, the nose and the mouth of the mean photograph."""

CONFIG = """\
name = "demo"
seed = {seed}

[data]
manifest = "images/manifest.csv"
split = "test"
positive = "fake"

[training]
architectures = ["{architecture}"]
input_size = {input_size}
runs = {runs}
split = "train"
epochs = 12
batch_size = 16
device = "cpu"
workers = 2

[[training.strategies]]
name = "cross-entropy"

[[training.strategies]]
name = "guided-simulated"
loss = "cyborg"
cam_class = "true"

[training.optimizer]
learning_rate = 0.1
weight_decay = 1e-4
schedule = "cosine"

[training.augmentation]
flip = true
shift = 0.04

[compute]
device = "cpu"
workers = 2
"""
"""The study of the demo; networks this small gain nothing from a second thread, and much from a second process."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and of how much."""


def prepare(out: Path, *, seed: int = 7, progress: Progress | None = None) -> Path:
    """Make the demo's images and annotations and write the config of its study; what is there already is kept.

    Args:
        out: folder for ``demo.toml`` and ``images/``.
        seed: of the images, the annotations and the training.
        progress: called with the step, the number done and the number in all.

    Returns:
        ``out / "demo.toml"``.

    Raises:
        Explain2MeError: ``out`` holds a demo of another seed.
    """
    config = out / "demo.toml"
    text = CONFIG.format(seed=seed, architecture=ARCHITECTURE, input_size=INPUT_SIZE, runs=NUM_RUNS)
    if not config.exists():  # before anything else: it says what the folder holds
        _write(config, text)
    elif config.read_text(encoding="utf-8") != text:
        raise Explain2MeError(f"{str(config)!r} belongs to another demo (another seed?); give a new folder with --out")
    if not (out / "images" / "manifest.csv").exists():
        make_images(out / "images", seed=seed, progress=progress)
    return config


def make_images(folder: Path, *, seed: int, progress: Progress | None = None) -> Path:
    """Write photographs and made faces as ``label/source/NNN.png`` and list them; the manifest comes last.

    Args:
        folder: made if missing.
        seed: decides the split of the photographs, the faces drawn and the annotations.
        progress: called after each source.

    Returns:
        The manifest, with the columns path, label, source, split and, to train on, salience: simulated annotations.
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
    lines = ["path,label,source,split,salience"]
    for done, ((label, source), (faces, chosen)) in enumerate(sources.items(), start=1):
        annotations = simulated_annotations(len(faces), seed=seed + done).numpy()
        for i, (face, split, annotation) in enumerate(zip(faces, chosen, annotations, strict=True)):
            path = f"{label}/{source}/{i:03d}"
            _write_png(face, folder / f"{path}.png")
            salience = ""
            if split == "train":
                salience = f"salience/{path}.npy"
                (folder / salience).parent.mkdir(parents=True, exist_ok=True)
                np.save(folder / salience, annotation)
            lines.append(f"{path}.png,{label},{source},{split},{salience}")
        if progress:
            progress("make images", done, len(sources))
    return _write(folder / "manifest.csv", "\n".join(lines) + "\n")


def face_photographs() -> Float[np.ndarray, "100 25 25"]:
    """Grey face photographs in [0, 1]: the first 100 of scikit-image's ``lfw_subset``, stored as sums of three 8-bit channels."""
    with np.load(str(files("explain2me.demo") / "photographs.npz")) as stored:
        return stored["faces"] / (3 * 255)


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


def _write(path: Path, text: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _write_png(face: Float[np.ndarray, "25 25"], path: Path) -> None:
    """Grey [0, 1] to 8 bits, then enlarged to the input size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (255 * face.clip(0, 1)).round().astype(np.uint8)
    Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC).save(path)
