"""The axes of the suites: device, backend, dtype; and the seed of a run, which failures print."""

from __future__ import annotations

import importlib.util
import os
import random
import zlib
from collections.abc import Generator, Iterator

import pytest
import torch
from cuda_emulation import emulated, emulated_library  # noqa: F401 (fixtures)

import torchext
from torchext import _triton
from torchext.testing import TOLERANCES, backends_for, devices

# What a machine may lack that has a GPU and no network, and the files that cannot do without: they
# are left out there, and the header says so. (`make setup` installs all of it.)
NEEDS = {
    "hypothesis": ["test_cross_entropy_bits.py"],
    "expecttest": [
        "test_linear_cross_entropy_databases.py",
        "test_narrow_errors.py",
        "test_pytorch_databases.py",
    ],
}
LACKING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
if LACKING and os.environ.get("CI"):
    raise pytest.UsageError(f"not installed: {', '.join(LACKING)} (pip install 'torchext[test]')")
collect_ignore = [file for name in LACKING for file in NEEDS[name]]

if "hypothesis" not in LACKING:
    import hypothesis

    hypothesis.settings.register_profile("torchext", deadline=None, database=None, print_blob=True)
    hypothesis.settings.load_profile("torchext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the random data (default: a fresh one)")
    parser.addoption("--backend", help="run only the tests of this backend (of `use_backend`)")
    parser.addoption(
        "--sample", type=int, help="run at most so many cases of each test, drawn by the seed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(config.option.seed)
    # The data are small, and the processes of pytest-xdist share the cores. Tests of threads ask.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"torch {torch.__version__}, random data: --seed {config.option.seed}"]
    lines += [f"without {name}: {', '.join(NEEDS[name])} left out" for name in LACKING]
    return lines


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
        only = metafunc.config.option.backend
        places = [
            (device, backend)
            for device in devices()
            for backend in backends_for(device)
            if only in (None, backend)
        ]
        metafunc.parametrize(
            ("device", "backend"), places, ids=["-".join(place) for place in places], indirect=True
        )
    elif "device" in names:
        metafunc.parametrize("device", devices(), indirect=True)


@pytest.hookimpl(trylast=True)  # what -k leaves out is not drawn
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what has no backend, with --backend, and what is not drawn, with --sample."""
    kept = list(items)
    if config.option.backend is not None:
        kept = [item for item in kept if "backend" in getattr(item, "fixturenames", ())]
    if config.option.sample is not None:
        cases: dict[str, list[pytest.Item]] = {}
        for item in kept:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        draw = random.Random(config.option.seed)
        chosen = {
            item
            for group in cases.values()
            for item in draw.sample(group, min(config.option.sample, len(group)))
        }
        kept = [item for item in kept if item in chosen]
    if len(kept) < len(items):
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """One of the backends that the device has, chosen for the test."""
    with torchext.use_backend(request.param):
        yield request.param


# Triton's interpreter is slow, and has no right bfloat16: two dtypes there.
DTYPES = [torch.float32, torch.float16] if _triton.interpreted else list(TOLERANCES)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The same data for a test whichever others run: from the run's seed and the test's name."""
    value = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return int(value)


@pytest.fixture
def whole_sums() -> Iterator[None]:
    """Lets stock on a GPU not round parts of its 16-bit numbers' long sums."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
