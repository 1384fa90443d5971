"""Compares the magnitude of each weight with its peers': experts of its layer, the same weight of other layers, and
other kinds of weights. A wrong scale anywhere makes one of them odd.

All comparisons are between logarithms. A value is odd if it is further from the median of its peers than a factor that
training does not reach, and than the peers' own spread explains. Few peers do not tell their spread, so that it is
pooled over all groups. Where a model has one instance of a matrix, such as the head, its gain (RMS times sqrt(K), about
1 in trained and in random models) is compared with that of other kinds of matrices.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding
from ownpath.inspect.experts import MAD_TO_SIGMA, outlier_limit
from ownpath.inspect.magnitudes import Magnitude

MATRIX_FACTOR = 6.0
"""Factor that no sound matrix is from the median of its peers."""
PAIR_FACTOR = 8.0
"""The same between two matrices that have no other peer."""
LARGEST_FACTOR = 24.0
"""The same for the largest of the sampled values: a few outliers are sound."""
KIND_FACTOR = 24.0
"""The same in gain, between a kind of matrix and the median kind."""
NORM_FACTOR = 20.0
"""The same for a norm's weights, which the matrix behind them can make up for."""
NORM_KIND_FACTOR = 100.0
"""The same between a kind of norm and the median kind."""
HYPER_FACTOR = 50.0
"""The same for the matrices of hyper-connections, which begin near zero."""
LOOSE_FACTOR = 300.0
"""The same for other parameters, upwards alone: biases and sinks may be about zero in one layer."""
MAX_FACTOR = 300.0
"""However much a kind of parameter varies from layer to layer, this is too far."""
MAX_MATRIX_FACTOR = 16.0
"""The same for matrices: 5.5 standard deviations, if they spread by a factor of 1.65 from layer to layer."""
MAX_EMBEDDING = 30.0
"""Largest sound RMS of the embedding: layers add values of about 1 to it."""
EMBEDDING = "embed.weight"

_PRIOR = 8
"""Weight of the pooled spread against a group's own, in members."""
_LEAST_POOLED = 30
"""Members that the pooled spread counts as told by, where there are fewer."""
_LEAST = 1e-300
"""Stands for zero, which has no logarithm."""
_MEASURES = ("RMS", "largest")
_EXPERT = re.compile(r"((?:layers|mtp)\.\d+\.ffn\.experts)\.\d+\.(w[123])")
_LAYER = re.compile(r"(layers|mtp)\.\d+\.(.+)")


@dataclass(frozen=True)
class MagnitudeReport:
    """The outcome of comparing ``num_tensors`` by ``num_values`` sampled values.

    farthest: the largest factor between the RMS of a matrix and the median of its peers, either way.
    """

    num_tensors: int
    num_values: int
    farthest: float
    problems: tuple[Finding, ...]


@dataclass(frozen=True)
class _Member:
    """The compared values of one tensor, or of a group of them. logs: of the RMS, and of the largest magnitude."""

    name: str
    logs: tuple[float, ...]
    gain: float


@dataclass(frozen=True)
class _Rule:
    """factors: how far each of a member's logs may be from its peers'. peers: those in words.

    most: how far it may be however wide the spread. is_upward: a member that is smaller is never odd. is_smooth: nor is
    one that is near the layers around it.
    """

    factors: tuple[float, ...]
    peers: str
    most: float = MAX_FACTOR
    is_upward: bool = False
    is_smooth: bool = False


@dataclass(frozen=True)
class _PeerDistance:
    """The distance of one member from its peers, and the largest that it may be; both are logarithms."""

    member: _Member
    measure: str
    value: float
    limit: float
    rule: _Rule

    @property
    def is_odd(self) -> bool:
        return self.value > self.limit or (self.value < -self.limit and not self.rule.is_upward)


_Groups = Mapping[str, Sequence[_Member]]

_EXPERTS = _Rule((MATRIX_FACTOR, LARGEST_FACTOR), "the experts of its layer", MAX_MATRIX_FACTOR)
_MATRICES = _Rule((MATRIX_FACTOR, LARGEST_FACTOR), "the same weight in the other layers", MAX_MATRIX_FACTOR)
_NORMS = _Rule((NORM_FACTOR, LOOSE_FACTOR), "the same norm in the other layers", is_smooth=True)
_HYPER = _Rule((HYPER_FACTOR, LOOSE_FACTOR), "the same parameter in the other layers", is_smooth=True)
_OTHERS = _Rule((LOOSE_FACTOR, LOOSE_FACTOR), "the same parameter in the other layers", is_upward=True)
_KINDS = _Rule((KIND_FACTOR,), "the other kinds of matrices, all times sqrt(K)")
_NORM_KINDS = _Rule((NORM_KIND_FACTOR,), "the other kinds of norms")


