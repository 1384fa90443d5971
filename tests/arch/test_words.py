"""One word for one thing: a type name is defined once, and no docstring opens with a question word."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import ownpath

PACKAGE = Path(ownpath.__file__).parent
ROOT = Path(__file__).parents[2]
QUESTION = re.compile(r'"""(What|Which|Whether|How|Who|Where|When|Why)\b')


def type_names(tree: ast.Module) -> Iterator[str]:
    """Yields the classes, aliases and type variables that a module defines, without a leading underscore."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.lstrip("_")[0].isupper() and not target.id.isupper():
                yield target.id.lstrip("_")


def test_a_type_name_means_one_thing() -> None:
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in type_names(ast.parse(path.read_text(encoding="utf-8"))):
            found[name].append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_no_docstring_opens_with_a_question_word() -> None:
    asked = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("src", "bench", "tools", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if QUESTION.search(line)
    ]
    assert asked == []
