"""``system_fingerprint``: the same for answers that the same software computed with the same settings."""

import dataclasses
import hashlib

from ownpath.config import EngineConfig
from ownpath.versions import versions


@dataclasses.dataclass(frozen=True)
class AnswerSource:
    """The name of the model as the client calls it, and the fingerprint of what computes."""

    model_id: str
    fingerprint: str


def system_fingerprint(config: EngineConfig) -> str:
    """Returns ownpath's version, and a digest of the engine's settings and of the versions that results depend on."""
    found = versions()
    settings = [(field.name, _spelled(getattr(config, field.name))) for field in dataclasses.fields(config)]
    digest = hashlib.sha256(repr((settings, sorted(found.items()))).encode()).hexdigest()
    return f"ownpath-{found.get('ownpath', 'source')}-{digest[:8]}"


def _spelled(value: object) -> str:
    return repr(sorted(map(str, value))) if isinstance(value, frozenset) else repr(value)
