"""Threads: one function on many tasks, by the caller and by helpers that wait for work.

A job is a list of phases, each a compiled function with its table, a number of tasks and the steps
that it is about; a phase begins when the one before has ended. One without tasks of its own is done
by each task of the phase before, as soon as that is done. Tasks are taken one by one from a
counter, so a helper that comes late takes fewer, and one that never comes is not missed: the caller
goes on until all is done. Which thread does a task changes nothing in its result.

A helper that has run out of work looks for more for a moment and then sleeps. Waking it takes about
as long as that moment; so one that was woken soon after it had gone to sleep looks longer the next
time. It is kept off the caller's own core, where Linux likes to wake it. A second Python thread
that comes while the helpers are busy does its job alone, as does everybody if the system gives no
threads. A forked child has no helpers until it needs some. Imports build, machine, memory, simd,
NumPy, Numba and llvmlite.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from tinygrad_seq.kernels import build, machine
from tinygrad_seq.kernels.memory import address
from tinygrad_seq.kernels.simd import I64, WORD

LOOKS = 4000  # how often a helper looks for work before it sleeps, some 50 µs
SOON = 700_000  # ticks of the processor's clock, some 250 µs
# Words of the board: the open job's number (0: none), helpers that are inside, how many may take
# part, how many phases there are and where.
JOB, INSIDE, WANTED, PHASES, LIST = range(5)
# Then for each helper: whether it sleeps, the job it saw last, whether it is to be woken, when it
# went to sleep.
SLEEPS, SEEN, TO_WAKE, SINCE = range(4)
FIRST_HELPER, HELPER_WORDS = 8, 8
# Words of a phase: function, table (in bytes from the first phase on), tasks, the next task, how
# many are done, and for the function alone: the first step, the one after the last, whether steps
# were done before.
FUNCTION, TABLE, TASKS, NEXT, DONE, FROM_STEP, TO_STEP, BEGUN = range(8)
PHASE_WORDS = 8
AFTER = 0  # in the place of a number of tasks: those of the phase before go on with this one

_TEXT = '''"""What the threads do while they hold no lock of Python's; see threads.py."""

from tinygrad_seq.kernels.build import callable_here
from tinygrad_seq.kernels.simd import word
from tinygrad_seq.kernels.threads import (
    AFTER, DONE, FIRST_HELPER, FUNCTION, HELPER_WORDS, INSIDE, JOB, LIST, LOOKS, NEXT, PHASES,
    PHASE_WORDS, SEEN, SINCE, SLEEPS, SOON, TABLE, TASKS, TO_WAKE, WANTED,
    call_function, exchange, fetch_add, pause, read, set_word, ticks,
)


def go_through(count, first):
    """Do what is left of so many phases, whose words stand one after another from there on."""
    for p in range(count):
        at = first + 8 * PHASE_WORDS * p
        tasks, end = word(at, TASKS), p + 1
        while end < count and word(first + 8 * PHASE_WORDS * end, TASKS) == AFTER:
            end += 1
        task = fetch_add(at + 8 * NEXT, 1)
        while task < tasks:
            for q in range(p, end):
                here = first + 8 * PHASE_WORDS * q
                call_function(word(here, FUNCTION), first + word(here, TABLE), task, here)
            fetch_add(at + 8 * DONE, 1)
            task = fetch_add(at + 8 * NEXT, 1)
        while read(at + 8 * DONE) < tasks:
            pause()


go_through_here, = callable_here(go_through)


def take_part(count, first):
    go_through_here(count, first)


def serve(board, me):
    """Work until there has been nothing for a moment; then say that this helper sleeps."""
    mine = board + 8 * (FIRST_HELPER + HELPER_WORDS * me)
    seen = read(mine + 8 * SEEN)
    looks, worked = 0, ticks()
    patient = 0 < worked - read(mine + 8 * SINCE) < SOON
    while True:
        job = read(board + 8 * JOB)
        if job != 0 and job != seen:
            fetch_add(board + 8 * INSIDE, 1)
            job = read(board + 8 * JOB)
            if job != 0 and job != seen:
                if me < read(board + 8 * WANTED):
                    go_through_here(word(board, PHASES), word(board, LIST))
                seen = job
            fetch_add(board + 8 * INSIDE, -1)
            looks, worked = 0, ticks()
        pause()
        looks += 1
        if looks > LOOKS and not (patient and ticks() - worked < SOON):
            set_word(mine + 8 * SINCE, ticks())
            set_word(mine + 8 * SEEN, seen)
            exchange(mine + 8 * SLEEPS, 1)
            job = read(board + 8 * JOB)
            if job == 0 or job == seen or exchange(mine + 8 * SLEEPS, 0) == 0:
                return  # asleep; whoever sets the word back wakes this helper
            looks = 0


def post(board, number):
    """Open the job that stands on the board."""
    exchange(board + 8 * JOB, number)
    for k in range(read(board + 8 * WANTED)):
        at = board + 8 * (FIRST_HELPER + HELPER_WORDS * k)
        if exchange(at + 8 * SLEEPS, 0) == 1:
            set_word(at + 8 * TO_WAKE, 1)


def close(board, _):
    """Nobody may enter any more, and nobody is inside: the board may be written anew."""
    exchange(board + 8 * JOB, 0)
    while read(board + 8 * INSIDE) > 0:
        pause()
