"""The warning of unlabelled scans that do not look like the labelled cases."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.semi_supervised.likeness import features_of, warning_of_unlike

SMOOTH = 2.0


def written(folder: Path, name: str, image: np.ndarray) -> Case:
    path = folder / f"{name}.npy"
    np.save(path, image.astype(np.float32))
    return Case(name, str(path))


def scan(seed: int, shape: tuple[int, ...] = (1, 12, 40, 40)) -> np.ndarray:
    """Return a smooth, z-scored image. Its intensities are skewed."""
    rng = np.random.default_rng(seed)
    image = np.exp(8 * gaussian_filter(rng.normal(size=shape), (0, SMOOTH, SMOOTH, SMOOTH)))
    return (image - image.mean()) / image.std()


def cases(folder: Path, number: int, first: int = 0, change=lambda image: image) -> list[Case]:
    return [written(folder, f"{first}_{i}", change(scan(1000 * first + i))) for i in range(number)]


@pytest.mark.parametrize("labelled", [1, 2, 5])
def test_scans_of_the_same_kind_raise_no_warning(tmp_path: Path, labelled: int) -> None:
    for first in range(5):
        found = warning_of_unlike(cases(tmp_path, labelled, 2 * first), cases(tmp_path, 20, 2 * first + 1), ["MRI"])
        assert not found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda image: -image, "quantile of the intensities"),
        (lambda image: image + 1.5, "quantile of the intensities"),
        (lambda image: np.random.default_rng(0).permuted(image), "log of the roughness"),
        (lambda image: 0 * image, "quantile of the intensities"),
    ],
)
def test_scans_of_another_kind_are_named(tmp_path: Path, change, named: str) -> None:
    labelled, unlabelled = cases(tmp_path, 3), cases(tmp_path, 20, 1, change)
    found = warning_of_unlike(labelled, unlabelled, ["MRI"])
    assert found.startswith("WARNING: the unlabelled scans do not look like the labelled cases")
    assert named in found
    assert "of channel MRI" in found


def test_the_channel_that_differs_is_named(tmp_path: Path) -> None:
    def both(image: np.ndarray) -> np.ndarray:
        return np.concatenate([image, image])

    def changed(image: np.ndarray) -> np.ndarray:
        return np.concatenate([image, -image])

    found = warning_of_unlike(cases(tmp_path, 3, 0, both), cases(tmp_path, 20, 1, changed), ["T1", "T2"])
    assert "of channel T2" in found


def test_a_few_other_scans_among_many_raise_no_warning(tmp_path: Path) -> None:
    unlabelled = [*cases(tmp_path, 20, 1), *cases(tmp_path, 4, 2, lambda image: -image)]
    assert not warning_of_unlike(cases(tmp_path, 3), unlabelled, ["MRI"])


def test_the_features_are_quantiles_and_roughness(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(101.0), (1, 3, 7, 101))
    (found,) = features_of(written(tmp_path, "ramp", ramp))
    np.testing.assert_allclose(found[:5], [5, 25, 50, 75, 95], rtol=1e-5)
    # neighbours differ by 0 along one axis and by 1 along the other
    np.testing.assert_allclose(found[5], np.log(0.5 / np.arange(101).std()), rtol=1e-4)


def test_unreadable_cases_are_not_counted(tmp_path: Path) -> None:
    bad = Path(written(tmp_path, "bad", scan(0)).path)
    bad.write_bytes(b"no array")
    unlabelled = [Case("bad", str(bad)), *cases(tmp_path, 5, 1)]
    assert not warning_of_unlike(cases(tmp_path, 3), unlabelled, ["MRI"])
    assert not warning_of_unlike(cases(tmp_path, 3), unlabelled[:1], ["MRI"])


def test_a_labelled_case_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    image = scan(0)
    image[0, 1] = np.nan
    labelled = [written(tmp_path, "bad", image), *cases(tmp_path, 2, 1)]
    with pytest.raises(UserError, match=r"^case bad [^\n]*$"):
        warning_of_unlike(labelled, cases(tmp_path, 3, 3), ["MRI"])


@pytest.mark.parametrize("shape", [(1, 1, 30, 40), (1, 5, 1, 1)])
def test_flat_images_have_features(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = features_of(written(tmp_path, "flat", scan(0, shape=shape) if shape[2] > 1 else np.ones(shape)))
    assert np.isfinite(found).all()
