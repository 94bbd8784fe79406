"""The inner loops of the views, compiled by numba: interpolation along an affine map, smoothing, shuffling.

They are compiled on the first call (`compile_all`) and not kept on disk: site-packages may be read-only. Without numba,
which supports a new Python some months late, scipy and numpy compute the same. They are exact, too, but several times
slower; `compiled` tells which are used.

C: channels, X Y Z: space.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

try:
    from numba import njit
except ImportError:
    njit = None

compiled = njit is not None


def interpolate(image: np.ndarray, matrix: np.ndarray, first: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate linearly at `first + matrix @ index` for each index of a grid. Border voxels repeat outside.

    Positions are computed in float64: in float32 they are off by 1e-5 voxels at an index of 100, which shows in noise.

    Args:
        image: (C, *spatial) float32, 2D or 3D.
        matrix: (d, d) float64, voxels of the image for a step of the grid.
        first: (d,) float64, position of the grid's first point, in voxels of the image.
        size: size of the grid.

    Returns:
        (C, *size) float32, a new array.
    """
    if not compiled:
        channels = [ndimage.affine_transform(c, matrix, first, size, order=1, mode="nearest") for c in image]
        return np.stack(channels)
    thick = 3 - len(size)  # a slice is a volume of one slice
    matrix_3d, first_3d = np.zeros((3, 3)), np.zeros(3)
    matrix_3d[thick:, thick:], first_3d[thick:] = matrix, first
    shape, size_3d = ((1,) * thick + tuple(s) for s in (image.shape[1:], size))
    view = np.empty((len(image), *size_3d), np.float32)
    _interpolate(np.ascontiguousarray(image).reshape(len(image), -1), shape, matrix_3d, first_3d, view)
    return view.reshape(len(image), *size)


def smooth(image: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Convolve each spatial axis with a symmetric kernel. Border voxels repeat outside.

    Args:
        image: (C, *spatial) float32.
        weights: for each spatial axis, the weights of the kernel's centre and of the voxels on one side.

    Returns:
        (C, *spatial) float32, a new array, or `image` itself.
    """
    image = np.ascontiguousarray(image)
    for axis, half in enumerate(weights, start=1):
        if len(half) == 1 or image.shape[axis] == 1:  # a constant along the axis stays unchanged
            continue
        if not compiled:
            image = ndimage.correlate1d(image, np.concatenate([half[:0:-1], half]), axis, mode="nearest")
            continue
        smoothed = np.empty_like(image)
        shape = (-1, image.shape[axis], math.prod(image.shape[axis + 1 :]))
        if axis == image.ndim - 1:
            _smooth_last(image.reshape(shape[:2]), half.astype(np.float32), smoothed.reshape(shape[:2]))
        else:
            _smooth(image.reshape(shape), half.astype(np.float32), smoothed.reshape(shape))
        image = smoothed
    return image


def shuffle_windows(image: np.ndarray, corners: np.ndarray, sizes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Shuffle the voxels within windows, in all channels alike. Where windows overlap, the last window wins.

    Each window shuffles voxels of the original image.

    Args:
        image: (C, *spatial) float32, 2D or 3D; unchanged.
        corners, sizes: (windows, d), first voxels and sizes of the windows, which lie in the image.
        uniform: a random number in [0, 1) for each voxel of each window, for Fisher and Yates' shuffle: from the last
            voxel on, each changes places with a random earlier voxel or stays.

    Returns:
        (C, *spatial) float32, a new array.
    """
    thick = 3 - corners.shape[1]  # a slice is a volume of one slice
    shape = np.array((1,) * thick + image.shape[1:])
    corners_3d = np.pad(corners, ((0, 0), (thick, 0))).astype(np.int64)
    sizes_3d = np.pad(sizes, ((0, 0), (thick, 0)), constant_values=1).astype(np.int64)
    source = np.ascontiguousarray(image).reshape(len(image), -1)
    taken = np.arange(source.shape[1])  # the voxel that each voxel takes
    _shuffle(shape, corners_3d, sizes_3d, uniform, taken)
    return source[:, taken].reshape(image.shape)


def compile_all() -> None:
    """Compile now (a few seconds), so that forked processes do not each compile."""
    interpolate(np.zeros((1, 2, 2, 2), np.float32), np.eye(3), np.zeros(3), (2, 2, 2))
    smooth(np.zeros((1, 2, 2, 2), np.float32), [np.ones(2)] * 3)
    shuffle_windows(np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 3), int), np.ones((1, 3), int), np.zeros(1))


