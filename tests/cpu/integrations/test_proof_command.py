"""``ownpath verify --engine vllm``: what is refused before anything runs, and whose option an option is."""

from importlib.metadata import packages_distributions

import pytest

from ownpath.cli import main
from ownpath.commands.settings import PASSED_ON, parse_arguments
from ownpath.commands.verify import add_parser


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["verify", *options]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    return told


@pytest.mark.skipif("vllm" in packages_distributions(), reason="vLLM is installed")
def test_without_vllm_it_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = error_of(capsys, "--engine", "vllm")
    assert "vLLM is not installed in this environment" in told
    assert "pip install 'ownpath[vllm]'" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rows", "1,2"), "--rows: only with --engine vllm"),
        (("--max-num-seqs", "8"), "--max-num-seqs: only with --engine vllm"),
        (("--engine", "vllm", "--stages", "file"), "--stages is of ownpath's own engine"),
        (("--engine", "vllm", "--keep-going"), "--keep-going is of ownpath's own engine"),
        (("--engine", "vllm", "--rows", "1,0"), "--rows: '1,0': numbers of rows from 1 to 100000"),
        (("--engine", "sglang"), "--engine: invalid choice: 'sglang'"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in error_of(capsys, *options)


def test_options_that_verify_lacks_are_vllms_with_their_values() -> None:
    import argparse

    parser = add_parser(argparse.ArgumentParser().add_subparsers())
    asked = "--engine vllm --tensor-parallel-size 2 --layers 0,1 --kv-cache-dtype=fp8 --enforce-eager --html -"
    args = parse_arguments(parser, asked.split()[:-2], {})
    assert getattr(args, PASSED_ON) == ("--tensor-parallel-size", "2", "--kv-cache-dtype=fp8", "--enforce-eager")
    assert args.layers == {0, 1}
    assert args.model is None
