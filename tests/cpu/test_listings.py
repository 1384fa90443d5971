"""``--list`` prints the tables that the code goes by, whole, and needs neither a model nor a server."""

import pytest

from ownpath.checkpoint.problems import FOUND_WHEN, REMEDIES
from ownpath.checkpoint.schema import ENCODINGS
from ownpath.cli import main
from ownpath.diff.checks import CHECKS
from ownpath.kernels.registry import SPECS
from ownpath.official import Step
from ownpath.selftest.checks import REMEDIES as SELFTEST_REMEDIES
from ownpath.server import fields
from ownpath.server.empty_content import EmptyContent
from ownpath.server.protocol import ChatRequest, CompletionRequest
from ownpath.verify.checks import ENGINE_FAILS_ON, ENGINE_TITLES, FAILS_ON, TITLES
from ownpath.verify.machine import KNOWN_BAD


def listed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, "--list"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 120 for line in out.splitlines())
    return out


def names(text: str) -> list[str]:
    """Returns the entries' names, which start at the margin."""
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def test_verify_lists_every_check_with_what_makes_it_fail(capsys: pytest.CaptureFixture[str]) -> None:
    out = listed("verify", capsys)
    assert names(out) == [*TITLES, *ENGINE_TITLES, "known to fail (E01):", *(bad.what for bad in KNOWN_BAD)]
    assert FAILS_ON.keys() == TITLES.keys()
    assert ENGINE_FAILS_ON.keys() == ENGINE_TITLES.keys()
    assert out.count("  fails on: ") == len(TITLES) + len(ENGINE_TITLES)


def test_inspect_lists_every_problem_and_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    out = listed("inspect", capsys)
    assert FOUND_WHEN.keys() == REMEDIES.keys()
    assert set(REMEDIES) | {f"{it.name} ({it.format})" for it in ENCODINGS} <= set(names(out))
    assert "  weight_global_scale: F32 or BF16 or F16 [1], 1 / global_scale\n" in out
    assert "  scale: F8_E8M0 or F32 or BF16 or F16 [2, 4], scale\n" in out


def test_plan_lists_every_kernel_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = names(listed("plan", capsys))
    kernels = [f"{it.kind}: {it.name}" for it in SPECS]
    assert [name for name in found if name in kernels] == kernels
    assert set(Step) <= set(found)


def test_serve_lists_every_field_reason_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    out = listed("serve", capsys)
    honoured = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert honoured | {reason.value for reason in EmptyContent} | SELFTEST_REMEDIES.keys() <= set(names(out))
    words = out.replace(",", " ").split()
    for listed_names in (fields.CHAT, fields.COMPLETION, fields.MESSAGE, fields.STREAM_OPTIONS, fields.LABELS):
        assert set(listed_names) <= set(words)
    assert "  0 takes the likeliest token (>= 0, <= 2, default 1.0)\n" in out


def test_diff_lists_every_check_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(listed("diff", capsys)) == [it.id for it in CHECKS]
