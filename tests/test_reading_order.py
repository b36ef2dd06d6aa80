"""In the files that are read from top to bottom, no name is met above its definition."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def names_bound_by(node):
    """The names that a statement, or all statements in a body, bind in their own scope."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(child.name)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, ast.arg):
            names.add(child.arg)
        elif not isinstance(child, ast.Lambda):  # its parameters are its own
            names |= names_bound_by(child)
    return names


def definitions(tree):
    """{a top-level name: the line of its first definition}."""
    lines = {}
    for statement in tree.body:
        for name in names_bound_by(ast.Module([statement], [])):
            lines.setdefault(name, statement.lineno)
    return lines


def uses(node, hidden=frozenset()):
    """Yields (name, line) of every name that is read, in annotations in quotes, too.

    Names that an enclosing function binds are its own: `hidden`.
    """
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        hidden = hidden | names_bound_by(node)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            if child.id not in hidden:
                yield child.id, child.lineno
        for field in ("annotation", "returns"):
            quoted = getattr(child, field, None)
            if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
                parsed = ast.parse(quoted.value, mode="eval")
                yield from ((name, quoted.lineno) for name, _ in uses(parsed))
        yield from uses(child, hidden)


def used_too_early(source):
    """Sorted 'line: name' of every top-level name that is read above its definition."""
    tree = ast.parse(source)
    defined = definitions(tree)
    early = {(line, name) for name, line in uses(tree) if line < defined.get(name, 0)}
    return [f"{line}: {name}" for line, name in sorted(early)]


@pytest.mark.parametrize("file", ["lamoe.py", "bpe.py"])
def test_no_name_is_used_above_its_definition(file):
    assert used_too_early((ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file, needs", [("lamoe.py", {"torch"}), ("bpe.py", {"numpy", "regex"})])
def test_it_may_be_copied_alone(file, needs):
    """Nowhere does it import what is not in Python or named here, inside of functions either."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - sys.stdlib_module_names == needs


@pytest.mark.parametrize(
    "source, early",
    [
        ("def f():\n    return g()\ndef g(): pass", ["2: g"]),
        ("class A:\n    def m(self):\n        return B\nclass B: pass", ["3: B"]),
        ("def f(x: 'A') -> 'B': pass\nclass A: pass\nclass B: pass", ["1: A", "1: B"]),
        ("def f(x=LIMIT): pass\nif True:\n    LIMIT = 3", ["1: LIMIT"]),
        ("def f():\n    return [g for _ in ()]\ng, h = 1, 2", ["2: g"]),
        ("def f():\n    g = 1\n    return g\ndef g(): pass", []),
        ("def f(g):\n    return lambda: g\ndef g(): pass", []),
        ("def f(x):\n    return x.g\ndef g(): pass", []),
        ("def f():\n    return f()\nx = f()", []),
    ],
)
def test_the_check_itself(source, early):
    assert used_too_early(source) == early
