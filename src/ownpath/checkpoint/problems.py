"""What can be wrong with a checkpoint, by name, and what to do about each."""

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
        "unexpected-tensor": "check that config.json belongs to these shards; another export's tensors are not read",
        "wrong-dtype": "export again, in one of the encodings that docs/checkpoint.md lists",
        "wrong-shape": "check that config.json belongs to these shards",
        "mixed-experts": "export the routed experts of a layer in one encoding",
        "no-kernel": "export again in a format that `ownpath plan` has a kernel for",
        "draft": "inspect without --draft, or take an export that carries mtp.* (DeepSeek's, ModelOpt's)",
        "config": "take config.json from the release that the shards came from",
        "config-contradiction": "take config.json from the release that the shards came from",
        "format-contradiction": "the tensors are believed; correct the file for engines that believe it instead",
        "scalar-scale": "export again with a calibration pass that reaches every expert",
        "reciprocal-scale": "store what the encoding names: a multiplier (amax / 2688) or its reciprocal",
        "out-of-band-scale": "compare with the source: training does not set one scale so far from the others",
        "block-scale": "export again: the bytes are damaged, or another format's",
        "zero-block-scale": "export again with a scale that does not underflow E4M3",
        "saturated-block-scale": "export again: the global scale is too small for the blocks",
        "gate-up-scale": "export again with one global scale for w1 and w3; other engines apply w1's to both",
        "expert-outlier": "compare this expert with the source: training does not set one so far from the others",
        "uncalibrated-expert": "calibrate with text that reaches every expert, or give it its layer's maximum; "
        "harmless where only weights are NVFP4",
        "router-bias": "export again: this layer lost its router bias, and chooses experts that training did not mean",
        "expert-ids": "download the shard again, or check n_routed_experts in config.json",
        "generation-config": "take generation_config.json from the release that the shards came from",
        "marker": "take tokenizer.json from the release: a marker of the chat format must be one token of its own",
        "round-trip": "take tokenizer.json from the release: text must survive it byte by byte",
        "prompt": "take tokenizer.json from the release; if it is that one, our encoder is wrong: report this finding",
        "tokenizer": "take tokenizer.json and tokenizer_config.json from the release that the shards came from",
    }
)
"""check -> what to do. The names are stable: programs may match them."""


def make_problem(kind: str, where: str, message: str) -> Finding:
    """One thing that is wrong, with its remedy. kind: a key of ``REMEDIES``. where: the tensor, file or field."""
    return Finding(kind, where, Verdict.FAIL, message, remedy=REMEDIES[kind])
