"""The limits that keep the package readable, and the order in which its rooms may import each other.

python -m tests.layout
"""

import ast
import statistics
import sys
from pathlib import Path


TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "trl_quietstar"
# from the ground up: a module imports those before its own, and those of its own room
ORDER = (
    *("_compat", "settings", "text", "model", "branches", "thinking", "learning"),
    *("curriculum", "readers", "precision", "contradictions", "rules", "other_trainers", "derived"),
    *("config", "modeling", "data", "loading", "evaluation", "training", "trainer", "cli"),
)
APART = ("__init__", "custom_generate")  # load the others when they are asked for
FUNCTION_LINES, MEDIAN_LINES, FILE_LINES = 50, 8, 450
OTHER_FILES = {"trainer.py": 300, "modeling.py": 500, "config.py": 500}


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def room(path: Path, package: Path = PACKAGE) -> str:
    """A folder of the package, or a module beside them."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def functions(path: Path) -> dict[str, int]:
    """Lines of each function, its docstring aside."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            found[f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"] = lines
    return found


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Rooms that a module imports from when it runs; what types alone need does not count."""
    tree, found = ast.parse(path.read_text("utf-8")), set()
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(package).parts)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0 or id(node) in typing_only:
            continue
        if node.level == depth:  # from the top of the package
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        else:
            found.add(room(path, package))
    return found


def against_the_order(package: Path = PACKAGE) -> list[str]:
    """Imports that go up."""
    return [
        f"{path.relative_to(package)} imports {other}, which stands above it"
        for path in modules(package)
        if room(path, package) not in APART
        for other in sorted(imports(path, package) - set(APART))
        if ORDER.index(other) > ORDER.index(room(path, package))
    ]


def importing_tests(folder: Path = TESTS) -> list[str]:
    """Test files that import another one; what several need has a module of its own."""
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = getattr(node, "module", None) or ""
            parts = [part for name in (module, *names) for part in name.split(".")]
            found += [f"{path.name} imports {part}" for part in parts if names and part.startswith("test_")]
    return found


def too_long() -> list[str]:
    """Files and functions above their limits, and the median function if it is."""
    found, lengths = [], []
    for path in modules():
        lines = len(path.read_text("utf-8").splitlines())
        limit = OTHER_FILES.get(str(path.relative_to(PACKAGE)), FILE_LINES)
        if lines > limit:
            found.append(f"{path.relative_to(PACKAGE)} has {lines} lines, above {limit}")
        own = functions(path)
        lengths += own.values()
        found += [f"{name} has {lines} lines, above {FUNCTION_LINES}" for name, lines in own.items() if lines > 50]
    if statistics.median(lengths) > MEDIAN_LINES:
        found.append(f"the median function has {statistics.median(lengths)} lines, above {MEDIAN_LINES}")
    return found


def main() -> int:
    lengths = [lines for path in modules() for lines in functions(path).values()]
    total = sum(len(path.read_text("utf-8").splitlines()) for path in modules())
    print(
        f"{len(modules())} modules, {total:,} lines, {len(lengths)} functions, median {statistics.median(lengths):g}"
    )
    complaints = against_the_order() + too_long() + importing_tests()
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
