"""What is said of each field of a dataclass: the string literal under it, for `--help` and lists of options."""

import ast
import functools
import inspect
import textwrap


def field_docs(cls: type) -> dict[str, str]:
    """Field -> its text in one line, inherited ones too; a class without a source file has none."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _own_docs(base)
    return docs


@functools.cache
def _own_docs(cls: type) -> dict[str, str]:
    if not inspect.get_annotations(cls):
        return {}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # made by hand, or at a prompt
        return {}
    assert isinstance(tree, ast.ClassDef)
    docs, previous = {}, None
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous is not None:
            docs[previous] = " ".join(str(node.value.value).split())
        previous = (
            node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None
        )
    return docs