'''


def _intrinsics() -> tuple[Any, ...]:
    def pointer(build: Any, address: Any) -> Any:
        return build.inttoptr(address, I64.as_pointer())

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            return build.load_atomic(pointer(build, args[0]), "seq_cst", 8)

        return WORD(WORD), emit

    @intrinsic
    def set_word(typingctx: Any, address: Any, value: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            build.store_atomic(args[1], pointer(build, args[0]), "seq_cst", 8)
            return context.get_dummy_value()

        return types.void(WORD, WORD), emit

    def read_modify_write(name: str) -> Any:
        @intrinsic
        def change(typingctx: Any, address: Any, value: Any) -> Any:
            def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
                return build.atomic_rmw(name, pointer(build, args[0]), args[1], "seq_cst")

            return WORD(WORD, WORD), emit

        return change

    @intrinsic
    def pause(typingctx: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            triple = build.module.triple or ""
            kind = ir.FunctionType(ir.VoidType(), [])
            if triple.startswith("x86_64"):
                name = "llvm.x86.sse2.pause"
                build.call(cgutils.get_or_insert_function(build.module, kind, name), [])
            return context.get_dummy_value()

        return types.void(), emit

    @intrinsic
    def ticks(typingctx: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            if not (build.module.triple or "").startswith("x86_64"):
                return ir.Constant(I64, 0)  # elsewhere a process may be forbidden to ask
            kind = ir.FunctionType(I64, [])
            name = "llvm.readcyclecounter"
            return build.call(cgutils.get_or_insert_function(build.module, kind, name), [])

        return WORD(), emit

    @intrinsic
    def call_function(typingctx: Any, function: Any, table: Any, task: Any, phase: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
            build.call(build.inttoptr(args[0], kind.as_pointer()), args[1:])
            return context.get_dummy_value()

        return types.void(WORD, WORD, WORD, WORD), emit

    add, swap = read_modify_write("add"), read_modify_write("xchg")
    return read, set_word, add, swap, pause, ticks, call_function


read, set_word, fetch_add, exchange, pause, ticks, call_function = _intrinsics()


class _Pool:
    """The board and the helpers of this process."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.native = _native()
        self.count = max(0, machine.cores() - 1)
        self.words = np.zeros(FIRST_HELPER + HELPER_WORDS * max(1, self.count), np.int64)
        self.board = self.words.ctypes.data
        self.wakes = [threading.Lock() for _ in range(self.count)]
        self.ids: list[int] = []  # of the helpers, as the system knows them
        self.jobs = 0
        self.core = -1
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        for k, wake in enumerate(self.wakes):
            wake.acquire()
            self.words[FIRST_HELPER + HELPER_WORDS * k + SLEEPS] = 1
            helper = threading.Thread(target=self._help, args=(k,), daemon=True)
            try:
                helper.start()
            except RuntimeError:  # there are no more, or the interpreter is going down
                self.count = k
                break
            self.ids.append(helper.native_id or 0)

    def _help(self, k: int) -> None:
        serve, board, wake = self.native["serve"], self.board, self.wakes[k]
        while True:
            wake.acquire()
            serve(board, k)

    def run(self, first: int, phases: int, helpers: int) -> None:
        words = self.words
        words[PHASES], words[LIST], words[WANTED] = phases, first, helpers
        self.jobs += 1
        self._keep_off_this_core()
        try:
            self.native["post"](self.board, self.jobs)
            for k in range(helpers):
                if words[at := FIRST_HELPER + HELPER_WORDS * k + TO_WAKE]:
                    words[at] = 0  # what an interrupt leaves is done by the next run
                    self.wakes[k].release()
            self.native["take_part"](phases, first)
        finally:  # an interrupt here must not leave a helper in memory that is let go
            self.native["close"](self.board, 0)

    def _keep_off_this_core(self) -> None:
        """Let helpers run on every core but the caller's, if there are others."""
        if _current_core is None or len(self.cores) < 2:
            return
        core = _current_core()
        if core == self.core or core not in self.cores:
            return
        self.core = core
        for each in self.ids:
            try:
                os.sched_setaffinity(each, self.cores - {core})
            except OSError:
                return


def _find_current_core() -> Any:
    try:
        function = ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError):
        return None
    function.restype = ctypes.c_int
    return function


_current_core = _find_current_core()
_pool: _Pool | None = None
_limit: int | None = None
_making = threading.Lock()


def _forget() -> None:
    """In a forked child there are no helpers, whatever the parent had."""
    global _pool, _making
    _pool, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


MODULE = build.Module("threads", _TEXT, dict.fromkeys(("take_part", "serve", "post", "close"), 2))


def set_num_threads(n: int) -> None:
    global _limit
    _limit = n


def get_num_threads() -> int:
    """How many threads a compiled scan may use."""
    return machine.cores() if _limit is None else _limit


@cache
def _native() -> dict[str, Any]:
    return build.load(*MODULE)


def run(words: np.ndarray, phases: int, threads: int) -> None:
    """All phases at the head of ``words``, one after another, on up to so many threads."""
    global _pool
    if config.DISABLE_JIT:
        return _run_plainly(words, phases)
    first, helpers = address(words), threads - 1
    if helpers < 1:
        return _native()["take_part"](phases, first)  # type: ignore[no-any-return]
    if _pool is None:
        with _making:
            if _pool is None:
                _pool = _Pool()
    pool = _pool
    if not pool.count or pool.busy.locked():
        return _native()["take_part"](phases, first)  # type: ignore[no-any-return]
    with pool.busy:  # which no interrupt leaves locked, as it may after acquire
        pool.run(first, phases, min(helpers, pool.count))
    return None


def _run_plainly(words: np.ndarray, phases: int) -> None:
    """The same with the compiler switched off."""
    first, tasks = address(words), 0
    for p in range(phases):
        function, table, own = words[p * PHASE_WORDS :][:NEXT].tolist()
        tasks = own or tasks  # of one task after the other, in this thread, nobody sees the order
        with np.errstate(all="ignore"):  # compiled code warns of nothing
            for task in range(tasks):
                build.function_at(function)(first + table, task, first + 8 * PHASE_WORDS * p)
