"""How large the house is: lines and files a room, chains and circles of imports, functions used once, CPU of --help.

python bench/size.py
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "pc_clip", ROOT / "tests"
SUFFIXES = (".py", ".j2", ".css")


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    results = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        results[name] = ast.parse(path.read_text(encoding="utf-8"))
    return results


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in it."""
    edges: dict[str, set[str]] = {}
    for name, tree in trees.items():
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        edges[name] = {target for target in targets if target in trees and target not in (name, "pc_clip")}
    return edges


def floors(edges: dict[str, set[str]]) -> tuple[int, list[str]]:
    """The longest chain of imports, and the modules that lie on a circle."""
    level: dict[str, int] = {}
    left = dict(edges)
    while ready := [name for name, targets in left.items() if all(t in level for t in targets)]:
        for name in ready:
            level[name] = 1 + max((level[t] for t in left.pop(name)), default=0)
    return max(level.values(), default=0), sorted(left)


def used_once(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Private functions named once besides their definition; those of them under five lines."""
    named = Counter(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))))
    once = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("_")
        and not node.name.startswith("__")
        and named[node.name] == 2
    ]
    return len(once), sum(node.end_lineno - node.lineno + 1 < 5 for node in once)


def help_seconds(script: str) -> float:
    """CPU seconds, user and system, of `python SCRIPT --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / script), "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rooms = sorted(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
    files = {room.name: [p for p in room.rglob("*") if p.suffix in SUFFIXES] for room in rooms}
    files["(root)"] = [path for path in PACKAGE.glob("*.py")]
    for name, paths in files.items():
        print(f"{name:<12}{len(paths):>4} files{lines(paths):>8} lines")
    package = [path for paths in files.values() for path in paths]
    tests = list(TESTS.glob("*.py"))
    trees = modules()
    height, circle = floors(imports(trees))
    print(f"{'package':<12}{len(package):>4} files{lines(package):>8} lines")
    print(f"{'tests':<12}{len(tests):>4} files{lines(tests):>8} lines")
    print(f"longest chain of modules {height}; modules on circles: {', '.join(circle) or 'none'}")
    print("private functions used once: {}, under five lines: {}".format(*used_once(trees)))
    for script in ("generate_diffs.py", "finetune.py", "run.py"):
        print(f"{script} --help: {help_seconds(script):.2f} CPU seconds")


if __name__ == "__main__":
    main()
