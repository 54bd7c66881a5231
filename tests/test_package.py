"""The package as others meet it: imports, installed forms, command line, README."""

from __future__ import annotations

import ast
import os
import platform
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tinygrad_seq as tgs
from tinygrad_seq.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinygrad_seq"

# From the bottom up: each room may import those before it, and nothing after it.
ROOMS = [
    "errors",
    "malloc",
    "devices",
    "parallel",
    "program",
    "special",
    "blas",
    "rules",
    "tape",
    "listing",
    "tensors",
    "elementwise",
    "structural",
    "composites",
    "interop",
    "trees",
    "transforms",
    "finding",
    "checking",
    "creation",
    "recurrence",
    "search",
    "nn",
    "optim",
    "data",
    "truncation",
    "generation",
    "train",
    "drawing",
    "comparing",
    "__main__",
]


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinygrad_seq"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in ROOMS, f"{room} has no place in the order"
    later = {r for r in imported(path) - {"kernels", room} if ROOMS.index(r) > ROOMS.index(room)}
    assert not later, f"{path} imports {later}, which come after {room}"


def test_kernels_see_no_tensor():
    for path in (ROOT / "kernels").glob("*.py"):
        assert imported(path) <= {"kernels", "program"}, path
    assert not imported(PACKAGE / "program.py")


def test_the_readmes_ratios_are_those_of_the_tables():
    names = {"peephole LSTM": "peephole", "minimal gated unit": "minimal_gated"}
    names |= {"layer-norm LSTM": "layer_norm_lstm", "recurrent highway network": "highway"}
    names |= {"delta rule, eight matrices a row": "delta_rule"}
    names |= {"LSTM of four heads": "heads", "convolutional LSTM": "convolution"}
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| cell | beside |")[1]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[2:]]
    for k, end in enumerate(("-avx512", "", "-avx2")):
        path = ROOT / f"benchmarks/results/recurrent{end}.md"
        found = path.read_text(encoding="utf-8")
        for cell, beside, *ratios in rows:
            if ratios[k] == "not run":
                continue
            part = found.split(f"{names.get(cell, cell.lower())}, train:")[1].split(", infer:")[0]
            peer = "jax" if "JAX" in beside else "torch"
            mean, worst = ratios[k].split(", ")
            assert f"{peer} / ours: worst {worst}, geometric mean {mean}" in part, (cell, path)
    assert len(rows) == 11


def test_the_readme_says_what_the_cells_of_the_literature_took():
    found = (ROOT / "benchmarks/results/literature.md").read_text(encoding="utf-8").splitlines()
    worst, mean = re.fullmatch(r"jax / ours: worst (.*), geometric mean (.*)", found[-1]).groups()
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"`jit` {mean} times as long in the geometric mean, {worst} times at least" in said
    assert f"has {sum('e-1' in line for line in found)} cells of the literature" in said


def test_no_module_has_a_public_functions_name():
    modules = {p.stem for p in PACKAGE.rglob("*.py")} | {p.name for p in PACKAGE.iterdir()}
    public = {name for name in vars(tgs) if callable(getattr(tgs, name))}
    assert not modules & public


def test_every_file_says_what_lives_there():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("room", ["kernels", "recurrence", "nn", "data", "drawing"])
def test_files_say_what_they_import(room):
    """Of their own room, and program; kernels also NumPy and Numba."""
    folder = ROOT / room if room == "kernels" else PACKAGE / room
    paths = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    own, others = {path.stem for path in paths}, {"program"}
    others |= {"numpy", "numba"} if room == "kernels" else set()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        says = re.search(r"\bImports (.*?)\.(\s|$)", ast.get_docstring(tree) or "", re.S)
        assert says, f"{path} does not say what it imports"
        said = (own | others).intersection(re.findall(r"[\w-]+", says[1].lower()))
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # TYPE_CHECKING
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & others
            elif isinstance(node, ast.ImportFrom):
                place = node.module.removeprefix("tinygrad_seq.").split(".")
                if place == [room]:
                    found |= {alias.name for alias in node.names} & own
                else:
                    found |= {place[1]} if place[0] == room else {place[0]} & others
        if "its own room" in says[1]:
            said |= found
        assert said == found, f"{path} says {said} and imports {found}"


def test_the_readme_names_the_files_in_which_to_read():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| file | what is in it |")[1].split("\n\n")[0]
    folders = PACKAGE, PACKAGE / "recurrence", ROOT / "kernels"
    names = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py"}
    assert names <= set(re.findall(r"(\w+\.py)`", table))


def test_public_names_have_docstrings():
    for name in vars(tgs):
        if not name.startswith("_"):
            assert getattr(tgs, name).__doc__, name


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, **options
    )


def test_importing_does_not_import_numba():
    code = "import sys, tinygrad_seq; print([m for m in sys.modules if m.split('.')[0] == 'numba'])"
    assert run("-c", code).stdout.strip() == "[]"


