"""The problems that a checkpoint can have, by name, with a remedy for each."""

from types import MappingProxyType

from ownpath.finding import Finding, Verdict

REMEDIES = MappingProxyType(
    {
        "folder": "give the folder that holds config.json and the *.safetensors files",
        "file": "download the file again; a model folder holds plain files, or links into its hub cache",
        "index": "download model.safetensors.index.json again, or write it anew from the shards",
        "escaping-shard": "do not use this index as it is: its shards must be plain files beside it",
        "missing-shard": "download the shard",
        "shard": "download the shard again and compare its checksum",
        "truncated-shard": "download the shard again: its end is missing",
        "over-long-shard": "download the shard again: bytes were appended to it",
        "overlapping-tensors": "do not use this shard: two tensors claim the same bytes; export or download it again",
        "header-bomb": "do not use this shard: no honest header is that large",
        "duplicated-tensor": "keep one of the two: export again, or remove the stale shard",
        "unlisted-tensor": "write the index anew from the shards, or remove the stale shard",
        "missing-tensor": "download the shard that should hold it, or export again with every expert",
        "unexpected-tensor": "take the tensor out if the model does not need it; if it does, report its name",
        "wrong-dtype": "export again, in one of the encodings that `ownpath inspect --list` prints",
        "wrong-shape": "check that config.json belongs to these shards",
        "unknown-encoding": "export again, in one of the encodings that `ownpath inspect --list` prints",
        "wide-scales": "run with `--reference MODULE`, which has torch compute that module from the scales as they are",
        "mixed-experts": "export the routed experts of a layer in one encoding",
        "no-kernel": "export again in a format that `ownpath plan` has a kernel for",
        "draft": "inspect without --draft, or take an export that carries mtp.* (DeepSeek's, ModelOpt's)",
        "config": "take config.json from the release that the shards came from",
        "config-contradiction": "take config.json from the release that the shards came from",
        "format-contradiction": "the tensors are believed; correct the file for engines that believe it instead",
        "scalar-scale": "export again with a calibration pass that reaches every expert",
        "reciprocal-scale": "store what the encoding names: a multiplier (amax / 2688) or its reciprocal",
        "out-of-band-scale": "compare with the source; nothing to do where the values are right",
        "input-scale": "calibrate again for engines that quantise activations",
        "block-scale": "export again: the bytes are damaged, or another format's",
        "zero-block-scale": "export again with a scale that does not underflow E4M3",
        "vanished-blocks": "export again with scales that do not underflow, if the values matter: here they are zero",
        "saturated-block-scale": "export again: the global scale is too small for the blocks",
        "gate-up-scale": "export again with one global scale for w1 and w3; other engines apply w1's to both",
        "expert-outlier": "compare this expert with the source: training does not set one so far from the others",
        "weight-magnitude": "compare its scales with the source: training sets no weight so far from its peers",
        "uncalibrated-expert": "calibrate with text that reaches every expert, or give it its layer's maximum",
        "router-bias": "export again: this layer lost its router bias, and chooses experts that training did not mean",
        "expert-ids": "download the shard again, or check n_routed_experts in config.json",
        "generation-config": "take generation_config.json from the release that the shards came from",
        "end-tokens": "make both files name the same tokens, for engines that read one of them",
        "token-id": "take the file from the release that the shards came from, for engines that use this field",
        "marker": "take tokenizer.json from the release: a marker of the chat format must be one token of its own",
        "round-trip": "take tokenizer.json from the release: text must survive it byte by byte",
        "prompt": "take tokenizer.json from the release; if it is that one, our encoder is wrong: report this finding",
        "tokenizer": "take tokenizer.json and tokenizer_config.json from the release that the shards came from",
    }
)
"""Check -> remedy. The names are stable: programs may match them."""

