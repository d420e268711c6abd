"""Print facts of a package's code that a reader meets: sizes, branches, parameters, order and names.

    python tests/facts.py ser            # any folder of Python files
    python tests/facts.py ser --bars     # exit status 1 where a limit of this project is passed

Code lines are those without comments, docstrings and empty lines. Complexity is McCabe's count of branches. A
definition is used above its place where a function or class of the same file, which stands above it, names it. A
name has two meanings where two files define a function or class of that name at their top.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.comprehension, ast.With, ast.ExceptHandler)
BRANCHES += (ast.Assert,)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
COMMAND = {"add_arguments", "parse", "run", "errors_told"}  # what each module of a command has: see ser/cli
LONGEST, COMPLEX, MANY, ABOVE = 100, 10, 4, 40  # bars: lines of a function, and how many may pass the limits below
COMPLEXITY, PARAMETERS = 15, 8


@dataclass(frozen=True, order=True)
class Function:
    """Describe one function or method."""

    lines: int
    complexity: int
    parameters: int
    name: str


@dataclass(frozen=True)
class Facts:
    """Hold what was counted in a package."""

    files: int
    lines: int
    code: int
    functions: list[Function]  # the longest first
    above: int  # definitions used above their place
    twice: list[str]  # names with two meanings

    @property
    def complex(self) -> list[Function]:
        """Return the functions of too many branches."""
        return [function for function in self.functions if function.complexity > COMPLEXITY]

    @property
    def many(self) -> list[Function]:
        """Return the functions of too many parameters."""
        return [function for function in self.functions if function.parameters > PARAMETERS]

    def passed_bars(self) -> list[str]:
        """Say which limits are passed."""
        counts = {
            f"the longest function has {self.functions[0].lines} lines": self.functions[0].lines > LONGEST,
            f"{len(self.complex)} functions of complexity over {COMPLEXITY}": len(self.complex) > COMPLEX,
            f"{len(self.many)} functions of over {PARAMETERS} parameters": len(self.many) > MANY,
            f"{self.above} definitions used above their place": self.above > ABOVE,
            f"names with two meanings: {', '.join(self.twice)}": bool(self.twice),
        }
        return [text for text, passed in counts.items() if passed]


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of all lines in docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def used_above(tree: ast.Module) -> int:
    """Count the definitions that a function or class above them names."""
    places = {node.name: node.lineno for node in tree.body if isinstance(node, DEFINITIONS)}
    early: set[str] = set()
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            used = {m.id for m in ast.walk(node) if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Load)}
            early |= {name for name in used if name != node.name and places.get(name, 0) > node.lineno}
    return len(early)


def functions_of(tree: ast.Module, path: Path) -> Iterator[Function]:
    """Measure each function and method of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = list(ast.walk(node))
            branches = sum(isinstance(m, BRANCHES) for m in inside)
            conditions = sum(len(m.values) - 1 for m in inside if isinstance(m, ast.BoolOp))
            first = node.args.args[0].arg if node.args.args else ""
            names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = len(names) - (first in ("self", "cls", "ctx"))
            lines = (node.end_lineno or 0) - node.lineno + 1
            yield Function(lines, 1 + branches + conditions, own, f"{path}:{node.name}")


def measure(root: Path) -> Facts:
    """Count everything in the Python files of a folder."""
    files = lines = code = above = 0
    functions: list[Function] = []
    meanings: Counter[str] = Counter()
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        quiet = docstring_lines(tree)
        numbered = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
        files += 1
        lines += text.count("\n")
        code += sum(1 for i, line in numbered if line and not line.startswith("#") and i not in quiet)
        above += used_above(tree)
        functions += functions_of(tree, path)
        names = {node.name for node in tree.body if isinstance(node, DEFINITIONS) and node.name[:2] != "__"}
        meanings.update(names - COMMAND if path.parent.name == "cli" else names)
    twice = sorted(name for name, count in meanings.items() if count > 1)
    return Facts(files, lines, code, sorted(functions, reverse=True), above, twice)


def main() -> int:
    """Print the facts of the folder that the command line names."""
    facts = measure(Path(sys.argv[1]))
    lengths = sorted(function.lines for function in facts.functions)
    longest = facts.functions[0]
    print(
        f"files {facts.files}, lines {facts.lines}, code {facts.code}, functions {len(lengths)}: median "
        f"{lengths[len(lengths) // 2]}, p90 {lengths[int(len(lengths) * 0.9)]}, longest {longest.lines} "
        f"{longest.name}; over 60 lines {sum(n > 60 for n in lengths)}; complexity over {COMPLEXITY}: "
        f"{len(facts.complex)}; over {PARAMETERS} parameters: {len(facts.many)}; definitions used above their "
        f"place: {facts.above}"
    )
    for function in facts.functions[:5]:
        print(f"  longest {function.lines} lines, complexity {function.complexity}: {function.name}")
    print(f"  names with two meanings: {', '.join(facts.twice) or 'none'}")
    return int("--bars" in sys.argv and bool(facts.passed_bars()))


if __name__ == "__main__":
    sys.exit(main())