def _interpolate(
    image: np.ndarray, shape: tuple[int, int, int], matrix: np.ndarray, first: np.ndarray, view: np.ndarray
) -> None:
    """Interpolate (C, X * Y * Z) of `shape` with (3, 3), (3,) into (C, *size), in place, line by line of the view.

    Indices are flat and unsigned: numba would check every signed index for counting from the end.
    """
    nx, ny, nz = shape
    sx, sy, sz = view.shape[1:]
    # step to the upper neighbour, and the last voxel with an upper neighbour
    step_x, step_y = np.uint32(min(nx - 1, 1) * ny * nz), np.uint32(min(ny - 1, 1) * nz)
    step_z = np.uint32(min(nz - 1, 1))
    last_x, last_y, last_z = np.int32(max(nx - 2, 0)), np.int32(max(ny - 2, 0)), np.int32(max(nz - 2, 0))
    end_x, end_y, end_z = nx - 1.0, ny - 1.0, nz - 1.0
    plane, row = np.int32(ny * nz), np.int32(nz)
    index = np.empty(sz, np.uint32)
    # weight of the upper neighbour for each axis
    share_x, share_y, share_z = np.empty(sz, np.float32), np.empty(sz, np.float32), np.empty(sz, np.float32)
    for i in range(sx):
        for j in range(sy):
            x0 = first[0] + matrix[0, 0] * i + matrix[0, 1] * j
            y0 = first[1] + matrix[1, 0] * i + matrix[1, 1] * j
            z0 = first[2] + matrix[2, 0] * i + matrix[2, 1] * j
            for k in range(sz):
                x = min(max(x0 + matrix[0, 2] * k, 0.0), end_x)
                y = min(max(y0 + matrix[1, 2] * k, 0.0), end_y)
                z = min(max(z0 + matrix[2, 2] * k, 0.0), end_z)
                ix, iy, iz = min(np.int32(x), last_x), min(np.int32(y), last_y), min(np.int32(z), last_z)
                index[k] = np.uint32(ix * plane + iy * row + iz)
                share_x[k], share_y[k], share_z[k] = x - ix, y - iy, z - iz
            for c in range(len(image)):
                voxels, line = image[c], view[c, i, j]
                for k in range(sz):
                    fx, fy, fz = share_x[k], share_y[k], share_z[k]
                    p = index[k]
                    q = p + step_y
                    near = voxels[p] + fz * (voxels[p + step_z] - voxels[p])
                    near += fy * (voxels[q] + fz * (voxels[q + step_z] - voxels[q]) - near)
                    p += step_x
                    q += step_x
                    far = voxels[p] + fz * (voxels[p + step_z] - voxels[p])
                    far += fy * (voxels[q] + fz * (voxels[q + step_z] - voxels[q]) - far)
                    line[k] = near + fx * (far - near)


def _smooth(image: np.ndarray, half: np.ndarray, smoothed: np.ndarray) -> None:
    """Smooth the second of three axes, in place. Innermost loops run along slices: others are not vectorised."""
    before, length, after = image.shape
    for a in range(before):
        for i in range(length):
            to, centre, weight = smoothed[a, i], image[a, i], half[0]
            for k in range(after):
                to[k] = weight * centre[k]
            for shift in range(1, len(half)):
                low, high = image[a, max(i - shift, 0)], image[a, min(i + shift, length - 1)]
                weight = half[shift]
                for k in range(after):
                    to[k] += weight * (low[k] + high[k])


def _smooth_last(image: np.ndarray, half: np.ndarray, smoothed: np.ndarray) -> None:
    """Smooth the second of two axes, in place, along lines of memory."""
    before, length = image.shape
    reach = len(half) - 1
    padded = np.empty(length + 2 * reach, np.float32)
    for a in range(before):
        line, to = image[a], smoothed[a]
        weight = half[0]
        for i in range(length):  # a loop, because assigning slices takes numba two seconds more to compile
            to[i] = weight * line[i]
            padded[reach + i] = line[i]
        for i in range(reach):
            padded[i], padded[reach + length + i] = line[0], line[length - 1]
        for shift in range(1, reach + 1):
            low, high = padded[reach - shift :], padded[reach + shift :]
            weight = half[shift]
            for i in range(length):
                to[i] += weight * (low[i] + high[i])


def _shuffle(shape: np.ndarray, corners: np.ndarray, sizes: np.ndarray, uniform: np.ndarray, taken: np.ndarray) -> None:
    """Write the flat index of the source of each voxel in the windows, in place."""
    plane, row = shape[1] * shape[2], shape[2]
    voxels = np.empty(uniform.size, np.int64)  # more than a window has
    first = 0
    for w in range(len(corners)):
        x, y, z = corners[w]
        nx, ny, nz = sizes[w]
        number = nx * ny * nz
        k = 0
        for i in range(nx):
            for j in range(ny):
                start = (x + i) * plane + (y + j) * row + z
                for m in range(nz):
                    voxels[k] = start + m
                    k += 1
        for k in range(number - 1, 0, -1):
            other = np.int64(uniform[first + k] * (k + 1))
            voxels[k], voxels[other] = voxels[other], voxels[k]
        k = 0
        for i in range(nx):
            for j in range(ny):
                start = (x + i) * plane + (y + j) * row + z
                for m in range(nz):
                    taken[start + m] = voxels[k]
                    k += 1
        first += number


def _shuffle_by_numpy(
    shape: np.ndarray, corners: np.ndarray, sizes: np.ndarray, uniform: np.ndarray, taken: np.ndarray
) -> None:
    """Do the same as `_shuffle` without compiling: one voxel of all windows at a time."""
    numbers = sizes.prod(1)
    firsts = np.cumsum(numbers) - numbers
    window = np.repeat(np.arange(len(sizes)), numbers)
    k = np.arange(len(window)) - firsts[window]
    (x, y, z), (_, ny, nz) = corners[window].T, sizes[window].T
    voxels = (x + k // (ny * nz)) * shape[1] * shape[2] + (y + k // nz % ny) * shape[2] + z + k % nz
    shuffled = voxels.copy()
    largest_first = np.argsort(-numbers, kind="stable")
    firsts, ascending = firsts[largest_first], np.sort(numbers)
    for last in range(int(ascending[-1]) - 1, 0, -1):
        of_windows = firsts[: len(numbers) - np.searchsorted(ascending, last, side="right")]  # more than `last` voxels
        here = of_windows + last
        other = of_windows + (uniform[here] * (last + 1)).astype(np.int64)
        shuffled[here], shuffled[other] = shuffled[other], shuffled[here]
    taken[voxels] = shuffled  # for equal indices numpy assigns the last value


if compiled:
    _interpolate, _smooth, _smooth_last = njit(_interpolate), njit(_smooth), njit(_smooth_last)
    _shuffle = njit(_shuffle)
else:
    _shuffle = _shuffle_by_numpy
