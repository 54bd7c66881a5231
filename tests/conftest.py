"""What all tests share: a seed for each, and how hard Hypothesis looks."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import tinygrad_seq as tgs

settings.register_profile(
    "suite",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where that is installed
def pytest_xdist_make_scheduler(config, log):
    """A worker that has nothing left takes from what others wait with: some tests are long."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers that differ from test to test but not from run to run."""
    seed = zlib.crc32(request.node.nodeid.encode())
    tgs.manual_seed(seed)
    return np.random.default_rng(seed)
