"""The model's and the engine's configuration: frozen, parsed once from ``config.json``, never mutated."""

import reprlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import MappingProxyType

import torch

from ownpath.dspark import DSPARK_FIELDS, NO_DSPARK, DSparkShape, read_dspark
from ownpath.files import FileError, MissingFileError, read_json_object, shorten
from ownpath.formats import CacheFormat
from ownpath.official import PLAIN, Step
from ownpath.other_models import describe_model
from ownpath.splits import AttentionSplit, ExpertSplit

SLIDING, CSA_RATIO, HCA_RATIO = 0, 4, 128
_LAYER_TYPES = {
    "sliding_attention": SLIDING,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_REQUIRED: dict[str, tuple[object, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
}
"""Field -> values that the forward computes. A field that is present must have one of them; an absent one is fine."""
_ARCHITECTURE, _MODEL_TYPE = "DeepseekV4ForCausalLM", "deepseek_v4"


class ConfigError(ValueError):
    """Raised for a configuration that this code cannot run; the message names the file and the field."""


@dataclass(frozen=True)
class Yarn:
    """YaRN interpolation of the compressed layers' rotary frequencies (no mscale: DeepSeek-V4 applies none)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Layer:
    """A decoder layer's name and kind.

    name: what its tensors' names begin with, ``layers.3`` or ``mtp.0``. ratio: as in ``compress_ratios``.
    is_hash: whether its experts are looked up by token id.
    """

    name: str
    ratio: int
    is_hash: bool


@dataclass(frozen=True)
class ModelConfig:
    """DeepSeek-V4's shape and constants, under the names of the published ``config.json``.

    compress_ratios: one entry per backbone layer: 0 sliding window only, 4 CSA, 128 HCA.
    num_hash_layers: the first layers whose experts are looked up by token id.
    eos_token_id: every token that ends an answer, from an integer or a list.
    num_nextn_predict_layers: MTP draft modules behind the backbone, or 0. dspark: the other drafter's shape.
    claims: every field as written. What it states about formats decides nothing; the plan compares it with the tensors.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    num_hash_layers: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: tuple[int, ...]
    num_nextn_predict_layers: int = 0
    dspark: DSparkShape = NO_DSPARK
    claims: Mapping[str, object] = dataclass_field(default_factory=dict, compare=False, repr=False)

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5)

    def is_hash_layer(self, layer_idx: int) -> bool:
        return layer_idx < self.num_hash_layers

    def backbone_layers(self) -> Iterator[Layer]:
        """Yields the decoder layers, in order."""
        for layer_idx, ratio in enumerate(self.compress_ratios):
            yield Layer(f"layers.{layer_idx}", ratio, self.is_hash_layer(layer_idx))

    def draft_layers(self) -> Iterator[Layer]:
        """Yields the drafts' decoder layers, in order: without compression, with experts chosen by a gate."""
        for draft_idx in range(self.dspark.num_stages or self.num_nextn_predict_layers):
            yield Layer(f"mtp.{draft_idx}", SLIDING, is_hash=False)

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Reads ``config.json``. Errors: ConfigError naming the file and the field."""
        try:
            fields = read_json_object(path)
        except MissingFileError as error:
            raise ConfigError(f"{error}; a model folder needs a config.json") from None
        except FileError as error:
            raise ConfigError(str(error)) from None
        return cls.from_dict(fields, source=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, object], source: str = "config") -> "ModelConfig":
        """Parses the published field names, or transformers'. Errors: ConfigError naming ``source`` and the field."""
        _refuse_other_architectures(fields, source)
        fields = _published_fields(fields, source)
        read = _Reader(fields, source)
        num_layers = read.integer("num_hidden_layers")
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=read.integer("num_attention_heads"),
            head_dim=read.integer("head_dim"),
            qk_rope_head_dim=read.integer("qk_rope_head_dim"),
            q_lora_rank=read.integer("q_lora_rank"),
            o_groups=read.integer("o_groups"),
            o_lora_rank=read.integer("o_lora_rank"),
            n_routed_experts=read.integer("n_routed_experts"),
            n_shared_experts=read.integer("n_shared_experts"),
            num_experts_per_tok=read.integer("num_experts_per_tok"),
            moe_intermediate_size=read.integer("moe_intermediate_size"),
            routed_scaling_factor=read.number("routed_scaling_factor"),
            swiglu_limit=read.number("swiglu_limit"),
            num_hash_layers=read.integer("num_hash_layers", minimum=0),
            hc_mult=read.integer("hc_mult"),
            hc_sinkhorn_iters=read.integer("hc_sinkhorn_iters"),
            hc_eps=read.number("hc_eps"),
            rms_norm_eps=read.number("rms_norm_eps"),
            sliding_window=read.integer("sliding_window"),
            compress_ratios=read.compress_ratios(num_layers),
            index_n_heads=read.integer("index_n_heads"),
            index_head_dim=read.integer("index_head_dim"),
            index_topk=read.integer("index_topk"),
            rope_theta=read.number("rope_theta"),
            compress_rope_theta=read.number("compress_rope_theta"),
            yarn=read.yarn(),
            max_position_embeddings=read.integer("max_position_embeddings"),
            bos_token_id=read.integer("bos_token_id", minimum=0),
            eos_token_id=read.token_ids("eos_token_id"),
            num_nextn_predict_layers=read.count("num_nextn_predict_layers"),
            dspark=read_dspark(fields, num_layers),
            claims=MappingProxyType(fields),
        )
        _check_semantics(config, fields, source)
        return config


