"""Evaluation harnesses against a real server, each by its own command line. One that is not installed is skipped."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients

LIMIT_S = 600
CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid"}

LM_EVAL_TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
LM_EVAL = {
    "capitals_generate": """
output_type: generate_until
doc_to_text: "The capital of {{country}} is"
doc_to_target: " {{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "capitals_choice": """
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "capitals_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The capital of {{country}} is {{choices[gold]}}."
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}
INSPECT = '''
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool


@tool
def get_weather():
    async def execute(city: str) -> str:
        """Get the weather in a city.

        Args:
            city: The city.
        """
        return "18 degrees"

    return execute


@task
def capitals():
    sample = Sample(input="What is the capital of France?", target="Paris")
    return Task(dataset=[sample], solver=generate(), scorer=includes())


@task
def weather():
    sample = Sample(input="What is the weather in Rome?", target="degrees")
    return Task(dataset=[sample], solver=[use_tools(get_weather()), generate()], scorer=includes())
'''


def run_tool(package: str, *command: str, cwd: Path, limit_s: float = LIMIT_S, **environment: str) -> str:
    """Runs a program of this environment; returns what it printed. Skips where its package is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = str(Path(sys.executable).with_name(command[0]))
    unset = {"OPENAI_API_KEY", "OPENAI_BASE_URL", "PYTHONPATH"}
    own = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [program, *command[1:]], cwd=cwd, env=own | environment, capture_output=True, text=True, timeout=limit_s
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def write_tasks(folder: Path) -> None:
    """Writes lm-eval's tasks and their data: nothing is downloaded."""
    others = list(CAPITALS.values())
    rows = [{"country": country, "choices": others, "gold": gold} for gold, country in enumerate(CAPITALS)]
    data = folder / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in LM_EVAL.items():
        text = f"task: {name}{LM_EVAL_TASK.format(data=data)}{task.strip()}\n"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("batch", ["1", "4"])
def test_lm_eval_generates_and_scores_at_its_defaults(served: Any, tmp_path: Path, batch: str) -> None:
    """The client finds the server's tokenizer by itself (/tokenizer_info), and scores token ids with ``echo``."""
    write_tasks(tmp_path)
    arguments = f"model=tiny-v4,base_url={served.url}/completions"
    run_tool(
        "lm_eval",
        *("lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--batch_size", batch),
        *("--tasks", *LM_EVAL, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "found")),
        cwd=tmp_path,
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    (path,) = (tmp_path / "found").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["capitals_generate"]["exact_match,none"] == 1
    assert results["capitals_choice"]["acc,none"] == 1
    assert 1 < results["capitals_perplexity"]["word_perplexity,none"] < 2560, "better than to guess each token"


@pytest.mark.parametrize("provider", ["openai-api/ownpath", "vllm"])
def test_inspect_ai_evaluates_with_tools_at_its_defaults(served: Any, tmp_path: Path, provider: str) -> None:
    """Its tools are strict unless told otherwise."""
    (tmp_path / "tasks.py").write_text(INSPECT, encoding="utf-8")
    where = {"VLLM_BASE_URL": served.url, "OWNPATH_BASE_URL": served.url, "OWNPATH_API_KEY": "x"}
    options = ("--temperature", "0", "--display", "plain", "--log-format", "json", "--log-dir", str(tmp_path / "logs"))
    run_tool(
        "inspect_ai", "inspect", "eval", "tasks.py", "--model", f"{provider}/tiny-v4", *options, cwd=tmp_path, **where
    )
    logs = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "logs").glob("*.json")]
    assert {log["eval"]["task"]: log["status"] for log in logs} == {"capitals": "success", "weather": "success"}
    accuracies = [score["metrics"]["accuracy"]["value"] for log in logs for score in log["results"]["scores"]]
    assert accuracies == [1, 1]
