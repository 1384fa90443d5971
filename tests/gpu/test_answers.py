"""The embedded model on CUDA, as people run it: its answers are those of the CPU reference, token by token."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

pytestmark = pytest.mark.gpu

QUESTIONS = (
    "The capital of France is",
    "The capital of Japan is",
    "The capital of Kenya is",
    "What is 2 + 3?",
    "What is 17 + 25?",
    "Repeat: apple river stone",
    "Which continent is Brazil in?",
    "Which currency is used in Iceland?",
)
# Texts that it was taught to continue: of others, the next token can be a near tie, which two dtypes break differently.
COMPLETIONS = (
    *QUESTIONS[:3],
    "2 + 3 =",
    "17 + 25 =",
    "Repeat: apple river stone\nAnswer:",
    "Question: What is 17 + 25?\nAnswer:",
    "Brazil is in",
)
MAX_TOKENS = 40


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(default_model_dir())


def greedy(model: Model, tokenizer: Tokenizer, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy answer's token ids, and by how much each one led the next best."""
    cache, chunk, ids, leads = model.new_cache(), prompt, [], []
    for _ in range(MAX_TOKENS):
        logits = model.forward(ForwardBatch.of([(chunk, cache)], model.cache_spec.device))[0, : tokenizer.num_tokens]
        best, second = logits.topk(2).values.tolist()
        ids.append(int(logits.argmax()))
        leads.append(best - second)
        if ids[-1] == tokenizer.eos_id:
            break
        chunk = ids[-1:]
    return ids, leads


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_answers_equal_the_cpu_reference(form: str, cuda: torch.device, tokenizer: Tokenizer) -> None:
    ours = load_model(default_model_dir(), EngineConfig.for_device(str(cuda), 512))
    reference = load_model(default_model_dir(), EngineConfig.for_device("cpu", 512))
    is_chat = form == "chat"
    for question in QUESTIONS if is_chat else COMPLETIONS:
        asked = encode_messages([Message("user", question)])
        prompt = tokenizer.encode_segments(asked) if is_chat else tokenizer.encode_raw(question)
        expected, leads = greedy(reference, tokenizer, prompt)
        found, _ = greedy(ours, tokenizer, prompt)
        assert found == expected, f"{question!r}: smallest lead on CPU {min(leads):.3f}"


def test_a_batch_answers_as_each_alone(cuda: torch.device, tokenizer: Tokenizer) -> None:
    """Prompts of different lengths prefilled together, then decoded side by side."""
    model = load_model(default_model_dir(), EngineConfig.for_device(str(cuda), 512))
    prompts = [tokenizer.encode_segments(encode_messages([Message("user", text)])) for text in QUESTIONS[:5]]
    alone = [greedy(model, tokenizer, prompt)[0][:8] for prompt in prompts]
    caches = [model.new_cache() for _ in prompts]
    chunks, together = prompts, [[] for _ in prompts]
    for _ in range(8):
        logits = model.forward(ForwardBatch.of(list(zip(chunks, caches, strict=True)), cuda))
        chosen = logits[:, : tokenizer.num_tokens].argmax(-1).tolist()
        for answer, token_id in zip(together, chosen, strict=True):
            answer.append(token_id)
        chunks = [[token_id] for token_id in chosen]
    assert [answer[: len(single)] for answer, single in zip(together, alone, strict=True)] == alone


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "ownpath", *args]


def test_generate_prints_the_same_on_both_devices(cuda: torch.device) -> None:
    options = ["The capital of Norway is", "--chat", "--max-tokens", "24", "--token-ids"]
    found = [
        subprocess.run(command("generate", *options, "--device", name), capture_output=True, text=True, check=True)
        for name in ("cpu", str(cuda))
    ]
    assert found[0].stdout
    assert found[0].stdout == found[1].stdout
    progress = ("starting", "loading", "compiling", "warming up", "capturing")  # told after two seconds
    assert not [line for line in found[1].stderr.splitlines() if not line.startswith(progress)]


def test_serve_answers_and_says_which_kernels_ran(cuda: torch.device) -> None:
    process = subprocess.Popen(
        command("serve", "--port", "0", "--device", str(cuda)), stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stderr is not None
        lines, url = [], None
        while url is None and process.poll() is None:  # progress comes first
            lines.append(process.stderr.readline())
            url = re.fullmatch(r"ownpath serves \S+ at (http://\S+)\n", lines[-1])
        assert url, "".join(lines) + process.stderr.read()
        body = {"messages": [{"role": "user", "content": "The capital of France is"}], "temperature": 0}
        answer = httpx.post(f"{url[1]}/chat/completions", json=body | {"model": "tiny-v4"}, timeout=120).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        ran = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    rows = re.findall(r"ran: (\d+) modules on (\w+) \(([\w.]+)\), (\d+) calls", ran)
    assert {"HyperBoundary", "Nvfp4Linear", "Nvfp4MoE", "GroupedLinear"} <= {row[1] for row in rows}, ran
