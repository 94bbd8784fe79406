import numpy as np
import pytest

from pcrl_nnunet.classification.shortcuts import SHORTCUTS, predict


def test_a_thumbnail_is_the_mean_of_its_parts():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 32, 64)).astype(np.float32)
    expected = image.reshape(2, 16, 2, 16, 4).mean((2, 4)).ravel()
    np.testing.assert_allclose(SHORTCUTS["thumbnail"](image, np.zeros(3)), expected, atol=1e-6)
    volume = rng.normal(size=(1, 8, 16, 24)).astype(np.float32)
    expected = volume.reshape(1, 8, 1, 8, 2, 8, 3).mean((2, 4, 6)).ravel()
    np.testing.assert_allclose(SHORTCUTS["thumbnail"](volume, np.zeros(3)), expected, atol=1e-6)


@pytest.mark.parametrize("features", [1, 300])
def test_informative_features_are_found_at_any_number_and_scale(features):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    given = rng.normal(size=(200, features)) * 1000
    given += 5000 / features**0.5 * truth[:, None]  # every feature shares the signal
    found = predict(given[:100], truth[:100, None].astype(float), given[100:])[:, 0]
    assert ((found > 0.5) == truth[100:]).mean() > 0.9


def test_labels_with_one_known_value_or_none_give_finite_predictions():
    truth = np.array([[1, np.nan, 0, 1], [1, np.nan, np.nan, 0], [1, np.nan, np.nan, 1]])
    found = predict(np.arange(3.0)[:, None], truth, np.arange(2.0)[:, None])
    np.testing.assert_allclose(found[:, :3], [[1, 0.5, 0], [1, 0.5, 0]])
    assert np.isfinite(found).all()
