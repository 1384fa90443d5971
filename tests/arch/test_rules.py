"""The house rules that a test can hold: import direction, purity, banned calls, file and function sizes."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ownpath

PACKAGE = Path(ownpath.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROOMS = (
    ("dspark", "formats", "official", "ops", "splits", "other_models", "versions", "finding", "files", "terminal"),
    ("config",),
    ("end_tokens",),
    ("qtensor",),
    ("numerics", "ranks"),
    ("kernels",),
    ("checkpoint",),
    ("plan",),
    ("weights", "quantize", "oracle"),
    ("runners",),
    ("trace",),
    ("cache",),
    ("attention",),
    ("model",),
    ("startup", "allocator"),
    ("assembly",),
    ("loading", "conformance"),
    ("engine", "chat"),
    ("structured",),
    ("server", "calibration", "inspect", "selftest", "diff", "bench"),
    ("verify",),
    ("integrations",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""Top to bottom: a room imports only from rooms above it, or from itself. Rooms on one line do not see each other."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def imports_of(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports_of(path: Path) -> set[str]:
    names = (name.split(".") for name in imports_of(path) if name.startswith("ownpath."))
    return {parts[1] for parts in names if parts[1] in LEVEL}


def test_rooms_import_only_from_above() -> None:
    for path in SOURCES:
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in LEVEL, f"{room} is not on the map"
        for imported in own_imports_of(path) - {room}:
            assert LEVEL[imported] < LEVEL[room], f"{path}: {room} imports {imported}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("inspect", {"kernels", "runners", "trace", "engine", "assembly", "loading", "startup", "bench"}),
        ("diff", {"kernels", "runners", "trace", "plan", "checkpoint", "bench"}),
        ("kernels", {"model", "weights"}),
        ("cache", {"kernels", "runners", "weights", "checkpoint", "plan"}),
        ("attention", {"kernels", "weights", "checkpoint", "plan"}),
        ("model", {"kernels", "weights", "checkpoint", "plan"}),
        ("chat", {"config"}),
    ],
)
def test_rooms_that_must_not_meet(room: str, forbidden: set[str]) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        assert not own_imports_of(path) & forbidden, path


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("plan", "torch"),
        ("chat", "torch"),
        ("server", "torch"),
        ("structured", "torch"),
        ("engine/scheduler.py", "torch"),
        ("cache/layout.py", "torch"),
        ("cache/slots.py", "torch"),
        ("formats.py", "torch"),
    ],
)
def test_pure_rooms_do_not_import_torch(module: str, banned: str) -> None:
    target = PACKAGE / module
    for path in [target] if target.suffix else target.rglob("*.py"):
        assert banned not in {name.split(".")[0] for name in imports_of(path)}, path


KERNEL_FACTS = ("spec", "layout", "config", "choose")
"""Files of a kernel's folder that describe it: they run nothing."""


def test_nothing_from_config_to_weights_touches_cuda() -> None:
    for path in SOURCES:
        describes = room_of(path) != "kernels" or path.stem in KERNEL_FACTS
        if describes and room_of(path) in LEVEL and LEVEL[room_of(path)] <= LEVEL["weights"]:
            assert "torch.cuda" not in path.read_text(encoding="utf-8"), path


MODEL_ROOMS = ("runners", "model", "attention", "cache", "kernels")
TO_BE_DECLARED = {
    "kernels/attention.py",
    "kernels/calls.py",
    "kernels/router.py",
}
"""Files of verify that still ask for what no spec or protocol declares. The list only shrinks."""


def private_names_of(tree: ast.AST) -> set[str]:
    """Private attributes that no class of the file defines."""
    own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in attributes_of(node)}
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if node.attr not in own
    }


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Private names that a class defines: methods, fields, and what its methods assign to ``self``."""
    defined = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    defined |= {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
    return defined | {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    }


def asked_classes_of(tree: ast.AST) -> set[str]:
    """Names in the second argument of ``isinstance``."""
    asked = (
        node.args[1] for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    )
    return {name.id for argument in asked for name in ast.walk(argument) if isinstance(name, ast.Name)}


def names_from(tree: ast.AST, rooms: tuple[str, ...]) -> set[str]:
    """Names that are imported from these rooms."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(tuple(f"ownpath.{room}" for room in rooms))
        for alias in node.names
    }


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "verify").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_verify_looks_at_what_is_declared(path: Path) -> None:
    """Taps, calls and specs: no private name of another room's object, no question for a runner's or a part's class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = private_names_of(tree) | (asked_classes_of(tree) & names_from(tree, MODEL_ROOMS))
    name = path.relative_to(PACKAGE / "verify").as_posix()
    assert bool(found) == (name in TO_BE_DECLARED), (path, found)


def test_specs_import_no_torch() -> None:
    """Everything that a plan asks of a kernel is known without torch, a toolchain or a device."""
    script = (
        "import sys; import ownpath.kernels.registry; sys.exit(bool({'torch', 'triton', 'cutlass'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_IMPORTS = {"pickle", "dill", "marshal", "shelve", "cloudpickle"}


def test_no_code_from_data() -> None:
    """No pickle, eval, exec, torch.load, trust_remote_code or shell: data never becomes code."""
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports_of(path)} & BANNED_IMPORTS, path
        for node in (node for node in nodes_of(path) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            assert called not in BANNED_CALLS | {"torch.load", "os.system"}, f"{path}: {called}"
            names = {keyword.arg for keyword in node.keywords}
            assert not names & {"trust_remote_code"}, path
            assert not any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_no_exception_is_swallowed() -> None:
    for path in SOURCES:
        for node in (node for node in nodes_of(path) if isinstance(node, ast.ExceptHandler)):
            assert node.type is not None, f"{path}:{node.lineno} bare except"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (broad and silent), f"{path}:{node.lineno} swallows everything"


@cache
def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    found = []
    for path in SOURCES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((path, node))
    return found


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return sum((statement.end_lineno or 0) - statement.lineno + 1 for statement in body)


def test_functions_are_small() -> None:
    sizes = sorted(body_lines(node) for _, node in functions())
    assert statistics.median(sizes) <= 15
    assert sizes[int(0.9 * len(sizes))] <= 50


def is_entry_point(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns True if a launch fills its parameters one by one: the memory that a kernel works on, and its counts.

    All of Triton's functions, which take no structs; of the CuTe DSL's the kernel, and the call that compiles it.
    """
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(name.startswith(("triton.jit", "gluon.jit", "cute.kernel")) for name in decorators):
        return True
    return "cute.jit" in decorators and node.name == "__call__"