@dataclass(frozen=True)
class Parallel:
    """This process's rank among the ``size`` processes that run one model, each on its own GPU, and what they divide.

    is_even: by data, every rank has as many rows in each step, so that kernels of fixed sizes may exchange them.
    Errors: ConfigError for a rank outside 0 to size - 1, or another division.
    """

    rank: int = 0
    size: int = 1
    attention: AttentionSplit = AttentionSplit.HEADS
    experts: ExpertSplit = ExpertSplit.WIDTH
    is_even: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} of {self.size}: ranks count from 0 to size - 1")
        for name, split in (("attention", AttentionSplit), ("experts", ExpertSplit)):
            if getattr(self, name) not in list(split):
                raise ConfigError(f"{name} is {shorten(getattr(self, name))}, which is none of {', '.join(split)}")
            object.__setattr__(self, name, split(getattr(self, name)))

    def share(self, count: int) -> range:
        """Returns which of ``count`` equal things are this rank's; they divide into ranks."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


ONE_RANK = Parallel()


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings: device, activation dtype, limits and numerics.

    device: a torch device name.
    dtype: of activations, and of caches in BF16. Sums, norms, softmax and router scores are at least float32 anyway.
    max_model_len: tokens (prompt + answer) that one sequence may reach; caches are allocated for it once.
    max_num_seqs: sequences that run together; by data, on each rank.
    max_prefill_tokens: prompt tokens that one step may read, over all sequences; by data, on each rank. On a GPU 2,048.
    is_batch_invariant: ask for kernels whose result for a row does not depend on the other rows of the step.
    official: steps to be computed as DeepSeek's published code does; all others are plain.
    loads_draft: load the MTP modules too, for an engine that drafts, or callers of the model that do.
    reference: names of slots or modules that torch computes from the stored form, whatever kernels there are.
    cache_format: the format of keys in the caches.
    rows_per_request: the most rows that a request may have in a decode step, up to 9: rings of the caches are made for
        it. An engine that drafts has two rows of each; callers of the model may bring more.
    graphs: capture decode steps as CUDA graphs, and steps that read prompts in sizes of their own; without, they run
        eagerly, decode steps with the same bits.
    parallel: this process's rank among those that run one model together.
    num_cache_blocks: blocks of 256 tokens that all sequences share, by data those of a rank; ``None``: as many as
        ``max_num_seqs`` sequences of ``max_model_len`` tokens fill.
    draws_weights: make all weights at random, in memory, to measure what a model of this shape costs: no shard is read.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_model_len: int = 4096
    max_num_seqs: int = 16
    max_prefill_tokens: int = 512
    is_batch_invariant: bool = False
    official: frozenset[Step] = PLAIN
    loads_draft: bool = False
    parallel: Parallel = ONE_RANK
    reference: frozenset[str] = frozenset()
    graphs: bool = True
    cache_format: CacheFormat = CacheFormat.BF16
    rows_per_request: int = 1
    num_cache_blocks: int | None = None
    draws_weights: bool = False

    @classmethod
    def for_device(cls, device: str, max_model_len: int = 4096) -> "EngineConfig":
        """Returns defaults: float32 on a CPU, whose bf16 products are slow, bfloat16 and longer steps on CUDA."""
        if torch.device(device).type == "cpu":
            return cls(device, torch.float32, max_model_len)
        return cls(device, torch.bfloat16, max_model_len, max_prefill_tokens=2048)


def unread_fields(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the names of config.json fields that this code does not read as settings of the model, in file order."""
    own = {field.name for field in dataclass_fields(ModelConfig)} - {"yarn", "claims"}
    spelled = {"rope_scaling", "layer_types", "mlp_layer_types", "rope_parameters", "architectures", "model_type"}
    return tuple(name for name in fields if name not in own | spelled | set(_REQUIRED) | DSPARK_FIELDS)


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """Returns a token id, or a list of them, as a tuple, each once. Errors: ConfigError naming ``where``."""
    listed = value if isinstance(value, list) else [value]
    found = [item for item in listed if type(item) is int and abs(item) < 2**31]
    if not found or len(found) < len(listed):
        raise ConfigError(f"{where} must be a token id or a list of token ids, found {reprlib.repr(value)}")
    return tuple(dict.fromkeys(found))