def compare_magnitudes(magnitudes: Iterable[Magnitude], rms_norm_eps: float) -> MagnitudeReport:
    """Compares each tensor with its peers. rms_norm_eps: the model's; an embedding smaller than that is lost in it."""
    listed = list(magnitudes)
    sound = [found for found in listed if math.isfinite(found.rms)]
    unsound = (found.name for found in listed if not math.isfinite(found.rms))
    problems = [_problem(name, "holds NaN, infinity or numbers beyond 1e19") for name in unsound]
    members = _by_rule(sound)
    experts, dense = _split_experts(members[_MATRICES])
    layers = {rule: _by_kind(members[rule]) for rule in (_NORMS, _HYPER, _OTHERS)}
    layers[_MATRICES] = _by_kind([*dense, *_middles(experts)])
    usual_gain = median([_middle(kind).gain for kind in layers[_MATRICES].values()] or [0.0])
    found = [*_deviations(experts, _EXPERTS, usual_gain)]
    for rule, groups in layers.items():
        found += _deviations(groups, rule, usual_gain)
    odd = {deviation.member for deviation in found if deviation.is_odd}
    found += _deviations({"": _kinds(layers[_MATRICES], odd)}, _KINDS, 0.0)
    found += _deviations({"": _kinds(layers[_NORMS], odd)}, _NORM_KINDS, 0.0)
    problems += _problems(found)
    problems += _embedding_problems(sound, rms_norm_eps)
    of_matrices = [each for each in found if each.rule in (_EXPERTS, _MATRICES) and each.measure == "RMS"]
    farthest = max((abs(deviation.value) for deviation in of_matrices), default=0.0)
    return MagnitudeReport(len(listed), sum(each.num_values for each in listed), math.exp(farthest), tuple(problems))


def _by_rule(magnitudes: Iterable[Magnitude]) -> dict[_Rule, list[_Member]]:
    """Splits matrices, norms, hyper-connections' matrices and other parameters; the embedding is none of them."""
    split: dict[_Rule, list[_Member]] = {_MATRICES: [], _NORMS: [], _HYPER: [], _OTHERS: []}
    for found in magnitudes:
        rms = math.log(max(found.rms, _LEAST))
        member = _Member(found.name, (rms, math.log(max(found.largest, _LEAST))), rms + math.log(found.width) / 2)
        if found.width > 1:
            split[_MATRICES].append(member)
        elif found.name.endswith("norm.weight"):
            split[_NORMS].append(member)
        elif found.name != EMBEDDING:
            split[_HYPER if found.name.endswith("_fn") else _OTHERS].append(member)
    return split


def _split_experts(matrices: Iterable[_Member]) -> tuple[_Groups, list[_Member]]:
    """Returns the experts by layer and projection, without matrices of zeros, which are sound there; and all others.

    Where a layer has one or two experts, those of all layers are one group.
    """
    by_layer: dict[tuple[str, str], list[_Member]] = defaultdict(list)
    dense = []
    for member in matrices:
        match = _EXPERT.fullmatch(member.name)
        if match is None:
            dense.append(member)
        elif member.logs[0] > math.log(_LEAST):
            by_layer[match[1], match[2]].append(member)
    groups: dict[str, list[_Member]] = defaultdict(list)
    for (experts, projection), members in by_layer.items():
        groups[f"{experts}.{projection}" if len(members) > 2 else projection] += members
    return groups, dense


def _middles(experts: _Groups) -> list[_Member]:
    """Returns a member for each layer's experts of one projection: their median."""
    return [replace(_middle(members), name=name) for name, members in experts.items() if _LAYER.fullmatch(name)]


def _middle(members: Sequence[_Member]) -> _Member:
    logs = tuple(median(values) for values in zip(*(member.logs for member in members), strict=True))
    return _Member(members[0].name, logs, median(member.gain for member in members))


def _by_kind(members: Iterable[_Member]) -> _Groups:
    """Groups members by their names without the layer's number; backbone and MTP modules apart."""
    groups: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        match = _LAYER.fullmatch(member.name)
        groups[member.name if match is None else f"{match[1]}.*.{match[2]}"].append(member)
    return groups


