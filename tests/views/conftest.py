"""The views are computed by numba or, if it is not installed, by scipy."""

from __future__ import annotations

import pytest

from pcrl_nnunet.views import kernels


@pytest.fixture(params=["numba", "scipy"])
def with_and_without_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with numba and without."""
    if request.param == "scipy":
        monkeypatch.setattr(kernels, "compiled", False)
    elif not kernels.compiled:
        pytest.skip("numba is not installed")
