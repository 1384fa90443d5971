"""A wrong value is refused at once: before torch is imported, with exit code 2 and a line that names the option."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ownpath.cli import main

HEAVY = ("torch", "numpy", "safetensors", "pydantic", "starlette", "uvicorn", "rich")
REFUSALS: tuple[tuple[str, str], ...] = (
    ("dance", "dance"),
    ("plan --device tpu", "--device"),
    ("plan --device sm_", "--device"),
    ("plan --device cuda:x", "--device"),
    ("generate hello --device sm_90", "--device"),
    ("plan --numerics exact", "--numerics"),
    ("plan --no-such-option", "--no-such-option"),
    ("plan a b", "no such model folder"),
    ("plan /no/such/folder", "MODEL"),
    ("inspect /no/such/folder", "/no/such/folder"),
    ("serve --port 65536", "--port"),
    ("serve --port -1", "--port"),
    ("serve --port eighty", "--port"),
    ("serve --port 80_80", "--port"),
    ("serve --host no.such.host.invalid", "--host"),
    ("serve --host 192.0.2.1 --port 0", "no such address"),
    ("serve --release v3", "--release"),
    ("serve --admin-key short", "admin key"),
    ("serve --max-model-len 0", "--max-model-len"),
    ("generate hello --max-tokens -5", "--max-tokens"),
    ("generate hello --max-tokens 1.5", "--max-tokens"),
    ("generate hello --max-tokens 99999999999999999999999", "--max-tokens"),
    ("generate hello --temperature 9", "--temperature"),
    ("generate hello --temperature nan", "--temperature"),
    ("generate hello --top-p 0", "--top-p"),
    ("generate hello --seed 9223372036854775808", "--seed"),
    ("generate /no/such/folder", "no such model folder"),
    ("generate ./gone hello", "no such model folder"),
    ("generate several words unquoted", "quotes"),
    ("verify --stages files", "--stages"),
    ("verify --layers 3-1", "--layers"),
    ("verify --experts 0", "--experts"),
    ("verify --ledger /no/such/file", "--ledger"),
    ("verify --html /no/such/folder/page.html", "--html"),
    ("verify --json /proc", "--json"),
    ("verify --work /dev/null", "--work"),
    ("verify --source /no/such/folder", "--source"),
    ("diff --against 127.0.0.1:8000", "127.0.0.1:8000"),
    ("diff --against http://127.0.0.1:1 --tolerance -1", "--tolerance"),
    ("diff --against http://127.0.0.1:1 --timeout inf", "--timeout"),
    ("diff --against http://127.0.0.1:1 --api-key-env NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE"),
    ("diff --against http://127.0.0.1:1", "nothing listens there"),
    ("quantize /no/such/folder out", "SRC"),
    ("quantize . /dev/null", "DST"),
    ("quantize . out --max-shard-mb 0", "--max-shard-mb"),
    ("bench cooking", "BENCH"),
    ("bench", "moe"),
    ("bench moe --shape nothing", "--shape"),
    ("bench attend --shape nothing", "--shape"),
    ("bench step --shape nothing", "--shape"),
    ("bench moe --context 8", "--context"),
    ("bench moe --library vllm", "--library"),
    ("bench moe --tokens 1,0", "--tokens"),
    ("bench --tune nothing", "nothing"),
)
SCRIPT = f"""
import json, sys
from ownpath.cli import main
for arguments in json.loads(sys.argv[1]):
    print(main(arguments.split()), flush=True)
    print(file=sys.stderr, flush=True)
    found = set({HEAVY!r}) & set(sys.modules)
    assert not found, (arguments, found)
"""


def test_every_refusal_names_the_option_before_anything_heavy_is_imported() -> None:
    arguments = json.dumps([argument for argument, _ in REFUSALS])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(REFUSALS), done.stdout
    told = done.stderr.removesuffix("\n\n").split("\n\n")
    for (argument, words), line in zip(REFUSALS, told, strict=True):
        assert "\n" not in line, (argument, line)
        assert line.startswith("ownpath"), (argument, line)
        assert words in line, (argument, line)


HUB = "deepseek-ai/DeepSeek-V4"


@pytest.mark.parametrize(
    "before",
    [["inspect"], ["plan"], ["verify"], ["generate"], ["serve"], ["diff", "--against", "http://127.0.0.1:1"],
     ["verify", "--source"], ["quantize"]],
)  # fmt: skip
@pytest.mark.parametrize("name", [HUB, f"https://hub.example/{HUB}", f"hf://{HUB}"])
def test_a_name_on_the_hub_is_told_how_to_download(
    before: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    after = ["out"] if before == ["quantize"] else []
    assert main([*before, name, *after]) == 2
    assert f"`hf download {HUB} --local-dir DeepSeek-V4`" in capsys.readouterr().err


def test_what_is_no_folder_is_told_as_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").touch()
    assert main(["plan", str(tmp_path / "model.gguf")]) == 2
    assert "is a file; a model is a folder" in capsys.readouterr().err
    assert main(["plan", ""]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["plan", "x" * 100_000]) == 2
    assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["plan", "--device", "tpu"]])
def test_help_and_refusals_take_no_third_of_a_second(argv: list[str]) -> None:
    """0.1 s of one core; of the processor's time, since the machine may be busy with other tests."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ownpath", *argv], capture_output=True, check=False, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
