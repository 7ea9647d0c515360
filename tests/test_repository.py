"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from os import walk
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports


ROOT = Path(__file__).resolve().parent.parent

# what `auto_map` names and what that imports; found by following the relative imports, see `remote_files`
REMOTE_ROOTS = ("configuration_arclm", "generation_bd3lm", "modeling_arclm")
PROVIDED = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
OPTIONAL = {"triton"}
# socket, process, pickle and dynamic code, each with its usual doors
FORBIDDEN_MODULES = {
    *("asyncio", "ftplib", "http", "smtplib", "socket", "socketserver", "ssl", "urllib", "xmlrpc"),
    *("ctypes", "multiprocessing", "pty", "subprocess"),
    *("dbm", "marshal", "pickle", "shelve"),
    *("builtins", "code", "codeop", "imp", "runpy"),
}
FORBIDDEN_NAMES = re.compile(
    r"eval|exec|compile|__import__|os\.(system|popen|fork\w*|exec\w+|spawn\w+|posix_spawn\w*)|torch\.(load|hub\..+)"
    r"|importlib\.(import_module|reload)"
)

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 100
LOOPS = ("generate",)  # the functions that tell the story in one piece, two at most
MAX_FILE_BYTES = 10_000_000


def repository_files() -> Iterator[Path]:
    """Every file below the root that .gitignore does not name."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    patterns = [line.strip("/") for line in lines if line and not line.startswith("#")] + [".git"]

    def is_ignored(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    for folder, folders, files in walk(ROOT):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        yield from (Path(folder, name) for name in sorted(files) if not is_ignored(name))


def parse(path: Path) -> ast.Module:
    assert path.is_file(), f"{path.name} is missing. The Hub loads it, or a file the Hub loads imports it."
    return ast.parse(path.read_text(), filename=str(path))


def remote_imports(name: str) -> set[str]:
    """The files that remote file `name` imports relatively, as the loader of transformers sees them."""
    path = ROOT / f"{name}.py"
    return set(get_relative_imports(path)) if path.is_file() else set()


def remote_files(*roots: str) -> list[str]:
    """`roots` and all that they import relatively, directly or not."""
    found, pending = set(), set(roots)
    while pending:
        name = pending.pop()
        found.add(name)
        pending |= remote_imports(name) - found
    return sorted(found)


def catches_import_error(node: ast.Try) -> bool:
    types = [handler.type for handler in node.handlers if handler.type is not None]
    names = {name.id for type_ in types for name in ast.walk(type_) if isinstance(name, ast.Name)}
    return bool(names & {"ImportError", "ModuleNotFoundError"})


def absolute_imports(node: ast.AST, is_guarded: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted module, line, whether an `except ImportError` guards it) of each absolute import below `node`."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, is_guarded) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from ((f"{node.module}.{alias.name}", node.lineno, is_guarded) for alias in node.names)
    guarded = set(node.body) if isinstance(node, ast.Try) and catches_import_error(node) else set()
    for child in ast.iter_child_nodes(node):
        yield from absolute_imports(child, is_guarded or child in guarded)


@pytest.mark.parametrize("name", remote_files(*REMOTE_ROOTS))
def test_remote_file_imports_only_what_the_hub_provides(name):
    tree = parse(ROOT / f"{name}.py")
    for module, line, is_guarded in absolute_imports(tree):
        package = module.partition(".")[0]
        place = f"{name}.py:{line} imports {package}"
        assert package in PROVIDED | OPTIONAL, f"{place}. Loading a model from the Hub must not need it."
        assert package in PROVIDED or is_guarded, f"{place} outside try / except ImportError."
    # the scanner of transformers asks for these before it loads the file
    unexpected = set(get_imports(ROOT / f"{name}.py")) - PROVIDED
    assert not unexpected, f"transformers would refuse to load {name}.py without {sorted(unexpected)}."


@pytest.mark.parametrize("name", remote_files(*REMOTE_ROOTS))
def test_remote_file_imports_its_neighbours_in_the_one_form_the_hub_loads(name):
    nodes = [node for node in ast.walk(parse(ROOT / f"{name}.py")) if isinstance(node, ast.ImportFrom) and node.level]
    for node in nodes:
        is_loadable = node.level == 1 and node.module is not None and "." not in node.module
        assert is_loadable, f"{name}.py:{node.lineno}: `{ast.unparse(node)}` has to be `from .name import X`."
    # the scanner reads text, not syntax: a docstring line of that form counts as an import
    only_text = remote_imports(name) - {node.module for node in nodes}
    assert not only_text, f"{name}.py: a line of text reads as an import of {sorted(only_text)}. Reword it."


@pytest.mark.parametrize("name", remote_files(*REMOTE_ROOTS))
def test_remote_file_opens_no_door(name):
    tree = parse(ROOT / f"{name}.py")
    for module, line, _ in absolute_imports(tree):
        is_forbidden = module.partition(".")[0] in FORBIDDEN_MODULES or FORBIDDEN_NAMES.fullmatch(module)
        assert not is_forbidden, f"{name}.py:{line} imports {module}: no socket, process, pickle or dynamic code here."
    for node in ast.walk(tree):
        is_forbidden = isinstance(node, ast.Name | ast.Attribute) and FORBIDDEN_NAMES.fullmatch(ast.unparse(node))
        assert not is_forbidden, f"{name}.py:{node.lineno} uses {ast.unparse(node)}: no dynamic code or pickle here."


def test_arrows_between_remote_files_point_one_way():
    assert remote_files("configuration_arclm") == ["configuration_arclm"], "The configuration imports a neighbour."
    assert "modeling_arclm" not in remote_files("generation_bd3lm"), (
        "generation_bd3lm.py imports modeling_arclm.py. It knows the model only through `forward`."
    )
    for name in remote_files(*REMOTE_ROOTS):
        cycle = [other for other in remote_imports(name) if name in remote_files(other)]
        assert not cycle, f"{name}.py and {cycle} import each other."


def test_root_is_no_regular_package():
    # with one, pytest imports the checkout as a package named after its folder
    assert not (ROOT / "__init__.py").exists(), "Remove __init__.py from the root."


def test_files_are_short():
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in repository_files()
        if path.suffix == ".py" and (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long, f"Files above {MAX_FILE_LINES} lines: {too_long}. Split them by subject."


def test_functions_are_short():
    assert len(LOOPS) <= 2, f"LOOPS names {len(LOOPS)} functions, two are allowed."
    too_long = {}
    for path in repository_files():
        for node in ast.walk(parse(path)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > (MAX_LOOP_LINES if node.name in LOOPS else MAX_FUNCTION_LINES):
                    too_long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not too_long, (
        f"Functions above {MAX_FUNCTION_LINES} lines ({MAX_LOOP_LINES} for {' and '.join(LOOPS)}): {too_long}."
    )


def test_files_are_small():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in repository_files() if not path.is_symlink()}
    too_large = {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES}
    assert not too_large, f"Files above {MAX_FILE_BYTES} bytes: {too_large}. Ignore, shrink or split them."


def test_constraints_are_exact_versions_without_addresses():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    inexact = [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not inexact, f"constraints.txt needs `name==version` without build tag or address, got {inexact}."
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"constraints.txt pins more than once: {twice}."
