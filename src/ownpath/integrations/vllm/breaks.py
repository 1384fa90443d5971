"""Breaks in captured graphs: made again where vLLM imported V4's attention before it turned them on.

A breakable graph leaves the attention out of what it captures and calls it on every replay. vLLM marks such methods by
a decorator that looks at a variable (``SWITCH``) when their file is imported. It imports V4's while it looks
for a checkpoint's quantisation, and sets the variable for V4 after that. A process that was started since then, as
``vllm serve`` starts its engine, finds it set. In the same process, or one forked from it, nothing breaks: the graphs
of prefill and mixed steps hold the attention of a run without requests, which writes zeros and no keys, and nothing
says so.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

MARK, SWITCH = "eager_break_during_capture", "VLLM_USE_BREAKABLE_CUDAGRAPH"
Method = Callable[..., Any]


def take_breaks() -> str:
    """Mends V4's attention in this process's vLLM, before a model is built; returns what to say of it, if anything.

    Where breakable graphs are off, vLLM's decorator changes nothing, and neither does this.
    """
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention

    mended = mend_breaks(sys.modules[DeepseekV4Attention.__module__], eager_break_during_capture)
    if not mended:
        return ""
    return f"graphs break at {', '.join(mended)} again: vLLM had imported it before it turned breakable graphs on"


def mend_breaks(file: ModuleType, mark: Callable[[Method], Method]) -> tuple[str, ...]:
    """Applies ``mark`` to each method that the file's source marks and the imported class has bare; returns them."""
    mended = []
    for owner, name in marked_methods(inspect.getsource(file)):
        kind = getattr(file, owner)
        bare: Method = vars(kind)[name]
        marked = bare if hasattr(bare, "__wrapped__") else mark(bare)
        if marked is not bare:
            setattr(kind, name, marked)
            mended.append(f"{owner}.{name}")
    return tuple(mended)


def marked_methods(source: str) -> Iterator[tuple[str, str]]:
    """Yields class and name of each method with vLLM's mark."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for owner in classes:
        for part in owner.body:
            if isinstance(part, ast.FunctionDef) and MARK in map(ast.unparse, part.decorator_list):
                yield owner.name, part.name