def _kinds(groups: _Groups, odd: set[_Member]) -> list[_Member]:
    """Returns a member for each kind: the median gain of those that are not odd among their own kind."""
    kinds = []
    for kind, members in groups.items():
        sound = [member.gain for member in members if member not in odd]
        if sound:
            kinds.append(_Member(members[0].name if len(members) == 1 else kind, (median(sound),), median(sound)))
    return kinds


def _deviations(groups: _Groups, rule: _Rule, usual_gain: float) -> Iterator[_PeerDistance]:
    """Yields how far each member is from its peers; a group of one has none.

    groups: members in the order of their layers. usual_gain: of two that differ, the one further from it is odd.
    """
    pairs = [members for members in groups.values() if len(members) == 2]
    larger = [members for members in groups.values() if len(members) > 2]
    for measure, factor in enumerate(rule.factors):
        centred = [_centred([member.logs[measure] for member in members]) for members in larger]
        pooled = _spread([value for values in centred for value in values])
        tail = outlier_limit(max(_LEAST_POOLED, sum(map(len, centred))))
        for members, values in zip(larger, centred, strict=True):
            size = len(values)
            spread = math.sqrt((_PRIOR * pooled**2 + size * _spread(values) ** 2) / (_PRIOR + size))
            limit = _limit(factor, tail * spread, rule.most)
            for place, member in enumerate(members):
                around = _neighbours(values, place) if rule.is_smooth else 0.0
                nearer = min(values[place], values[place] - around, key=abs)
                yield _PeerDistance(member, _MEASURES[measure], nearer, limit, rule)
        if measure == 0:
            limit = _limit(max(factor, PAIR_FACTOR), tail * math.sqrt(2) * pooled, rule.most)
            yield from (_of_pair(members, limit, rule, usual_gain) for members in pairs)


def _neighbours(values: Sequence[float], place: int) -> float:
    """Returns the median of up to four values around ``place``, without its own."""
    start = min(max(0, place - 2), max(0, len(values) - 5))
    return median([*values[start:place], *values[place + 1 : start + 5]])


def _of_pair(pair: Sequence[_Member], limit: float, rule: _Rule, usual_gain: float) -> _PeerDistance:
    near, far = sorted(pair, key=lambda member: abs(member.gain - usual_gain))
    if rule.is_upward:
        near, far = sorted(pair, key=lambda member: member.logs[0])
    return _PeerDistance(far, _MEASURES[0], far.logs[0] - near.logs[0], limit, rule)


def _centred(values: Sequence[float]) -> list[float]:
    middle = median(values)
    return [value - middle for value in values]


def _spread(deviations: Sequence[float]) -> float:
    """Returns the standard deviation by the median of magnitudes, which outliers do not move."""
    return MAD_TO_SIGMA * median(map(abs, deviations)) if deviations else 0.0


def _limit(factor: float, spread: float, most: float) -> float:
    return max(math.log(factor), min(spread, math.log(most)))


def _problems(found: Iterable[_PeerDistance]) -> Iterator[Finding]:
    """Yields a problem for each odd member, by the first measure that shows it."""
    told: set[str] = set()
    for deviation in found:
        name = deviation.member.name
        if not deviation.is_odd or name in told:
            continue
        told.add(name)
        ratio, allowed = math.exp(deviation.value), math.exp(deviation.limit)
        what = "the RMS of its values" if deviation.measure == "RMS" else "the largest of its values"
        message = f"{what} is {ratio:.3g} times the median of {deviation.rule.peers}"
        problem = _problem(name, f"{message} (up to {allowed:.3g} times more or less is usual)")
        yield replace(problem, number=math.exp(abs(deviation.value)), allowed=f"a factor of {allowed:.3g}")


def _embedding_problems(magnitudes: Iterable[Magnitude], rms_norm_eps: float) -> Iterator[Finding]:
    """Yields an embedding that is out of every model's band: it has no peer at all."""
    least = 2 * math.sqrt(rms_norm_eps)
    for found in magnitudes:
        if found.name == EMBEDDING and found.rms and not least <= found.rms <= MAX_EMBEDDING:
            band = f"models have {least:.2g} (norms add {rms_norm_eps:g} to its square) to {MAX_EMBEDDING:g}"
            yield _problem(EMBEDDING, f"the RMS of its values is {found.rms:.3g}; {band}")


def _problem(name: str, found: str) -> Finding:
    return make_problem("weight-magnitude", name, f"{name!r}: {found}")
