"""Photographs that scikit-image ships, as tensors.

Source: van der Walt et al., "scikit-image: image processing in Python", PeerJ 2 (2014).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor


@functools.cache
def photographs(name: str) -> tuple[Tensor, ...]:
    """Return what ``skimage.data.<name>()`` gives, one image or several, in float64; colours of 8 bits are in 0..1."""
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            "this image comes with scikit-image; install it with: pip install 'subspace-meta[train]'"
        ) from error
    found: Any = getattr(skimage.data, name)()
    images = found if isinstance(found, tuple) else (found,)
    return tuple(
        torch.tensor(np.asarray(image, dtype=np.float64)) / (255.0 if image.dtype == np.uint8 else 1.0)
        for image in images
    )
