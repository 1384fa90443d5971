"""Every corruption that `ownpath verify` is held against, by name."""

from support.mutations import exports, files, layers, loading, outputs
from support.mutations.mutation import Mutation

MUTATIONS: dict[str, Mutation] = {
    **files.MUTATIONS,
    **exports.MUTATIONS,
    **loading.MUTATIONS,
    **layers.MUTATIONS,
    **outputs.MUTATIONS,
}
