"""vLLM's engine in a process of its own, as a user has it; an engine's start takes most of a test's time, so that the
tests of one engine share its answers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_exports import Tensors, tiny_tensors, write_tiny

from ownpath.chat.tokenizer import Tokenizer
from ownpath.checkpoint.drafts import carried_draft
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.census import take_census
from ownpath.trace.observers import CallArguments, Observer, Watched

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WAIT_S = 900
QUESTIONS = ("The capital of France is", "The capital of Japan is")
NO_CLAMP = 1e6
"""A swiglu_limit that nothing reaches: vLLM 0.32's CPU build leaves it out of BF16 experts."""
torch.set_num_threads(1)


@dataclass(frozen=True)
class Answers:
    """ids: greedy answers. logprobs: of each text's tokens but the first. ranks: of each rank, see ``ask.look``."""

    ids: list[list[int]]
    texts: list[str]
    logprobs: list[list[float]]
    ranks: list[dict[str, Any]]
    log: str


def environment(**changes: str) -> dict[str, str]:
    """The environment of an engine: the shims of the CPU build, this package, and nothing from a network."""
    found = {
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",  # a rank's embedding is compiled, which asks that Triton for a compiler
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests send functions to ranks
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | found | changes


def start(folders: Sequence[Path], out: Path, options: dict[str, Any], **changes: str) -> tuple[int, str]:
    """Runs ``ask.py`` to its end; returns its exit status and log."""
    command = [sys.executable, str(HERE / "ask.py"), *map(str, folders), json.dumps(options), str(out)]
    ended = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=WAIT_S)
    return ended.returncode, ended.stdout + ended.stderr


def ask_each(folders: Sequence[Path], out: Path, options: dict[str, Any], **changes: str) -> list[Answers]:
    """Returns what an engine of each folder answers. Fails with the log if one ends otherwise."""
    status, log = start(folders, out, options, **changes)
    assert status == 0, log[-6000:]
    return [Answers(**found, log=log) for found in json.loads(out.read_text())]


def ask(folder: Path, out: Path, options: dict[str, Any], **changes: str) -> Answers:
    """Returns what one engine answers."""
    return ask_each([folder], out, options, **changes)[0]


@cache
def prompts() -> list[list[int]]:
    """The questions' token ids."""
    tokenizer = Tokenizer.from_folder(default_model_dir())
    return [[0, *tokenizer.encode_text(text)] for text in QUESTIONS]


@cache
def text_ids(num_tokens: int) -> list[int]:
    """Random ids, which no cache or model has a habit for: longer than a window and than CSA's and HCA's strides."""
    return torch.randint(3, 2000, (num_tokens,), generator=torch.Generator().manual_seed(11)).tolist()


def write_plain(folder: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **fields: Any) -> Path:
    """The embedded model in BF16, which stock vLLM loads. vLLM's CPU build selects 512 entries or all."""
    source = default_model_dir()
    index, config = CheckpointIndex.open(source), ModelConfig.from_file(source / "config.json")
    census, stored = take_census(config, index, carried_draft(index)), StoredWeights(index, torch.device("cpu"))
    tensors = {param.key: tiny_tensors()[param.key] for param in census.params}
    for module in census.modules:
        matrix = stored.matrix(module.spec.name, module.encoding)
        tensors[f"{module.spec.name}.weight"] = matrix.to(torch.bfloat16)
    return write_tiny(folder, change(tensors), config={"index_topk": 512} | fields)


def reference(folder: Path, dtype: torch.dtype = torch.float32, cache: CacheFormat = CacheFormat.BF16) -> Model:
    """Our own model of a folder."""
    return load_model(folder, EngineConfig(max_model_len=1024, dtype=dtype, cache_format=cache))


def greedy(model: Model, ids: list[int], num_tokens: int, stop: int = 1) -> list[int]:
    """Our own greedy answer."""
    found: list[int] = []
    while len(found) < num_tokens and found[-1:] != [stop]:
        batch = ForwardBatch.of([([*ids, *found], model.new_cache())], "cpu")
        found.append(int(model.forward(batch).argmax()))
    return found


def scores(model: Model, ids: list[int]) -> torch.Tensor:
    """Our own log-probs of each token but the first."""
    batch = ForwardBatch.of([(ids, model.new_cache())], "cpu", all_logits=True)
    return model.forward(batch).float().log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


class RouterScores(Observer):
    """Collects the scores by which each layer's router chooses, layer -> [T, E]; nothing of layers that look up."""

    def __init__(self) -> None:
        self.logits: dict[str, torch.Tensor] = {}
        self.found: dict[str, torch.Tensor] = {}

    def after(self, call: Watched, args: CallArguments, result: object) -> None:
        layer, _, what = call.slot.rpartition(".")
        if what == "gate":
            assert isinstance(result, torch.Tensor)
            self.logits[layer] = result.float()
        elif what == "router" and call.runner.bias_E is not None:  # type: ignore[attr-defined]
            scores = torch.nn.functional.softplus(self.logits[layer]).sqrt()
            self.found[layer] = scores + call.runner.bias_E  # type: ignore[attr-defined]


def near_ties(exact: Model, rounded: Model, ids: list[int]) -> torch.Tensor:
    """Rows whose experts roundings may change: some layer's margin is less than four times what they move a score of
    the row by.

    Behind another expert a log-prob is another number, and says nothing of roundings. bool [T].
    """
    seen = []
    for model in (exact, rounded):
        with model.ledger.observe(RouterScores()) as observer:
            scores(model, ids)
        seen.append(observer.found)
    close = torch.zeros(len(ids), dtype=torch.bool)
    for layer, right in seen[0].items():
        top = right.sort(dim=-1, descending=True).values
        k = exact.config.num_experts_per_tok
        close |= top[:, k - 1] - top[:, k] < 4 * (seen[1][layer] - right).abs().amax(dim=-1)
    return close


RUN_NO_KERNEL = ("test_refusals", "test_serve_refusals", "test_vllm_guard", "test_vllm_breaks")
"""The files whose engines end before a step, if they start one."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: runs vLLM's engine, in an environment of its own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs V4's CPU kernels where vLLM's build for this processor has none."""
    if "avx512f" in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        return
    reason = "vLLM's CPU build has V4's kernels for AVX-512 alone, and this processor lacks it"
    for item in items:
        if item.path.stem not in RUN_NO_KERNEL:
            item.add_marker(pytest.mark.skip(reason))
