"""Preprocessed cases of noise."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np


def write(path: Path, array: np.ndarray) -> np.ndarray:
    """Write an image as nnU-Net's preprocessing does, in chunks of half an axis; return it."""
    blosc2.asarray(array, chunks=(1, *(max(1, n // 2) for n in array.shape[1:])), urlpath=str(path), mode="w")
    return array


def write_three(folder: Path) -> Path:
    """Write three cases of different shapes with two channels, as nnU-Net names them; return the folder."""
    rng = np.random.default_rng(0)
    for name, shape in (("b", (2, 12, 14, 9)), ("a", (2, 20, 8, 10)), ("c", (2, 3, 30, 30))):
        write(folder / f"{name}.b2nd", rng.standard_normal(shape).astype(np.float32))
        write(folder / f"{name}_seg.b2nd", np.zeros((1, *shape[1:]), dtype=np.int8))
        (folder / f"{name}.pkl").write_bytes(b"not to be read")
    return folder