def _refuse_other_architectures(fields: dict[str, object], source: str) -> None:
    listed = fields.get("architectures")
    architectures = listed if isinstance(listed, list) else []
    model_type = fields.get("model_type")
    if model_type == _MODEL_TYPE or (model_type is None and _ARCHITECTURE in architectures):
        return
    found = f"model_type {shorten(model_type)}, architectures {shorten(architectures)}"
    what = describe_model(model_type, architectures)
    raise ConfigError(f"{source}: {found}: ownpath runs {_ARCHITECTURE} only. {what}.")


def _published_fields(fields: dict[str, object], source: str) -> dict[str, object]:
    """Adds absent published fields, derived from the ones that transformers' ``save_pretrained`` writes."""
    published = dict(fields)
    if "layer_types" in fields and "compress_ratios" not in fields:
        layer_types = _listed(fields, "layer_types", source)
        published["compress_ratios"] = [_LAYER_TYPES.get(kind, kind) for kind in layer_types]
    if "mlp_layer_types" in fields and "num_hash_layers" not in fields:
        kinds = _listed(fields, "mlp_layer_types", source)
        published["num_hash_layers"] = kinds.count("hash_moe")
        if "hash_moe" in kinds[kinds.count("hash_moe") :]:
            raise ConfigError(f"{source}: mlp_layer_types has a hash_moe layer after another kind")
    if "rope_parameters" in fields and "rope_scaling" not in fields:
        ropes = fields["rope_parameters"]
        compress = ropes.get("compress") if isinstance(ropes, dict) else None
        if not isinstance(compress, dict):
            raise ConfigError(f"{source}: rope_parameters must have an object 'compress', found {shorten(ropes)}")
        published["rope_scaling"] = None if compress.get("rope_type") == "default" else compress
    return published


def _listed(fields: dict[str, object], field: str, source: str) -> list[str]:
    value = fields[field]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{source}: {field} must be a list of names, found {shorten(value)}")
    return value


