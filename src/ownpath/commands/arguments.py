"""Arguments that several commands share, and what their values may be. Nothing heavy is imported here: a wrong value is
refused before torch is.

A type of argparse returns the value or raises ArgumentTypeError with a sentence, to which argparse adds the option.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.formats import CacheFormat
from ownpath.official import PLAIN, Step, parse_numerics
from ownpath.terminal.text import quoted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

OptionHolder = argparse._ActionsContainer
"""A parser, or a group of its options."""

_HUB_NAME = re.compile(r"(?:https?://[^/\s]+/|hf://)?([\w.-]+/[\w.-]+?)(?:/tree/\w+)?/?")
_HUB_WORD = re.compile(r"[\w-]*[A-Za-z]")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_GPU_KIND = re.compile(r"sm_\d{2,3}")


def add_model_argument(parser: OptionHolder) -> None:
    """Adds the optional model folder, ``args.model``: a path, or None for the embedded model."""
    parser.add_argument(
        "model", nargs="?", type=model_folder, metavar="MODEL", help="model folder (default: the embedded model)"
    )


class _Print(argparse.Action):
    """Prints a text and exits before other arguments are required."""

    def __init__(self, option_strings: list[str], dest: str, const: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert callable(self.const)
        print(self.const())
        parser.exit()


def add_list_argument(parser: argparse.ArgumentParser, text: Callable[[], str], what: str) -> None:
    """Adds ``--list``: prints ``text()`` and exits with code 0. what: the content of the list, for ``--help``."""
    parser.add_argument("--list", action=_Print, const=text, help=f"print {what}, and end")


def add_engine_arguments(parser: OptionHolder, limits: OptionHolder | None = None) -> None:
    """Adds where to run, which properties kernels must have, and how long a sequence may get. limits: the group of
    that; None: the same."""
    add_plan_arguments(parser)
    (limits or parser).add_argument(
        "--max-model-len",
        type=whole_number(1),
        default=4096,
        metavar="N",
        help="most tokens of one prompt and its answer (default: 4096)",
    )
    (limits or parser).add_argument(
        "--max-prefill-tokens",
        type=whole_number(1),
        metavar="N",
        help="most prompt tokens that a step reads: with more, long prompts are read faster, and answers beside them "
        "wait longer (default: 2048 on a GPU, 512 on a CPU)",
    )
    parser.add_argument(
        "--no-graphs",
        action="store_true",
        help="run all steps eagerly on a GPU, without CUDA graphs; the bits of decode steps are the same",
    )


def add_draft_argument(parser: OptionHolder) -> None:
    """Adds ``--draft``."""
    parser.add_argument(
        "--draft",
        action="store_true",
        help="load the checkpoint's MTP module and draft with it: a step verifies a guess of each request's next token "
        "where that pays; answers are those without",
    )


def add_plan_arguments(parser: OptionHolder, *, any_gpu: bool = False) -> None:
    """Adds what a plan depends on besides the checkpoint. any_gpu: a GPU that is not here may be named too."""
    also = "; sm_90, sm_100: a GPU that need not be here" if any_gpu else ""
    parser.add_argument(
        "--device",
        type=planned_device if any_gpu else device_here,
        default="cpu",
        help=f"cpu, cuda or cuda:N{also} (default: cpu)",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="only kernels whose result for a token does not depend on the other tokens of the step",
    )
    parser.add_argument(
        "--numerics",
        type=numerics_of,
        default=PLAIN,
        metavar="plain|official|STEP,...",
        help="round nowhere but in the kernels, or where DeepSeek's published code does (default: plain); steps: "
        + ", ".join(Step),
    )
    parser.add_argument(
        "--cache-format",
        type=cache_format_of,
        metavar="|".join(CacheFormat),
        default=CacheFormat.BF16,
        help="format of keys in the caches: bf16, the activations' dtype; fp8, the pages of DeepSeek's published "
        "caches, about half the memory; or fp4-index, those with the indexer's keys in FP4 (default: bf16)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="draw all weights in memory and read no shard, as an export with NVFP4 experts and FP8 linears of this "
        "config.json: to measure what a model of this shape costs",
    )
    add_reference_argument(parser)


def add_reference_argument(parser: OptionHolder) -> None:
    """Adds ``--reference``, repeatable; ``args.reference`` is a list of names."""
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="MODULE",
        help="have the torch reference compute this module, or all of layers.3, from what is stored: slow, and right "
        "where a kernel's form of the weight would not be; repeatable",
    )


def cache_format_of(text: str) -> CacheFormat:
    """Returns a format by its name. Errors: ArgumentTypeError for another."""
    for cache_format in CacheFormat:
        if text == cache_format:
            return cache_format
    raise argparse.ArgumentTypeError(f"{quoted(text)} is none of {', '.join(CacheFormat)}")


def numerics_of(text: str) -> frozenset[Step]:
    """Parses ``--numerics``. Errors: ArgumentTypeError naming a word that is not a step."""
    try:
        return parse_numerics(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Makes the type of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,20}", text.strip(), re.ASCII) else None
        if value is None or value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, found {quoted(text)}")
        return value

    return parse


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """Makes the type of finite numbers from ``least`` (above: larger than ``least``) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        is_enough = value > least if above else value >= least
        if not is_enough or value > most or value == float("inf"):
            bounds = f"{'above' if above else 'of at least'} {least:g}"
            bounds += "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, found {quoted(text)}")
        return value

    return parse


