"""Build: source text written to a file, imported, compiled and kept on disk.

All of Numba's options are here. Compiled code is a C function of 64-bit words, called through
ctypes, which lets go of Python's lock. What is compiled is kept in a folder, one below it for each
text, by a name that says what it was made from: the text, the sources of this package, Numba, the
processor. So nothing there is ever out of date, only unused, and what was unused longest is deleted
when the folder grows beyond a bound. Beside the text stands the compiled code of each function,
with a digest of it, for damaged code would run.

Imports forking, machine, simd, worker, NumPy, Numba and llvmlite; when asked, library (texts of the
shared functions) and threads.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps
from numba.extending import intrinsic
from tinygrad_seq.kernels import machine, worker
from tinygrad_seq.kernels.forking import alone
from tinygrad_seq.kernels.simd import I64, WORD

OPTIONS = {"error_model": "numpy", "boundscheck": False}
LARGEST = 256 * 2**20  # bytes in the folder
LATER = 1.0  # seconds after which a compile says that it is going on
DIGEST = hashlib.sha256().digest_size
OURS = re.compile(r".*_[0-9a-f]{20}")  # the folder of one text


def _forget() -> None:
    """In a forked child nobody is compiling, whatever other threads of the parent did."""
    _compiling.clear()
    global_compiler_lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def folder() -> Path:
    """Where compiled kernels are kept: TINYGRAD_SEQ_CACHE, or the user's cache folder."""
    given = os.environ.get("TINYGRAD_SEQ_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "tinygrad_seq"
    try:
        return Path.home() / ".cache" / "tinygrad_seq"
    except RuntimeError:  # a user without a home, as in a container
        return _temporary()


def sources(*patterns: str) -> str:
    """A digest of this package's sources with such names."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(path for pattern in patterns for path in here.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def made_from() -> str:
    """A digest of everything but the text that code for the CPU depends on, once compiled."""
    digest = hashlib.sha256(sources("[!c]*.py", "c[!u]*.py").encode())
    facts = [numba.__version__, llvmlite.__version__, np.__version__, sys.version]
    facts += [binding.get_host_cpu_name(), str(config.CPU_NAME), *sorted(machine.features())]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()


# Files ---------------------------------------------------------------------------------------


def write_module(name: str, text: str) -> Path:
    """Write the text to a file of its own, unless it is there; its path.

    Where the folder cannot be written to, a temporary one is used, with a warning; where that
    cannot be either, the path is a mere name, for the text is compiled without its file.
    """
    mark = hashlib.sha256((made_from() + text).encode()).hexdigest()[:20]
    home = folder() / f"{name}_{mark}"
    path = home / f"{name}.py"
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            return path
        home.mkdir(parents=True, exist_ok=True)
        _write(path, text.encode())
        _bound(folder(), keep=home)
        return path
    except OSError as error:
        say_not_kept(error)
        home = _temporary() / f"{name}_{mark}"
        path = home / f"{name}.py"
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            _write(path, text.encode())
        return path


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: other processes may be reading."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_full: set[Path] = set()  # folders in which nothing can be kept, as was said of each once


def say_not_kept(error: Exception) -> None:
    where = folder()
    if where in _full:
        return
    _full.add(where)
    warnings.warn(
        f"tinygrad_seq: kernels cannot be kept in {where} "
        f"({getattr(error, 'strerror', None) or error}); they are compiled again in every process. "
        "Set TINYGRAD_SEQ_CACHE to a folder that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _temporary() -> Path:
    """A folder for as long as this process lives, or one that nobody can make."""
    try:
        made, owner = Path(tempfile.mkdtemp(prefix="tinygrad_seq_")), os.getpid()
    except OSError:  # nothing can be written anywhere
        return Path(os.devnull, "tinygrad_seq")

    def remove() -> None:
        if os.getpid() == owner:  # and not in a forked child, which goes first
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return made


def entries() -> list[tuple[Path, int, float]]:
    """What is kept: each folder, its bytes, and when it was last used.

    Whatever else stands beside them is not this package's. Other processes come and go meanwhile.
    """
    found = []
    for home in folder().iterdir() if folder().is_dir() else ():
        if OURS.fullmatch(home.name):
            with suppress(OSError):  # deleted just now
                found.append((home, _bytes_in(home), home.stat().st_mtime))
    return found


def _bytes_in(home: Path) -> int:
    total = 0
    for where, _, names in os.walk(home):
        for name in names:
            with suppress(OSError):  # deleted, or given its name, just now
                total += os.stat(os.path.join(where, name)).st_size
    return total


def clear() -> int:
    """Delete everything that is kept; how many kernels are gone."""
    found = entries()
    for home, _, _ in found:
        shutil.rmtree(home, ignore_errors=True)
    return sum(not home.exists() for home, _, _ in found)


def _bound(where: Path, keep: Path) -> None:
    found = sorted(entries(), key=lambda entry: entry[2])
    total = sum(size for _, size, _ in found)
    for home, size, _ in found:
        if total <= LARGEST:
            return
        if home != keep:
            shutil.rmtree(home, ignore_errors=True)
            total -= size


# Modules and functions -----------------------------------------------------------------------


class Module(NamedTuple):
    """A file's name and text, and of how many integers each of its functions is."""

    name: str
    text: str
    functions: Mapping[str, int]


def load(name: str, text: str, functions: Mapping[str, int]) -> dict[str, Any]:
    """The functions of a text, compiled; each takes as many integers as ``functions`` says."""
    with alone():
        path = write_module(name, text)
        with compiling():
            worker.wait(path)
        return _load(path, text, functions)


def module(name: str, text: str) -> ModuleType:
    """The module of a text, its functions as they are written."""
    with alone():
        return _import(write_module(name, text), text)


def _load(path: Path, text: str, functions: Mapping[str, int]) -> dict[str, Any]:
    module = _import(path, text)
    if config.DISABLE_JIT:
        return {name: getattr(module, name) for name in functions}
    return {name: compiled(getattr(module, name), words) for name, words in functions.items()}


def _import(path: Path, text: str) -> ModuleType:
    """The module of a text that stands in this file, whatever else may be kept of it."""
    with suppress(OSError):
        os.utime(path.parent)  # it is in use
    module = ModuleType(f"tinygrad_seq_kernel_{path.parent.name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # pickling looks for functions by their module
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    return module


class Kept:
    """A function's compiled code on disk, in the place of Numba's cache of it.

    Numba looks for its own in other folders too, as the environment says, and runs what it finds.
    What the code depends on is in the folder's name.
    """

    def __init__(self, source: Path, function: str) -> None:
        self.path = source.with_name(f"{function}.code")

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        digest, code = content[:DIGEST], content[DIGEST:]
        if hashlib.sha256(code).digest() != digest:  # damaged, by a full disk or a crash
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(code))

    def save_overload(self, sig: Any, made: CompileResult) -> None:
        if made.library.has_dynamic_globals:  # addresses of this process
            return
        try:
            code = dumps(made._reduce())
        except RuntimeError:  # LLVM handed it over while an interrupt came, which was lost there
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted
            _write(self.path, hashlib.sha256(code).digest() + code)
        except OSError as error:
            say_not_kept(error)


_compiling: list[bool] = []  # as many as compile now


@contextmanager
def compiling(kept: bool = False) -> Iterator[None]:
    """Nobody else compiles in the block, no process forks, and ``said`` says so, if it is not only
    loading what is kept."""
    with alone():
        _compiling.append(not kept)
        try:
            yield
        finally:
            _compiling.pop()


def compiled(function: Callable[..., Any], words: int, keep: bool = True) -> Any:
    """A C function of that many words, compiled or loaded; its ``address`` is an attribute."""
    kept = Kept(Path(function.__code__.co_filename), function.__name__)
    with compiling(keep and kept.path.is_file()), warnings.catch_warnings():
        warnings.simplefilter("ignore", numba.NumbaWarning)
        made: Any = CFunc(function, ((types.int64,) * words, types.void), {}, OPTIONS)
        if keep:
            made._cache = kept
        made.compile()
    pointer = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * words)(made.address)
    pointer.keep = made  # type: ignore[attr-defined]
    pointer.address = made.address  # type: ignore[attr-defined]
    return pointer


