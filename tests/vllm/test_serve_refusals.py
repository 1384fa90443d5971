"""``vllm serve`` on what it must not serve: it ends with a code and a sentence, and its port never opens."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from serving import Ended, refused
from support.tiny_exports import Tensors, tiny_tensors, write_tiny

from ownpath.loading import default_model_dir

pytestmark = pytest.mark.vllm
CONFIG = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
MISSING, WRONG, NAN = "layers.1.attn.wo_b.weight_scale", "layers.2.ffn.experts.3.w1.weight_scale_2", "norm.weight"
DEMANDED = ("--load-format", "ownpath")


@dataclass(frozen=True)
class Refusal:
    """A fault, and words of the log. version: what vLLM says that it is."""

    words: tuple[str, ...]
    folder: str = "tiny"
    options: tuple[str, ...] = ()
    version: str = ""
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "missing tensor": Refusal((f"tensor '{MISSING}' is missing (modelopt-nvfp4 stores it)",), "missing"),
    "wrong scale": Refusal((f"'{WRONG}'", "-0.5"), "wrong"),
    "NaN": Refusal((f"tensor '{NAN}'", "holds NaN or infinity"), "nan"),
    "another version": Refusal(("ownpath knows vLLM", "0.99.0", "OWNPATH_VLLM_ANY_VERSION"), version="0.99.0"),
    "killed plugin, demanded": Refusal(
        ("Load format `ownpath` is not supported",), options=DEMANDED, environment={"VLLM_PLUGINS": "vllm_cpu_shims"}
    ),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Ended]]:
    """The end of each start; two at a time."""
    root, tensors = tmp_path_factory.mktemp("refused"), tiny_tensors()
    folders = {
        "tiny": default_model_dir(),
        "missing": write_tiny(root / "missing", _without(tensors, MISSING), config=CONFIG),
        "wrong": write_tiny(root / "wrong", tensors | {WRONG: torch.tensor(-0.5)}, config=CONFIG),
        "nan": write_tiny(root / "nan", tensors | {NAN: tensors[NAN] * torch.nan}, config=CONFIG),
    }

    def start(case: Refusal) -> Ended:
        folder, work = folders[case.folder], tmp_path_factory.mktemp("serve")
        return refused(folder, work, case.options, version=case.version, **case.environment)

    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(start, case) for name, case in CASES.items()}


def _without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize("name", CASES)
def test_a_start_ends_before_its_port_opens(name: str, ended: dict[str, Future[Ended]]) -> None:
    found = ended[name].result()
    assert found.code != 0
    assert not found.had_port
    for words in CASES[name].words:
        assert words in found.log, found.log[-4000:]
