"""Settings of ``serve`` from the command line, the environment and a TOML file, in this order."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest

from ownpath.cli import main
from ownpath.commands import generate, serve
from ownpath.commands.settings import parse_arguments, variable_of
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.official import Step

SECRET = "a-secret-that-nobody-may-read"


def serve_parser() -> argparse.ArgumentParser:
    return serve.add_parser(argparse.ArgumentParser().add_subparsers())


def parsed(argv: list[str], environment: Mapping[str, str] | None = None) -> argparse.Namespace:
    return parse_arguments(serve_parser(), argv, environment or {})


def written(folder: Path, text: str) -> str:
    path = folder / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_settings_the_defaults_are_the_parsers() -> None:
    assert vars(parsed([])) == vars(serve_parser().parse_args([]))
    assert parsed([]).max_prefill_tokens is None, "the device decides"
    most = [EngineConfig.for_device(device).max_prefill_tokens for device in ("cpu", "cuda", "cuda:1")]
    assert most == [512, 2048, 2048]


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = written(
        tmp_path, 'port = 1\nhost = "a"\ndevice = "cuda"\nallowed-hosts = ["x", "y"]\nstrict-limits = true\n'
    )
    environment = {"OWNPATH_PORT": "2", "OWNPATH_HOST": "b", "OWNPATH_ALLOWED_HOSTS": "z, *.w"}
    args = parsed(["--config", file, "--port", "3"], environment)
    assert (args.port, args.host, args.device) == (3, "b", "cuda")
    assert args.allowed_hosts == ["z", "*.w"], "the values of one place, never of two"
    assert args.strict_limits is True
    assert args.strict_fields is False
    assert args.max_num_seqs == 16
    assert parsed(["--config", file, "--allowed-hosts", "q"], environment).allowed_hosts == ["q"]


def test_every_option_is_a_setting_in_both_places(tmp_path: Path) -> None:
    """A value that is right on the command line reads the same from the file and the environment."""
    (tmp_path / "model").mkdir()
    values = {
        "model": str(tmp_path / "model"), "served_model_name": "a", "release": "0731", "device": "cuda:1",
        "numerics": "official", "cache_format": "fp8", "reference": "layers.3", "max_model_len": "99",
        "max_num_seqs": "3", "num_cache_blocks": "70", "max_connections": "7", "request_timeout": "8",
        "step_timeout": "9", "max_prefill_tokens": "98",
        "drain_timeout": "2", "host": "::1", "prefix_snapshots": "4", "prefix_tails": "0", "prefix_interval": "512",
        "port": "0", "tls_cert": "c.pem", "tls_key": "k.pem", "api_key_file": "keys", "admin_key": SECRET,
        "allowed_hosts": "h", "allowed_origins": "https://o", "log_requests": "off", "log_format": "json",
        "otlp_traces_endpoint": "http://h/v1/traces", "ranks": "2", "attention": "data", "experts": "ids",
        "rank_timeout": "7",
    }  # fmt: skip
    switches = ["batch_invariant", "no_graphs", "allow_unverified", "strict_fields", "strict_limits", "insecure"]
    switches += ["no_prefix_cache", "prefix_salt_per_key", "random_weights", "draft"]
    dests = {action.dest for action in serve_parser()._actions}
    assert dests == {*values, *switches, "help", "list", "config"}
    argv = [values["model"]]
    for dest, value in values.items():
        argv += [] if dest == "model" else [f"--{dest.replace('_', '-')}", value]
    argv += [f"--{dest.replace('_', '-')}" for dest in switches]
    wanted = vars(parsed(argv))
    environment = {variable_of(dest): value for dest, value in values.items()}
    environment |= {variable_of(dest): "true" for dest in switches}
    assert vars(parsed([], environment)) == wanted
    lines = [f'{dest.replace("_", "-")} = "{value}"' for dest, value in values.items()]
    file = written(tmp_path, "\n".join([*lines, *(f"{dest} = true" for dest in switches)]))
    assert vars(parsed(["--config", file])) == wanted | {"config": file}
    assert vars(parsed([], {"OWNPATH_CONFIG": file})) == wanted | {"config": file}


def test_values_have_the_types_of_options(tmp_path: Path) -> None:
    file = written(tmp_path, 'max-num-seqs = 4\nnumerics = "kv"\ncache_format = "fp8"\nserved-model-name = "one"\n')
    args = parsed(["--config", file], {"OWNPATH_INSECURE": "0", "OWNPATH_HOST": "", "OWNPATH_UNHEARD_OF": "1"})
    assert (args.max_num_seqs, args.numerics, args.cache_format) == (4, frozenset({Step.KV}), CacheFormat.FP8)
    assert args.served_model_name == ["one"]
    assert args.insecure is False
    assert args.host == "127.0.0.1", "an empty variable is not set"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max-seqs = 4", "'max-seqs' is no setting"),
        (f'api-keys = "{SECRET}"', "'api-keys' is no setting"),
        ("[serve]\nport = 1", "'serve' is no setting"),
        ("help = true", "'help' is no setting"),
        ('config = "other.toml"', "'config' is no setting"),
        ("max-num-seqs = 4\nmax_num_seqs = 5", "'max_num_seqs' and 'max-num-seqs' are one setting"),
        ("max-num-seqs = 0", "max-num-seqs: must be a whole number of at least 1, found '0'"),
        ("max-num-seqs = 1.5", "max-num-seqs: must be a whole number"),
        ("max-num-seqs = true", "max-num-seqs: must be a text or a number"),
        ("port = [1]", "port: must be a text or a number"),
        ("insecure = 1", "insecure: must be true or false"),
        ('insecure = "yes"', "insecure: must be true or false"),
        ('release = "v9"', "release: 'v9' is none of v4, 0731, 0813"),
        ('device = "tpu"', "device: device 'tpu' is none of"),
        ('model = "nowhere"', "model: 'nowhere': no such model folder"),
        ('host = ""', "host: must not be empty"),
        (f"admin-key = ['{SECRET}']", "admin-key: must be a text or a number"),
        (f'admin-key = "{SECRET}', "not TOML"),
        ('"a\\nb" = 1', r"'a\nb' is no setting"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_setting(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    assert main(["serve", "--config", file]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ownpath: {file}: ")
    assert told in err
    assert err.count("\n") == 1
    assert SECRET not in err


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("OWNPATH_PORT", "tcp://10.0.0.1:8000", "OWNPATH_PORT: must be a whole number from 0 to 65535"),
        ("OWNPATH_STRICT_FIELDS", "yes", "OWNPATH_STRICT_FIELDS: must be true or false"),
        ("OWNPATH_ADMIN_KEY", "short-secret", "the admin key must be at least"),
        ("OWNPATH_CONFIG", "/nowhere/serve.toml", "/nowhere/serve.toml: no such file"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert "short-secret" not in err


@pytest.mark.parametrize("data", [b"\xff", b"a = " + b"[" * 20_000, b"#" * (2**20 + 1)])
def test_files_that_are_no_settings(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(data)
    assert main(["serve", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_usage_of_the_command_line_stays_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "x"]) == 2
    assert "--port: must be a whole number" in capsys.readouterr().err


def test_other_commands_take_no_settings() -> None:
    parser = generate.add_parser(argparse.ArgumentParser().add_subparsers())
    assert parse_arguments(parser, ["a"], {"OWNPATH_DEVICE": "cuda"}).device == "cpu"


def test_help_is_grouped_by_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    groups = ("model", "numerics and kernels", "limits", "requests", "server", "access", "logs and traces", "settings")
    places = [text.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    (others,) = (group for group in serve_parser()._action_groups if group.title == "options")
    assert {action.dest for action in others._group_actions} == {"help", "list"}