_plain: dict[int, Any] = {}


def address_of(function: Any) -> int:
    """Where a function of ``load`` is; with the compiler switched off, a number for it."""
    if not config.DISABLE_JIT:
        address: int = function.address
        return address
    _plain[id(function)] = function
    return id(function)


def function_at(number: int) -> Any:
    """With the compiler switched off: the function with the number of ``address_of``."""
    return _plain[number]


def callable_here(*functions: Any) -> tuple[Any, ...]:
    """Functions of a generated module as other functions of it call them."""
    if config.DISABLE_JIT:
        return functions
    return tuple(numba.njit(**OPTIONS)(each) for each in functions)


@contextmanager
def said(what: str) -> Any:
    """Nobody else compiles in the block, and if it does so for longer than a moment, it is said.

    Who has waited here finds that done, perhaps, which it came for.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(LATER):
            return
        while not any(_compiling):  # what is kept may take its time to load on a busy machine
            if over.wait(0.2):
                return
        where = folder()
        kept = "for this process alone" if where in _full else f"once; kept in {where}"
        print(f"tinygrad_seq: compiling {what}, {kept}", file=sys.stderr)

    with alone():
        with suppress(RuntimeError):  # no thread is to be had, and nothing is said
            threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            over.set()


# Functions that kernels share ------------------------------------------------------------------

_SHARED: dict[tuple[str, str], Any] = {}
_working: list[bool] = []  # not empty in a worker, which compiles calls of what it does not have
NOWHERE = 1  # an address that nobody calls
LONG = 500  # lines that take longer to compile than a worker to begin


def shared(name: str, dtype: str) -> Any:
    """A function of ``library.py``, compiled once for all kernels."""
    with alone():
        if (name, dtype) not in _SHARED:
            from tinygrad_seq.kernels import library

            module, functions = next(each for each in library.MODULES.items() if name in each[1])
            text = library.text(dtype, module)
            for each, function in load(f"{module}_{dtype}", text, functions).items():
                _SHARED[each, dtype] = function
                if not config.DISABLE_JIT:
                    binding.add_symbol(_symbol(each, dtype), function.address)
        return _SHARED[name, dtype]


def divide(dtype: str, modules: Sequence[Module]) -> None:
    """Let a worker compile these modules while what is needed first is compiled here: if nothing is
    kept yet, with others that are needed late; later, if they are long."""
    if config.DISABLE_JIT or machine.cores() < 2 or not worker.possible():
        return
    from tinygrad_seq.kernels import library, threads

    first = write_module(f"blocks_{dtype}", library.text(dtype, "blocks"))
    if folder() not in first.parents:
        return
    given = list(modules)
    if not Kept(first, "block").path.is_file():
        outer = Module(f"outer_{dtype}", library.text(dtype, "outer"), library.MODULES["outer"])
        given = [threads.MODULE, outer, *modules]
    elif sum(each.text.count("\n") for each in modules) < LONG:
        return
    files = [(write_module(each.name, each.text), each.functions) for each in given]
    new = [
        (path, functions)
        for path, functions in files
        if not all(Kept(path, name).path.is_file() for name in functions)
    ]
    if new:
        worker.begin(new)


def work_on(modules: Sequence[tuple[str, Mapping[str, int]]]) -> None:
    """In a worker: compile, and say by number when each file is done."""
    _working.append(True)
    for number, (path, functions) in enumerate(modules):
        _load(Path(path), Path(path).read_text(encoding="utf-8"), functions)
        print(f"\n{number}", flush=True)


def _symbol(name: str, dtype: str) -> str:
    return f"tinygrad_seq_{name}_{dtype}"


def external(name: str, dtype: str) -> Any:
    """A shared function as other code calls it: by address, not compiled again."""
    if _working:
        binding.add_symbol(_symbol(name, dtype), NOWHERE)
    else:
        function = shared(name, dtype)
        if config.DISABLE_JIT:
            return function
    from tinygrad_seq.kernels import library

    count = next(counts[name] for counts in library.MODULES.values() if name in counts)

    def typed(typingctx: Any, *given: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [I64] * count)
            target = cgutils.get_or_insert_function(build.module, kind, _symbol(name, dtype))
            build.call(target, args)
            return context.get_dummy_value()

        return types.void(*[WORD] * count), emit

    names = ", ".join(f"word{k}" for k in range(count))  # Numba wants them by name
    space = {"typed": typed}
    exec(f"def call(typingctx, {names}):\n    return typed(typingctx, {names})\n", space)
    return intrinsic(space["call"])
