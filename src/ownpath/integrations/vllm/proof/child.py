"""Runs vLLM with taps, step by step, and leaves what it saw in a folder: ``python -m ...proof.child ASKED.json``.

A process of its own: vLLM's log, its memory and how it ends are its own too. ``run.json`` says what ran; each step has
a file of tensors for each layer.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ownpath.files import read_bytes
from ownpath.integrations.vllm.breaks import SWITCH
from ownpath.integrations.vllm.proof.steps import FIRST_LENGTH, SPARE_LENGTH, Driver, Planned, Scheduled, StepLimits

RUN = "run.json"


def main(asked_path: str) -> int:
    """Runs what the file asks for. Returns 0 if it came to its end; ``run.json`` is there in any case."""
    asked = json.loads(read_bytes(Path(asked_path)))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process schedules and steps; ranks are still their own
    os.environ.setdefault(SWITCH, "1")  # as vLLM sets it for V4, and as a process that `vllm serve` starts has it
    folder = Path(asked["out"])
    report: dict[str, Any] = {"steps": [], "refused": [], "ranks": [], "engine": {}, "error": None, "during": "start"}
    try:
        _run(asked, folder, report)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    (folder / RUN).write_text(json.dumps(report), encoding="utf-8")
    return 0 if report["error"] is None else 1


def _run(asked: Mapping[str, Any], folder: Path, report: dict[str, Any]) -> None:
    engine = TappedEngine(asked)
    report["engine"] = engine.facts()

    def keep(planned: Planned) -> None:
        taken = engine.take(planned.num_rows, f"{asked['how']}.{len(report['steps'])}")
        report["steps"].append(asdict(planned) | {"how": asked["how"], "ranks": taken})
        report["during"] = f"the step after a {planned.kind} of {planned.num_rows} rows"

    driver = Driver(engine, asked["text"], asked["answers"], keep)
    try:
        for refused in driver.run(asked["rows"], asked["kinds"]):
            report["refused"].append(refused)
    finally:
        report["ranks"] = engine.walk()


class TappedEngine:
    """vLLM's engine, in the form that ``Driver`` steps. options: vLLM's own, as of ``vllm serve``."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._folder, self._is_recorded = asked["out"], asked["how"] == "graphs"
        self._engine = _engine(asked)
        self._scheduled: Mapping[str, int] = {}
        self._watch_scheduler()

    @property
    def limits(self) -> StepLimits:
        """The most that the scheduler puts into one step."""
        config = self._engine.vllm_config
        scheduler = config.scheduler_config
        return StepLimits(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, config.model_config.max_model_len)

    def add(self, sequence: str, prompt: Sequence[int], answer: int, num_answers: int) -> None:
        """Adds a request whose answer is fixed."""
        from vllm import SamplingParams

        fixed = SamplingParams(temperature=0, max_tokens=num_answers, ignore_eos=True, allowed_token_ids=[answer])
        self._engine.add_request(sequence, {"prompt_token_ids": list(prompt)}, fixed)

    def step(self) -> Scheduled:
        """Runs one step."""
        self._engine.collective_rpc("ownpath_start_step", args=(self._is_recorded,))
        self._scheduled = {}
        outputs = self._engine.step()
        answered = [output.request_id for output in outputs if output.outputs and output.outputs[0].token_ids]
        return Scheduled(self._scheduled, answered)

    def stop(self, sequence: str) -> None:
        """Aborts a request."""
        self._engine.abort_request([sequence])

    def take(self, num_rows: int, step: str) -> list[dict[str, Any]]:
        """Has the taps' values of the last step written to files, by every rank."""
        return list(self._engine.collective_rpc("ownpath_take", args=(num_rows, self._folder, step)))

    def walk(self) -> list[dict[str, Any]]:
        """Describes the modules of every worker."""
        return list(self._engine.collective_rpc("ownpath_walk"))

    def facts(self) -> dict[str, Any]:
        """Version, dtypes and sizes, as the engine has settled them."""
        import vllm
        from vllm.platforms import current_platform

        config = self._engine.vllm_config
        mode = getattr(config.compilation_config, "cudagraph_mode", None)
        return {
            "version": vllm.__version__,
            "device": "cuda" if current_platform.is_cuda_alike() else "cpu",
            "platform": current_platform.device_name or current_platform.device_type,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "cache_dtype": str(config.cache_config.cache_dtype),
            "quantization": config.model_config.quantization,
            "graphs": getattr(mode, "name", "NONE"),
            "has_graphs": current_platform.is_cuda_alike(),
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        }

    def _watch_scheduler(self) -> None:
        """Notes how many rows of which request each step has; requests carry names of their own inside."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            scheduled = schedule(*args, **kwargs)
            rows = scheduled.num_scheduled_tokens
            self._scheduled = {name.partition("-")[0]: count for name, count in rows.items()}
            return scheduled

        scheduler.schedule = watched


def _engine(asked: Mapping[str, Any]) -> Any:
    """Starts vLLM with taps. Errors: vLLM's."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    from ownpath.integrations.vllm.proof.worker import EXTENSION, LOAD_FORMAT, TAPS_FIELD

    most = max(asked["rows"])
    defaults = [
        "--max-num-batched-tokens",
        str(max(most, 256)),
        "--max-model-len",
        str(max(most, FIRST_LENGTH) + SPARE_LENGTH),
    ]
    given = ["--model", asked["model"], *defaults, *asked["options"]]
    args = EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(given))
    args.enforce_eager = asked["how"] == "eager"
    args.load_format, args.worker_extension_cls = LOAD_FORMAT, EXTENSION
    args.enable_prefix_caching = args.async_scheduling = False
    args.disable_log_stats = True
    args.model_loader_extra_config = {TAPS_FIELD: {"layers": asked["layers"]}}
    return LLMEngine.from_engine_args(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