def test_importing_is_quick(tmp_path):
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}  # with bytecode, as who installs it
    kept.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds(module: str) -> float:
        code = (  # of the processor, for others run beside it
            f"import time; a = time.process_time(); import {module}; print(time.process_time() - a)"
        )
        return min(float(run("-c", code, env=kept).stdout) for _ in range(6))

    assert seconds("tinygrad_seq") <= seconds("numpy") + 0.3


def test_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tgs.__version__ == project["version"]
    assert [re.split("[>=]", d)[0] for d in project["dependencies"]] == ["numpy", "numba"]


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("tinygrad-seq", "numpy", "numba", "python", "threads", "vectors", "cuda"):
        assert word in shown
    with pytest.raises(SystemExit):
        main(["inform"])
    capsys.readouterr()


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    import tinygrad_seq.kernels

    monkeypatch.delattr(tinygrad_seq, "kernels")
    monkeypatch.setitem(sys.modules, "tinygrad_seq.kernels", None)
    with pytest.raises(SystemExit, match=r"run pip install -e \. in it"):
        main(["info"])


def test_editable_install_finds_the_kernels():
    """Whichever way it is installed here, the kernels imported are those of this checkout."""
    from tinygrad_seq.kernels import machine

    here = (ROOT / "kernels" / "machine.py").read_text(encoding="utf-8")
    assert Path(machine.__file__).read_text(encoding="utf-8") == here
    assert machine.cores() >= 1


def test_wheel(tmp_path):
    """A wheel holds every module, the kernels among them, and works without the checkout."""
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder in (PACKAGE, ROOT / "kernels"):
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".typed"}:
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    run(*build, str(copy))
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        names = set(archive.namelist())
    for path in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]:
        assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "kernels").rglob("*.py"):
        assert f"tinygrad_seq/{path.relative_to(ROOT)}" in names
    assert not any(name.startswith(("tests", "kernels", "examples")) for name in names)
    code = (
        "import tinygrad_seq, tinygrad_seq.kernels.machine as m; "
        "from tinygrad_seq import nn; nn.LSTM(1, 2)(tinygrad_seq.zeros(2, 1, 1)); "
        "print(tinygrad_seq.__file__, m.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    files = run("-c", code, env=environment, cwd=tmp_path).stdout.split()
    assert all(Path(file).is_relative_to(unpacked) for file in files)


def snippets() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("code", snippets(), ids=range(len(snippets())))
def test_readme_snippets_run(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "drawing" in code:
        pytest.importorskip("matplotlib")
    space: dict = {}
    exec(code, space)
    if "MinimalGatedUnit" in code:
        assert float(space["loss"]) < 0.2
        body = code[code.index("class") : code.index("tgs.manual_seed")].splitlines()
        assert len([line for line in body if line]) == 10
    if "tape" in space:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        table = capsys.readouterr().out.split("tensor(")[0].strip()
        assert table in text


def test_the_reference_lists_what_there_is():
    pytest.importorskip("matplotlib")
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["page"]()
    found = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert made == found, "run python docs/reference.py"


def test_the_notes_name_what_there_is():
    pytest.importorskip("matplotlib")
    from tinygrad_seq import data, drawing, nn, optim

    rooms = {"tgs": tgs, "nn": nn, "optim": optim, "train": tgs.train, "data": data}
    text = (ROOT / "docs" / "notes.md").read_text(encoding="utf-8")
    for room, name in re.findall(r"`(\w+)\.(\w+)", text):
        assert hasattr({**rooms, "drawing": drawing}[room], name), f"{room}.{name}"
    shown_by = [row.split(" | ")[-1] for row in text.splitlines() if row.startswith("| ")]
    for word in re.findall(r"[\w/.]+_\w+(?:\.py)?", re.sub("`.*?`", "", " ".join(shown_by))):
        path = ROOT / word if word.endswith(".py") else ROOT / "examples" / f"{word}.py"
        assert path.exists(), path


def test_from_a_cell_to_its_kernel(capsys):
    """What docs/scan.md shows is what is printed."""
    text = (ROOT / "docs" / "scan.md").read_text(encoding="utf-8")
    space: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, space)
    shown = re.findall(r"```text\n(.*?)```", text, re.S)
    step, derivative, rest = shown
    assert capsys.readouterr().out == step + rest + derivative
    (excerpt,) = re.findall(r"```py\n(.*?)```", text, re.S)
    source = tgs.kernel_source(space["cell"], space["xs"], space["h0"])
    assert excerpt in str(source)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc")
def test_freed_memory_is_kept_unless_somebody_says_otherwise():
    script = "import tinygrad_seq; print(tinygrad_seq.malloc.keep_freed())"
    settings = [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=clean | each,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for each in settings
    ]
    has_glibc = platform.libc_ver()[0] == "glibc"
    assert said == [str(has_glibc), "False"]