def _check_semantics(config: ModelConfig, fields: dict[str, object], source: str) -> None:
    """Refuses values that would make the forward mean something else than this code computes."""
    for field, allowed in _REQUIRED.items():
        if field in fields and fields[field] not in allowed:
            raise ConfigError(f"{source}: {field} is {shorten(fields[field])}; DeepSeek-V4 defines {allowed[0]!r}")
    checks = (
        ("o_groups", config.num_attention_heads % config.o_groups == 0, "must divide num_attention_heads"),
        ("qk_rope_head_dim", config.qk_rope_head_dim % 2 == 0, "must be even"),
        ("qk_rope_head_dim", config.qk_rope_head_dim <= config.head_dim, "must not exceed head_dim"),
        ("qk_rope_head_dim", config.qk_rope_head_dim <= config.index_head_dim, "must not exceed index_head_dim"),
        (
            "num_experts_per_tok",
            config.num_experts_per_tok <= config.n_routed_experts,
            "exceeds n_routed_experts",
        ),
        ("num_hash_layers", config.num_hash_layers <= config.num_hidden_layers, "exceeds num_hidden_layers"),
        ("bos_token_id", config.bos_token_id < config.vocab_size, "is outside the vocabulary"),
        ("eos_token_id", max(config.eos_token_id) < config.vocab_size, "is outside the vocabulary"),
        ("n_shared_experts", config.n_shared_experts == 1, "must be 1"),
    )
    for field, holds, problem in checks:
        if not holds:
            value = getattr(config, field)
            shown = max(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{source}: {field} = {shown} {problem}")


class _Reader:
    """Typed access to the fields of one config, with errors that name them."""

    def __init__(self, fields: dict[str, object], source: str) -> None:
        self.fields, self.source = fields, source

    def _get(self, field: str) -> object:
        if field not in self.fields:
            raise ConfigError(f"{self.source}: field {field!r} is missing")
        return self.fields[field]

    def token_ids(self, field: str) -> tuple[int, ...]:
        found = token_ids(self._get(field), f"{self.source}: {field}")
        if min(found) < 0:
            raise ConfigError(f"{self.source}: {field} must be at least 0, found {min(found)}")
        return found

    def integer(self, field: str, minimum: int = 1) -> int:
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
            raise ConfigError(f"{self.source}: {field} must be an integer >= {minimum}, found {shorten(value)}")
        return value

    def count(self, field: str) -> int:
        """Reads a count; 0 where the field is absent or null."""
        return 0 if self.fields.get(field) is None else self.integer(field, minimum=0)

    def number(self, field: str) -> float:
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self.source}: {field} must be a positive finite number, found {shorten(value)}")
        return float(value)

    def compress_ratios(self, num_layers: int) -> tuple[int, ...]:
        """Reads the backbone's entries and drops those behind them, which belong to MTP or DSpark drafts."""
        ratios = self._get("compress_ratios")
        if not isinstance(ratios, list) or len(ratios) < num_layers:
            raise ConfigError(f"{self.source}: compress_ratios must list at least {num_layers} entries")
        for layer_idx, ratio in enumerate(ratios[:num_layers]):
            if type(ratio) is not int or ratio not in (SLIDING, CSA_RATIO, HCA_RATIO):
                raise ConfigError(f"{self.source}: compress_ratios[{layer_idx}] is {shorten(ratio)}; known: 0, 4, 128")
        return tuple(ratios[:num_layers])

    def yarn(self) -> Yarn | None:
        scaling = self.fields.get("rope_scaling")
        if scaling is None:
            return None
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
        if not isinstance(scaling, dict) or kind != "yarn":
            raise ConfigError(f"{self.source}: rope_scaling must be null or of type 'yarn', found {shorten(scaling)}")
        read = _Reader(scaling, f"{self.source}: rope_scaling")
        original = read.integer("original_max_position_embeddings")
        return Yarn(read.number("factor"), read.number("beta_fast"), read.number("beta_slow"), original)
