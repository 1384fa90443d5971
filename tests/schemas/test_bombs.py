"""Every bomb ends within a second: it compiles, or it is refused."""

import pytest
from cpu.structured.test_compiler import BOMBS, judge_all
from support.grammars import BYTES

from ownpath.structured.compiler import GrammarCompiler

pytestmark = pytest.mark.schemas


def test_every_bomb_is_judged_within_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    compiler = GrammarCompiler(BYTES)
    compiler.start()
    try:
        refused = judge_all(compiler, BOMBS)
    finally:
        compiler.close()
    with capsys.disabled():
        print(f"\n{len(BOMBS)} bombs: {refused} refused, {len(BOMBS) - refused} compiled, each within a second")
    assert refused > len(BOMBS) // 4