FOUND_WHEN = MappingProxyType(
    {
        "folder": "there is no checkpoint in the folder",
        "file": "a file is missing, unreadable or not a plain file",
        "index": "the index is no JSON object of names, or disagrees with the shards",
        "escaping-shard": "the index names a path, or a link that leaves the folder (other than into a hub cache)",
        "missing-shard": "the index names a shard that is not there",
        "shard": "bytes belong to no tensor, or a header entry is no tensor",
        "truncated-shard": "a shard ends before its last tensor does",
        "over-long-shard": "a shard goes on after its last tensor",
        "overlapping-tensors": "two tensors claim the same bytes",
        "header-bomb": "a header is beyond a checkpoint's limits, 64 MiB and 400,000 tensors; it is not read",
        "duplicated-tensor": "a name occurs twice, in a header, in the index or in two shards",
        "unlisted-tensor": "a shard holds a tensor that the index does not list",
        "missing-tensor": "config.json asks for a tensor, or an encoding for a part, that is not there",
        "unexpected-tensor": "nothing in this model reads a tensor",
        "wrong-dtype": "a tensor has a dtype that no encoding stores",
        "wrong-shape": "a tensor has another shape than config.json asks for",
        "unknown-encoding": "a module's tensors are those of no known encoding",
        "wide-scales": "an expert's MXFP4 scales span more powers of two than the NVFP4 scales that they become",
        "mixed-experts": "experts of one layer are stored in different encodings, or with scales of different dtypes",
        "no-kernel": "no kernel runs a module's format",
        "draft": "--draft, and there is no drafter: no mtp.* tensor, or none that config.json's fields fit",
        "config": "config.json cannot be honoured",
        "config-contradiction": "counts or layer types in config.json are not those of the tensors",
        "format-contradiction": "config.json or hf_quant_config.json claims a format that the tensors do not have, or "
        "they contradict each other",
        "scalar-scale": "a global scale is zero, negative, infinite, NaN or no normal float32",
        "reciprocal-scale": "a scale is on the wrong side of 1: a divisor (2688 / amax) for a multiplier, or reversed",
        "out-of-band-scale": "an expert's scale is a factor of 1000 from its layer's median, or an input scale is no "
        "normal float32; whether the values are wrong is told by weight-magnitude",
        "input-scale": "an input scale is zero, negative, infinite, NaN, or on the wrong side of 1",
        "block-scale": "a block scale is NaN, infinite or negative",
        "zero-block-scale": "of the block scales read all are zero, or over an eighth are over codes that are not",
        "vanished-blocks": "some block scales are zero over codes that are not",
        "saturated-block-scale": "more than an eighth of the block scales read are 448 (E8M0: any is 2^127)",
        "gate-up-scale": "w1 and w3 of an expert have different global scales",
        "expert-outlier": "verify: an expert's largest block is far from those of its layer's others",
        "weight-magnitude": "sampled rows of a weight, decoded, are far larger or smaller than the same weight's in "
        "other layers, the layer's other experts', or any model's (how far: docs/mutations.md)",
        "uncalibrated-expert": "verify: an input_scale is exactly 1, a default and no measurement",
        "router-bias": "verify: a router's bias holds NaN, or is the same for all experts where other layers' are not",
        "expert-ids": "a hash layer's table names an expert that is not there",
        "generation-config": "generation_config.json cannot be read, or its eos_token_id is no id or list of ids",
        "end-tokens": "config.json and generation_config.json name different end tokens",
        "token-id": "a file names other ids or texts than those that are used, or ids that are no token",
        "marker": "verify: a marker of the chat format is not one token",
        "round-trip": "verify: a text does not come back from its tokens",
        "prompt": "verify: a golden prompt is not encoded as the format says",
        "tokenizer": "the tokenizer is missing, unreadable, has ids beyond the embedding, or an EOS that ends nothing",
    }
)
"""Check -> the condition that reports it. ``ownpath inspect --list`` prints it with the remedy."""


WARNINGS = MappingProxyType(
    {
        "format-contradiction": "the tensors decide here; vLLM, SGLang and TensorRT-LLM go by the files",
        "gate-up-scale": "each has its own here; vLLM, and SGLang with CUTLASS or Marlin, apply w1's to both",
        "out-of-band-scale": "it is used as it is; weight-magnitude tells whether the values are wrong",
        "input-scale": "no kernel with 16-bit activations reads it; those that quantise activations (ours for sm_100, "
        "vLLM's and SGLang's on Blackwell) do",
        "uncalibrated-expert": "no kernel with 16-bit activations reads it; those that quantise activations (ours for "
        "sm_100, vLLM's and SGLang's on Blackwell) do",
        "vanished-blocks": "every engine reads them as zero, which the export made of them",
        "end-tokens": "both files count here; engines that read one of them go on where others stop",
        "token-id": "not used here; transformers, vLLM and SGLang may use it",
    }
)
"""Check -> why it is a warning and no failure, and who fails on it. Answers here are right all the same."""


def make_problem(kind: str, where: str, message: str) -> Finding:
    """Returns a problem with its remedy: a warning if ``kind`` is one of ``WARNINGS``, otherwise a failure.

    kind: a key of ``REMEDIES``. where: the tensor, file or field.
    """
    if kind in WARNINGS:
        return Finding(kind, where, Verdict.WARN, f"{message}; {WARNINGS[kind]}", remedy=REMEDIES[kind])
    return Finding(kind, where, Verdict.FAIL, message, remedy=REMEDIES[kind])
