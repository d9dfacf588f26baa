"""The axes of the suites: device, backend, dtype; and the seed of a run, which failures print."""

from __future__ import annotations

import random
import zlib
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

import torchext
from torchext.testing import TOLERANCES, backends_for, devices

hypothesis.settings.register_profile("torchext", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("torchext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the random data (default: a fresh one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(config.option.seed)
    # The data are small, and the processes of pytest-xdist share the cores. Tests of threads ask.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, random data: --seed {config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("random data", f"--seed {item.config.option.seed}"))
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "backend" in names:
        places = [(device, backend) for device in devices() for backend in backends_for(device)]
        metafunc.parametrize(
            ("device", "backend"), places, ids=["-".join(place) for place in places], indirect=True
        )
    elif "device" in names:
        metafunc.parametrize("device", devices(), indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """One of the backends that the device has, chosen for the test."""
    with torchext.use_backend(request.param):
        yield request.param


@pytest.fixture(params=list(TOLERANCES), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The same data for a test whichever others run: from the run's seed and the test's name."""
    value = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return int(value)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
