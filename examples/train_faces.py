"""Train four checkpoints to put into faces.toml: two torchvision networks, two seeds each, cross-entropy.

python examples/train_faces.py FACES/manifest.csv examples/weights [--epochs 6]
"""

import argparse
from pathlib import Path

from explain2me.demo import read_split, train_run

ARCHITECTURES = ("mobilenet_v3_small", "shufflenet_v2_x0_5")


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    images, labels = read_split(options.manifest, "train", input_size=(224, 224), classes=("real", "fake"))
    for architecture in ARCHITECTURES:
        for seed in (1, 2):
            checkpoint = options.weights / f"{architecture}-{seed}.safetensors"
            if checkpoint.exists():
                continue
            train_run(
                checkpoint,
                images,
                labels,
                architecture=f"torchvision:{architecture}",
                seed=seed,
                epochs=options.epochs,
                learning_rate=0.05,
                on_epoch=lambda done, epochs, name=checkpoint.name: print(
                    f"{name}: epoch {done} of {epochs}", flush=True
                ),
            )


if __name__ == "__main__":
    main()
