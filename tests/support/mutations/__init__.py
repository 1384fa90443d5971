"""Every corruption that `ownpath verify` is held against, by name."""

from types import MappingProxyType

from support.mutations import decode, drafts, exports, files, layers, loading, outputs, plans, scales, told
from support.mutations.mutation import Mutation

GROUPS: MappingProxyType[str, dict[str, Mutation]] = MappingProxyType(
    {
        "Files": files.MUTATIONS,
        "Scales that are valid and wrong": scales.MUTATIONS,
        "Files that are valid and wrong, beside another export": exports.MUTATIONS,
        "What loading makes of them": loading.MUTATIONS,
        "Loaded layers": layers.MUTATIONS,
        "Decode steps": decode.MUTATIONS,
        "Drafts": drafts.MUTATIONS,
        "Kernels and their memory": outputs.MUTATIONS,
        "Plans and official numerics": plans.MUTATIONS,
        "Told as a warning, and not failed": told.MUTATIONS,
    }
)
"""Heading -> name -> mutation."""
MUTATIONS: dict[str, Mutation] = {name: mutation for group in GROUPS.values() for name, mutation in group.items()}
