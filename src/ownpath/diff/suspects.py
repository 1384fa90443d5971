"""Traits of a checkpoint that other engines compute wrongly: one may be why a server computes something else."""

from collections.abc import Mapping

_FUSED = (("w1", "w3"), ("wq_a", "wkv"))


def joined_scales(global_scales: Mapping[str, float]) -> tuple[str, ...]:
    """Describes the fused pairs whose halves have different global scales, one line for each kind of pair.

    global_scales: module -> multiplier. Engines that fuse a pair and keep one scale for it compute a half wrong: vLLM
    0.26 to 0.33 and SGLang keep the larger one of a fused linear.
    """
    found = []
    for first, second in _FUSED:
        pairs = [
            (scale, global_scales[name.removesuffix(first) + second])
            for name, scale in global_scales.items()
            if name.endswith("." + first) and name.removesuffix(first) + second in global_scales
        ]
        ratios = [max(a, b) / min(a, b) for a, b in pairs if a != b and min(a, b) > 0]
        if ratios:
            found.append(
                f"{first} and {second} have different global scales in {len(ratios)} of {len(pairs)} pairs, up to"
                f" {max(ratios):.3g} times: an engine that keeps one for the fused pair computes a half wrong"
            )
    return tuple(found)
