"""Where the tests of this folder run: on a GPU, or in a process with the simulator.

With NUMBA_ENABLE_CUDASIM=1 kernels are simulated and arrays are the stand-in's; ``test_cuda.py``
starts such a process. Otherwise they need a GPU, and are skipped where there is none.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if SIMULATED:
    import cuda_simulator

    cuda_simulator.install()
    np.seterr(all="ignore")  # the device says nothing of a division by zero


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tinygrad_seq import devices

    reason = None if SIMULATED else devices.missing()
    for item in items:
        if "on_cuda" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def device():
    """ "cuda", which in the simulator is the host's memory."""
    if SIMULATED:
        import fake_cupy

        context = fake_cupy.installed()
    else:
        context = nullcontext()
    with context:
        yield "cuda"


def some_steps(rng, work):
    """A loop by steps, its kernels divided in any way; without products there is none."""
    from tinygrad_seq.kernels import cuda_division

    found = cuda_division.by_steps(work)
    if found is None:
        return cuda_division.resident(work)
    rows, parts = int(rng.integers(1, work.B + 1)), int(rng.integers(1, 4))
    shared = work.sums * rows * work.item
    return found._replace(groups=-(-work.B // rows), parts=parts, rows=rows, shared_bytes=shared)


@pytest.fixture
def laid_out_anew(monkeypatch):
    """No layout that another test has chosen for the same cell and sizes is used again."""
    from tinygrad_seq.recurrence import compiled, following

    monkeypatch.setattr(compiled, "_runners", {})
    monkeypatch.setattr(following, "_precedents", {})


@pytest.fixture
def by_steps(monkeypatch, rng, laid_out_anew):
    """Loops are taken by steps, whatever is thought to be best."""
    from tinygrad_seq.kernels import cuda_division

    def divide(work):
        if SIMULATED:
            return some_steps(rng, work)
        return cuda_division.by_steps(work) or cuda_division.resident(work)

    monkeypatch.setattr(cuda_division, "divide", divide)


@pytest.fixture(params=["divided", "by_steps"])
def way(request):
    """Both ways of taking a loop: in one launch or several, and by steps."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def divided(monkeypatch, rng, laid_out_anew):
    """Runs are divided among blocks in any way that works, whatever is thought to be best.

    On a GPU too: at the sizes of these tests the best is always one block a group, none of which
    waits for another.
    """
    from tinygrad_seq.kernels import cuda_division

    def divide(work):
        found, B = [], work.B
        for rows, launches in ((1, 1), (2, 1), (B, 1), (1, 2), (-(-B // 2), 2)):
            for parts in (1, 2, 3):
                room = int(rng.choice([48_000, 6_000, 1_500]))
                machine = work.machine._replace(shared_bytes=room)
                share = -(-B // launches)
                groups = -(-share // rows)
                given = work._replace(machine=machine), groups, parts, rows, launches
                division = cuda_division.weigh(*given)
                if division is not None:
                    found.append(division)
        if work.products and rng.random() < 0.3:
            found = [some_steps(rng, work)]
        return found[rng.integers(len(found))]

    monkeypatch.setattr(cuda_division, "divide", divide)
