"""Compares config.json, hf_quant_config.json and the tokenizer with the tensors."""

import re
from collections.abc import Generator, Iterator
from pathlib import Path

from ownpath.chat.markers import BOS, EOS
from ownpath.chat.tokenizer import Tokenizer, TokenizerError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.needless import needless_reason
from ownpath.checkpoint.problems import make_problem
from ownpath.config import CSA_RATIO, ConfigError, ModelConfig
from ownpath.end_tokens import FIELD, GENERATION_CONFIG, read_end_tokens
from ownpath.files import FileError, is_present, read_json_object
from ownpath.finding import Finding
from ownpath.plan.census import StoredModule
from ownpath.plan.claims import differing_sections, section_contradictions
from ownpath.plan.plan import claimed_formats
from ownpath.plan.sections import QuantSection

QUANT_CONFIG = "hf_quant_config.json"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.")


def config_problems(config: ModelConfig, index: CheckpointIndex) -> Iterator[Finding]:
    """Compares counts and layer types of config.json with those that the tensors' names show."""
    layers: dict[int, set[str]] = {}
    experts: set[int] = set()
    for name in index.tensors:
        match = _LAYER.match(name)
        if match is not None and len(match[1]) < 10:
            layers.setdefault(int(match[1]), set()).add(match[2])
            expert = _EXPERT.match(match[2])
            if expert is not None and len(expert[1]) < 10:
                experts.add(int(expert[1]))
    num_layers, num_experts = max(layers, default=-1) + 1, max(experts, default=-1) + 1
    if layers and num_layers != config.num_hidden_layers:
        yield _contradiction("num_hidden_layers", config.num_hidden_layers, f"layers 0..{num_layers - 1}")
    if experts and num_experts != config.n_routed_experts:
        yield _contradiction("n_routed_experts", config.n_routed_experts, f"experts 0..{num_experts - 1}")
    for layer_idx in sorted(layers.keys() & set(range(config.num_hidden_layers))):
        yield from _layer_problems(config, layer_idx, layers[layer_idx])


def _layer_problems(config: ModelConfig, layer_idx: int, names: set[str]) -> Iterator[Finding]:
    is_hash, ratio = config.is_hash_layer(layer_idx), config.compress_ratios[layer_idx]
    if ("ffn.gate.tid2eid" in names) != is_hash and ("ffn.gate.bias" in names) == is_hash:
        kind = "a router bias" if is_hash else "a table of expert ids"
        yield _contradiction("num_hash_layers", config.num_hash_layers, f"{kind} in layer {layer_idx}")
    for part, is_there in (("compressor", ratio != 0), ("indexer", ratio == CSA_RATIO)):
        found = any(name.startswith(f"attn.{part}.") and not needless_reason(name) for name in names)
        if found != is_there:
            yield _contradiction(f"compress_ratios[{layer_idx}]", ratio, f"{'a' if found else 'no'} {part} there")


def _contradiction(field: str, value: int, found: str) -> Finding:
    return make_problem("config-contradiction", field, f"config.json: {field} is {value}, but the tensors have {found}")


def format_problems(folder: Path, config: ModelConfig, modules: tuple[StoredModule, ...]) -> Iterator[Finding]:
    """Yields what hf_quant_config.json (where there is one) says that neither the tensors nor config.json bear out."""
    content = yield from json_object(folder / QUANT_CONFIG, "format-contradiction")
    declared = content.get("quantization")
    if not isinstance(declared, dict):
        return
    theirs = QuantSection(f"{QUANT_CONFIG}: quantization.", declared)
    lines = [
        *section_contradictions(theirs, ((stored.spec, stored.encoding) for stored in modules)),
        *differing_sections(claimed_formats(config), theirs, (stored.spec.name for stored in modules)),
    ]
    yield from (make_problem("format-contradiction", QUANT_CONFIG, line) for line in lines)


def json_object(path: Path, check: str) -> Generator[Finding, None, dict[str, object]]:
    """Yields what is wrong with the file, as ``check``; returns its object, empty where there is none to read."""
    if is_present(path):
        try:
            return read_json_object(path)
        except FileError as error:
            yield make_problem(check, path.name, str(error))
    return {}


def tokenizer_problems(folder: Path, config: ModelConfig) -> Iterator[Finding]:
    """Compares the tokenizer with the embedding's rows and config.json's ids."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
        bos_id = tokenizer.special_id(BOS)
    except TokenizerError as error:
        yield make_problem("tokenizer", "tokenizer.json", str(error))
        return
    path = folder / "tokenizer.json"
    if tokenizer.num_tokens > config.vocab_size:
        ids = f"its ids reach {tokenizer.num_tokens - 1}, the embedding has {config.vocab_size} rows"
        yield make_problem("tokenizer", "vocab_size", f"{path}: {ids}")
    if config.bos_token_id != bos_id:
        said = f"config.json: bos_token_id is {config.bos_token_id}, the chat format's {BOS!r} is {bos_id}"
        yield make_problem("token-id", "bos_token_id", said)
    yield from _end_problems(folder, config, tokenizer)


def _end_problems(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Compares the files' end tokens with each other, the vocabulary and the chat format."""
    try:
        end = read_end_tokens(folder, config)
    except ConfigError as error:
        yield make_problem("generation-config", GENERATION_CONFIG, str(error))
        return
    named = ", ".join(f"{token_id} ({' and '.join(files)})" for token_id, files in end.sources.items())
    if tokenizer.eos_id not in end.ids:
        message = f"{folder / 'tokenizer.json'}: answers end with {EOS!r}, {tokenizer.eos_id}; eos_token_id is {named}"
        yield make_problem("tokenizer", FIELD, message)
    for token_id in (*end.unusable, *(one for one in end.ids if one >= tokenizer.num_tokens)):
        message = f"{FIELD} has {token_id}, which is no token of this model"
        yield make_problem("token-id", FIELD, f"{GENERATION_CONFIG} or config.json: {message}")
    from_generation = {token_id for token_id, files in end.sources.items() if GENERATION_CONFIG in files}
    if from_generation and from_generation != set(config.eos_token_id):
        message = f"{FIELD} differs: answers end at any of {named}"
        yield make_problem("end-tokens", FIELD, f"config.json and {GENERATION_CONFIG}: {message}")
