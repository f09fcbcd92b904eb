"""Errors have one form: "argument: value, and what is accepted"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_holo

FILES = sorted(Path(hf_holo.__file__).parent.rglob("*.py"))
FIRST = re.compile(
    r"(\{\}|[A-Za-z_]\w*)(?:\[\{\}\])?"
)  # a name, or a value in its place, such as {name} or models[{key}]
# Words for what a function is called with that begin a sentence of another kind.
SENTENCES = ("module {} has no attribute {}",)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the message of every error that is made, with {} in the place of values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name.endswith("Error"):
                yield node.lineno, text(node.args[0])


def text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{}"


def parameters(tree: ast.AST) -> set[str]:
    """Names of the arguments of all functions, and of the fields of all classes."""
    names = {
        arg.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for arg in node.args + node.kwonlyargs
    }
    fields = (node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    return names | {target.id for target in fields if isinstance(target, ast.Name)}


def has_the_form(message: str, arguments: set[str]) -> bool:
    """Whether a message that begins with an argument goes on with a colon, or with others and then a colon."""
    first = FIRST.match(message)
    if first is None or message.startswith(SENTENCES):
        return True
    rest = message[first.end() :]
    if first[1] == "{}":
        return not rest.startswith(("=", " of shape"))
    return rest.startswith((": ", ", ", " and ")) if first[1] in arguments else not rest.startswith("=")


@pytest.mark.parametrize(
    ("message", "right"),
    [
        ("seed: {} is not a whole number", True),
        ("{}: {} is not positive", True),
        ("models[{}]: {} is not a class", True),
        ("keys, values: {} pairs", True),
        ("{} contains no text", True),
        ("there is no file {}", True),
        ("seed={} must be a whole number", False),
        ("{}={} must be positive", False),
        ("models[{}]={} must be a class", False),
        ("seed {} is not a whole number", False),
        ("{} of shape {} has no tokens", False),
        ("other={} is wrong", False),
    ],
)
def test_what_the_form_is(message, right):
    assert has_the_form(message, {"seed", "models", "keys", "values"}) == right


def test_every_error_of_the_package_has_the_form():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    found = [(path, line, message) for path, tree in trees.items() for line, message in messages(tree)]
    assert len(found) > 300
    arguments = {path: parameters(tree) for path, tree in trees.items()}
    wrong = [
        f"{path.name}:{line}: {message}" for path, line, message in found if not has_the_form(message, arguments[path])
    ]
    assert not wrong, "\n".join(wrong)
