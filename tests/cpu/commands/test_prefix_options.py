"""The options of the prefix cache, from the command line, the environment and a file."""

import argparse
import re
from pathlib import Path

import pytest

from ownpath.commands import serve
from ownpath.commands.prefix_options import prefix_settings
from ownpath.commands.settings import parse_arguments
from ownpath.engine.prefix import PrefixSettings


def read(*argv: str, **environment: str) -> argparse.Namespace:
    parser = serve.add_parser(argparse.ArgumentParser().add_subparsers())
    return parse_arguments(parser, argv, environment)


def test_it_is_on_with_four_snapshots_and_a_tail_a_request() -> None:
    assert prefix_settings(read()) == PrefixSettings(64, 4096, 16)
    assert prefix_settings(read("--max-num-seqs", "3")) == PrefixSettings(12, 4096, 3)
    assert prefix_settings(read("--max-num-seqs", "3", "--prefix-tails", "0")) == PrefixSettings(12, 4096, 0)
    assert not read().prefix_salt_per_key


def test_each_place_can_change_it(tmp_path: Path) -> None:
    file = tmp_path / "ownpath.toml"
    file.write_text("prefix-snapshots = 5\nprefix-tails = 9\nprefix-interval = 1024\nprefix-salt-per-key = true\n")
    asked = read("--config", str(file), "--prefix-snapshots", "7")
    assert prefix_settings(asked) == PrefixSettings(7, 1024, 9)
    assert asked.prefix_salt_per_key
    assert prefix_settings(read(OWNPATH_PREFIX_INTERVAL="512")) == PrefixSettings(64, 512, 16)


def test_it_can_be_turned_off() -> None:
    assert prefix_settings(read("--no-prefix-cache")) is None
    assert prefix_settings(read(OWNPATH_NO_PREFIX_CACHE="true")) is None


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--prefix-snapshots", "0"), "at least|from 1"),
        (("--prefix-tails", "-1"), "at least|from 0"),
        (("--prefix-interval", "100"), "from 256"),
        (("--prefix-interval", "300"), "multiple of 256, found 300"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    argv: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(*argv)
    assert re.search(problem, capsys.readouterr().err)
