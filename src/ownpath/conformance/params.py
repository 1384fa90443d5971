"""One generator of activations for every operation: of ordinary and extreme size, the same for the same words.

Legend: T tokens, S streams, D hidden, N heads, H head dim, K keys, E experts, F expert width or rotary angles.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.kernels.hyper.ref import Mix
from ownpath.ops import OpKind

AMPLITUDES = (1.0, 2.0**-10, 1.0, 2.0**8)
"""Sizes of an input's rows, in turn; normed activations have 1."""
OUTLIER = 2.0**6
"""One channel in a hundred of every third row is larger by this, as in real activations."""
ORDINARY = (1.0, 2.0**-10, 0.5, 1.0, 2.0**-4)
"""Sizes of rows as after a norm, or smaller: few of an expert's gates reach the clamp."""
LOUD = (2.0**4, 2.0**6, 2.0**8, 2.0**10)
"""Sizes of rows whose gates reach the clamp."""
CLAMP_FACTORS = (0.0, 0.5, 0.999, 1.0, 1.001, 2.0, 30.0)
"""Gates and ups as multiples of swiglu_limit, with both signs."""
QUERY_SIZES = (1.0, 0.0, 2.0**-4, 4.0)
"""Sizes of queries, in turn: where scores are zero the sink has its full share."""
NUM_KEYS = (1, 2, 31, 129, 300)
POSITIONS = (0, 1, 4096, 131072, 1_000_000)
"""Positions of rotations; those that a model does not have become its last."""


@dataclass(frozen=True)
class ArgumentSizes:
    """The sizes that the arguments of an operation depend on; 0 where it has no such size.

    width: of the input rows. expert_ids: the experts that tokens are sent to. angles: (cos, sin) of each row [T, F].
    """

    width: int
    num_streams: int = 0
    num_heads: int = 0
    expert_ids: tuple[int, ...] = ()
    num_experts_per_tok: int = 0
    vocab_size: int = 0
    angles: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Draw:
    """Draws random values that depend on the given words only, not on earlier draws."""

    name: str
    device: torch.device
    dtype: torch.dtype

    def normal(self, seed: str, *shape: int) -> Tensor:
        """Draws standard normal float32 values, the same for the same words on the same kind of device."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.name} {seed}".encode()))
        return torch.randn(*shape, generator=generator, device=self.device)

    def rows(self, seed: str, num_rows: int, width: int) -> Tensor:
        """Draws activations of ordinary and of extreme size: [num_rows, width]."""
        x = self.normal(seed, num_rows, width)
        x[::3, :: max(1, width // 100)] *= OUTLIER
        return self.scale_rows(x, AMPLITUDES)

    def scale_rows(self, x: Tensor, sizes: tuple[float, ...]) -> Tensor:
        """Multiplies rows of x with the sizes in turn, in the activations' dtype."""
        listed = torch.tensor(sizes, device=x.device).repeat(-(-len(x) // len(sizes)))[: len(x)]
        return (x * listed.view(-1, *[1] * (x.ndim - 1))).to(self.dtype)

    def streams(self, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[Tensor, Tensor, Mix]:
        """Draws streams [T, S, D], an output [T, D] and the mix that spreads it."""
        s = sizes.num_streams
        x_TSD = self.rows(seed, num_rows, s * sizes.width).unflatten(1, (s, sizes.width))
        post_TS = torch.sigmoid(self.normal(f"{seed} post", num_rows, s)) * 2
        comb_TSS = torch.softmax(self.normal(f"{seed} comb", num_rows, s, s), dim=-1)
        return x_TSD, self.rows(f"{seed} y", num_rows, sizes.width), Mix(post_TS, comb_TSS)

    def queries(self, seed: str, num_rows: int, num_heads: int, head_dim: int) -> Tensor:
        """Draws queries [T, N, H], of ordinary size and less, with some zeros."""
        return self.scale_rows(self.normal(f"{seed} q", num_rows, num_heads, head_dim), QUERY_SIZES)

    def keys(self, seed: str, num_keys: int, head_dim: int) -> Tensor:
        """Draws keys [K, H] of ordinary size: a sink takes all the weight from a key whose score is some hundreds
        below."""
        return self.normal(f"{seed} keys", num_keys, head_dim).to(self.dtype)


def arguments(kind: OpKind, draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    """Draws an operation's arguments of the kind that serving passes; the first of them is the activations."""
    return _ARGUMENTS[kind](draw, seed, num_rows, sizes)


def _rows(draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    """Draws [T, width], or heads [T, N, width]."""
    x = draw.rows(seed, num_rows, max(sizes.num_heads, 1) * sizes.width)
    return (x.unflatten(1, (sizes.num_heads, sizes.width)) if sizes.num_heads else x,)


def _draw_grouped(draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    return *_rows(draw, seed, num_rows, sizes), sizes.angles


def _experts(draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    chosen = torch.tensor(sizes.expert_ids)
    slots = min(sizes.num_experts_per_tok, len(chosen))
    generator = torch.Generator().manual_seed(num_rows)
    ids = chosen[torch.rand(num_rows, len(chosen), generator=generator).topk(slots).indices]
    weights = torch.rand(num_rows, slots, generator=generator) + 0.1
    return draw.rows(seed, num_rows, sizes.width), ids.to(draw.device), weights.to(draw.device)


def _router(draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    token_ids = torch.arange(num_rows, device=draw.device) % sizes.vocab_size
    # Of ordinary size: scores of logits below -100 are zero in float32, and so are the weights' sums.
    return draw.normal(seed, num_rows, sizes.width).to(draw.dtype), token_ids


def _attention(draw: Draw, seed: str, num_rows: int, sizes: ArgumentSizes) -> tuple[object, ...]:
    q_TNH = draw.normal(f"{seed} q", num_rows, sizes.num_heads, sizes.width).to(draw.dtype)
    age_TK = torch.arange(num_rows, device=draw.device)[:, None] - torch.arange(num_rows, device=draw.device)
    return q_TNH, draw.keys(seed, num_rows, sizes.width), age_TK >= 0


_ARGUMENTS: dict[OpKind, Callable[[Draw, str, int, ArgumentSizes], tuple[object, ...]]] = {
    OpKind.LINEAR: _rows,
    OpKind.GROUPED: _draw_grouped,
    OpKind.MOE: _experts,
    OpKind.HYPER: Draw.streams,
    OpKind.NORM: _rows,
    OpKind.ROUTER: _router,
    OpKind.SWIGLU: _rows,
    OpKind.ATTENTION: _attention,
    OpKind.KEY_QUANTIZER: _rows,
    OpKind.INDEX_QUANTIZER: _rows,
}
