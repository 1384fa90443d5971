"""Starts vLLM on folders, and writes what was answered and what ran: ``ask.py FOLDER... OPTIONS OUT``.

OPTIONS: JSON of {"engine": arguments of ``vllm.LLM``, "prompts": token ids, or of each folder, "texts": token ids,
"num_tokens": of an answer}. OUT gets JSON of a list of ``Answers``, as ``conftest.py`` reads it.
"""

import json
import sys
from pathlib import Path
from typing import Any


def look(model: Any) -> dict[str, Any]:
    """Collects what a rank has of ours: calls a slot, shapes there, and every parameter of a layer of ours."""
    from ownpath.integrations.vllm.model import intake_of

    intake = intake_of(model)
    if intake is None:
        return {"calls": {}, "kernels": {}, "parameters": [], "shares": {}, "counts": {}, "methods": []}
    modules = list(model.named_modules())
    ours = [(name, one) for name, one in modules if hasattr(getattr(one, "quant_method", None), "weights")]
    return {
        "calls": dict(intake.taken.ledger.calls),
        "kernels": {slot: use.kernel for slot, use in intake.taken.ledger.uses.items()},
        "parameters": [f"{name}.{key}" for name, one in ours for key, _ in one.named_parameters()],
        "shares": {slot: list(entered.shape) for slot, entered in intake.entered.items()},
        "counts": dict(intake.taken.counts),
        "methods": sorted({type(getattr(one, "quant_method", None)).__name__ for _, one in modules}),
    }


def ask(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Asks one engine, and ends it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {"max_model_len": 512, "max_num_seqs": 2, "max_num_batched_tokens": 512, "enforce_eager": True}
    llm = LLM(model=folder, kv_cache_dtype="fp8", max_logprobs=-1, **small | options.get("engine", {}))
    asked = options["prompts"]
    prompts = [{"prompt_token_ids": ids} for ids in (asked[folder] if isinstance(asked, dict) else asked)]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=options.get("num_tokens", 4)))
    found: dict[str, Any] = {"ids": [list(one.outputs[0].token_ids) for one in answers]}
    found["texts"] = [one.outputs[0].text for one in answers]
    scored = [{"prompt_token_ids": ids} for ids in options.get("texts", [])]
    reads = llm.generate(scored, SamplingParams(max_tokens=1, prompt_logprobs=0)) if scored else []
    found["logprobs"] = [
        [at[token].logprob for at, token in zip(read.prompt_logprobs[1:], ids["prompt_token_ids"][1:], strict=True)]
        for read, ids in zip(reads, scored, strict=True)
    ]
    found["ranks"] = llm.apply_model(look)
    del llm
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    *folders, asked, out = sys.argv[1:]
    Path(out).write_text(json.dumps([ask(folder, json.loads(asked)) for folder in folders]))
