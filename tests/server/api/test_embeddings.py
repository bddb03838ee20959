import numpy as np
import pytest

from tome_server.api.embeddings import embeddings


def test_what_float16_cannot_hold_becomes_infinite_unless_normalised() -> None:
    features = np.array([65_504, 65_536, -1e6, 1], np.float32)
    assert embeddings(features, normalize=False, float16=True).tolist() == [65_504, np.inf, -np.inf, 1]
    normalised = embeddings(features, normalize=True, float16=True)
    assert np.linalg.norm(normalised.astype(np.float32)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("float16", [False, True])
def test_infinities_and_nan_come_as_they_are_or_as_nan_and_zeros(float16: bool) -> None:
    features = np.array([[np.inf, 1], [np.nan, 1], [3, 4], [0, 0]], np.float32)
    plain = embeddings(features, normalize=False, float16=float16)
    np.testing.assert_array_equal(plain, features.astype(plain.dtype))
    normalised = embeddings(features, normalize=True, float16=float16)
    expected = np.array([[np.nan, 0], [np.nan, np.nan], [0.6, 0.8], [0, 0]], plain.dtype)
    np.testing.assert_array_equal(normalised, expected)
