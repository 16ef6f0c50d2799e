"""Runs the tests of what kernel.c does for both twins: numpy's, and the compiled one where there is one."""

from __future__ import annotations

import pytest

from tbox import kernel

TWINS = "numpy", "compiled"
OF_BOTH = ("test_batch", "test_decode_stage", "test_edge_pack", "test_sampler", "test_validity")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in OF_BOTH:
        metafunc.parametrize("twin", TWINS, indirect=True)


@pytest.fixture(autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which twin runs; in other modules the one that is there."""
    name: str = getattr(request, "param", "")
    if name == "numpy":
        monkeypatch.setattr(kernel, "compiled", None)
    elif name == "compiled" and kernel.compiled is None:
        pytest.skip("no kernel: tbox was installed without a C compiler")
    return name