def test_functions_take_at_most_eight_parameters() -> None:
    for path, node in functions():
        if is_entry_point(node):
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in arguments if name not in ("self", "cls")])
        assert count <= 8, f"{path}: {node.name} takes {count}"


def test_files_are_one_room_with_one_job() -> None:
    for path in SOURCES:
        # A kernel of the DSL is one program: its parts share what is decided at compile time.
        most = 600 if path.parent.parent.name == "kernels" and path.stem.endswith("_sm90") else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= most, path


def test_public_functions_say_what_they_compute() -> None:
    missing = []
    for path in SOURCES:
        for node in tree_of(path).body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and ast.get_docstring(node) is None:
                missing.append(f"{path.name}:{node.name}")
    assert not missing


@cache
def names_of(path: Path) -> set[str]:
    names = {node.id for node in nodes_of(path) if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes_of(path) if isinstance(node, ast.arg)}
    return names | {node.attr for node in nodes_of(path) if isinstance(node, ast.Attribute)}


def test_one_meaning_of_scale() -> None:
    """Reciprocals end at the door: beyond ``checkpoint`` nothing is called ``*_inv``."""
    for path in SOURCES:
        if room_of(path) != "checkpoint":
            assert not {name for name in names_of(path) if name.endswith("_inv")}, path


def test_formats_are_decided_in_one_place() -> None:
    """Only the schema maps safetensors dtypes to formats; only the plan and the quantiser ask it. config.json only gets
    contradicted, and written by ``quantize/describe.py``. In ``integrations`` the words are an engine's names."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        is_read = "quantization_config" in text and room_of(path) != "integrations"
        assert not is_read or path.name in ("schema.py", "describe.py"), path
        assert "QUANTIZATION_FIELD" not in text or path.name in ("schema.py", "claims.py"), path
        assert "config.claims" not in text or path.name == "plan.py", path
        if room_of(path) not in ("checkpoint", "plan", "quantize"):
            assert "detect" not in names_of(path), path


def test_no_global_state() -> None:
    """Per-step state is an argument: no ``global`` statement, and no mutable container at module level."""
    for path in SOURCES:
        assert not [node for node in nodes_of(path) if isinstance(node, ast.Global | ast.Nonlocal)], path
        for node in tree_of(path).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            named_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if isinstance(value, ast.List | ast.Set | ast.Dict) and not named_all:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore[union-attr]
                assert ast.unparse(target).isupper(), f"{path}: {ast.unparse(target)} is mutable module state"


def test_configurations_are_frozen() -> None:
    from dataclasses import FrozenInstanceError

    from ownpath.config import EngineConfig

    with pytest.raises(FrozenInstanceError):
        EngineConfig().device = "cuda"  # type: ignore[misc]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them as top-level modules; interpreted and compiled kernels have runs of their own."""
    tests = PACKAGE.parents[1] / "tests"
    names = [path.name for room in ("arch", "cpu", "gpu") for path in (tests / room).rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


MAPS = {"safe_open", "load_file", "memmap", "fromfile", "torch.from_file", "np.load", "mmap.mmap"}
READS = {"read_text", "read_bytes"}
OTHER_FILES = {
    *("bench/record.py", "commands/quantize.py"),  # files that the user names
    *("kernels/dsl/cache.py", "kernels/fp8/choose.py", "kernels/nvfp4/choose.py", "bench/tune.py"),  # the package's own
    *("verify/budgets.py", "verify/environment_stage.py", "verify/html.py"),
    *("trace/launches.py", "verify/machine.py"),  # this process's, the system's
}
"""Files that open what is no checkpoint's. The list only shrinks."""


def opened_in(path: Path) -> Iterator[str]:
    """Yields the calls of a file that map a file, or open one without asking what it is and how large."""
    for node in nodes_of(path):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        owner, _, method = called.rpartition(".")
        if called in MAPS or method in MAPS or called == "open" or (owner and method in READS):
            yield called


def test_checkpoints_are_read_in_one_place() -> None:
    """No file is mapped, where shrinking would be a bus error, and all but a few are opened by ``files``."""
    found = {path.relative_to(PACKAGE).as_posix(): set(opened_in(path)) for path in SOURCES}
    assert found.pop("weights/operands.py") == {"mmap.mmap"}  # memory without a file
    assert {name for name, calls in found.items() if calls - {"path.open"}} <= OTHER_FILES
    assert not {name for name, calls in found.items() if {called.rpartition(".")[2] for called in calls} & MAPS}
