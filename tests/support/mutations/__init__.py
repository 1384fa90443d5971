"""Every corruption that `ownpath verify` is held against, by name."""

from support.mutations import files
from support.mutations.mutation import Mutation

MUTATIONS: dict[str, Mutation] = {**files.MUTATIONS}
