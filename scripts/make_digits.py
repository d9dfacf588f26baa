"""Make the digits in ``torchext/data/digits`` from the copy of the UCI set that scikit-learn ships.

Run ``python scripts/make_digits.py`` to write the four files, and with ``--check`` to compare what
is there with what would be written. It needs scikit-learn beside torch and torchext:
``pip install scikit-learn``. The result is the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchext.data.idx import write_idx

FOLDER = Path(__file__).resolve().parent.parent / "torchext" / "data" / "digits"
TEST_IMAGES = 297  # of 1,797: 1,500 are left to train on
INK = 16  # the source's pixels are 0..16, the number of inked cells in a 4 x 4 block


def enlarge(pixels: Tensor) -> Tensor:
    """Resample to 28 x 28 and scale to 0..255.

    Args:
        pixels: the source's images, 0..16.  # (N, 8, 8)

    Returns:
        The images as uint8.  # (N, 28, 28)
    """
    scaled = pixels.to(torch.float64).unsqueeze(1) * (255 / INK)
    smooth = F.interpolate(scaled, size=(28, 28), mode="bicubic", align_corners=False)
    # Exact halves occur (a pixel between 0 and 16), and the last bit of a float64 depends on the
    # machine: this moves every half up. Other values lie at least 5e-10 away from a half.
    return (smooth.squeeze(1) + (0.5 + 1e-10)).floor().clamp(0, 255).to(torch.uint8)


def held_out(labels: Tensor) -> Tensor:
    """Choose the test images: evenly spaced through the samples in order of their class.

    So each class gives its share, taken from all over the source, and no generator of random
    numbers has to stay the same for the split to stay the same.

    Args:
        labels: the classes.  # (N,)

    Returns:
        True where the sample is for testing.  # (N,)
    """
    by_class = labels.argsort(stable=True)
    steps = torch.arange(len(labels) + 1) * TEST_IMAGES // len(labels)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[steps.diff() == 1]] = True
    return chosen


def make(folder: Path) -> list[Path]:
    """Write the four files.

    Args:
        folder: where to; it is created if need be.

    Returns:
        The files' paths.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    source = load_digits()
    labels = torch.from_numpy(source.target).to(torch.uint8)
    images = enlarge(torch.from_numpy(source.images))
    test = held_out(labels)
    files = {
        "train-images-idx3-ubyte": images[~test],
        "train-labels-idx1-ubyte": labels[~test],
        "t10k-images-idx3-ubyte": images[test],
        "t10k-labels-idx1-ubyte": labels[test],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        write_idx(folder / name, values)
    return [folder / name for name in files]


def check(folder: Path) -> int:
    """Compare the files in a folder with what ``make`` writes.

    Args:
        folder: the folder to check.

    Returns:
        The exit code: 0 if all are the same.
    """
    import tempfile

    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        for fresh in make(Path(scratch)):
            present = folder / fresh.name
            same = present.is_file() and present.read_bytes() == fresh.read_bytes()
            print(
                f"{'same' if same else 'DIFFERENT' if present.exists() else 'MISSING'}  {present}"
            )
            different += not same
    return 1 if different else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the embedded digits.")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args()
    if options.check:
        return check(options.out)
    for path in make(options.out):
        print(f"{path.stat().st_size:>9,} bytes  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