def some_text(text: str) -> str:
    """Parses a text that must not be empty; an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def device_here(text: str) -> str:
    """Parses the name of a device to run on; an argparse type. Whether it is there is asked when torch is loaded."""
    if not _DEVICE.fullmatch(text):
        hint = " (`ownpath plan` alone takes a GPU that is not here)" if _GPU_KIND.fullmatch(text) else ""
        raise argparse.ArgumentTypeError(f"device {quoted(text)} is none of cpu, cuda and cuda:N{hint}")
    return text


def planned_device(text: str) -> str:
    """Parses the name of a device to plan for, here or not; an argparse type."""
    if not _DEVICE.fullmatch(text) and not _GPU_KIND.fullmatch(text):
        raise argparse.ArgumentTypeError(f"device {quoted(text)} is none of cpu, cuda, cuda:N and sm_NN (as sm_90)")
    return text


def model_folder(text: str) -> Path:
    """Parses the path of a model folder; an argparse type. For a name on the hub the error says how to download it."""
    if text and os.path.isdir(text):  # noqa: PTH112 (False for what is no path at all, where Path raises)
        return Path(text)
    if not text:
        problem = "the name of the model folder is empty (is a variable of the shell not set?)"
    elif os.path.exists(text):  # noqa: PTH110
        problem = f"{_shown(text)} is a file; a model is a folder with config.json, tokenizer.json and its shards"
    elif name := hub_name(text):
        folder = name.partition("/")[2]
        problem = (
            f"{_shown(text)} is no folder here, and ownpath downloads nothing. If it is a model on the Hugging Face "
            f"hub, fetch it with `hf download {name} --local-dir {folder}`, then give {folder} as MODEL"
        )
    else:
        problem = f"{_shown(text)}: no such model folder"
    raise argparse.ArgumentTypeError(problem)


def hub_name(text: str) -> str | None:
    """Returns ORG/NAME where a text is such a name, or an address that ends in it."""
    match = _HUB_NAME.fullmatch(text)
    return match[1] if match is not None and all(map(_HUB_WORD.match, match[1].split("/"))) else None


def file_to_read(text: str) -> Path:
    """Parses the path of an existing file; an argparse type."""
    if not os.path.isfile(text):  # noqa: PTH113
        raise argparse.ArgumentTypeError(f"{_shown(text)}: no such file")
    return Path(text)


def file_to_write(text: str) -> Path:
    """Parses the path of a file that can be written, or not yet is there; an argparse type.

    Minutes of work come before the file is written, so its folder is looked at first.
    """
    path = Path(some_text(text))
    if os.path.isdir(text):  # noqa: PTH112
        raise argparse.ArgumentTypeError(f"{_shown(text)} cannot be written: it is a folder")
    if not os.path.isdir(path.parent) or not os.access(path if os.path.exists(text) else path.parent, os.W_OK):  # noqa: PTH110, PTH112
        raise argparse.ArgumentTypeError(f"{_shown(text)} cannot be written there")
    return path


def folder_to_write(text: str) -> Path:
    """Parses the path of a folder that is there or can be made; an argparse type."""
    if os.path.exists(some_text(text)) and not os.path.isdir(text):  # noqa: PTH110, PTH112
        raise argparse.ArgumentTypeError(f"{_shown(text)} is a file, not a folder")
    return Path(text)


def _shown(path: str) -> str:
    """Quotes a path, whole unless it is longer than a path can be."""
    return quoted(path, 4096)
