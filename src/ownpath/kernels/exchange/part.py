"""A rank's part of a sum, pushed to all ranks in a launch that waits for nobody.

The boundary of hyper-connections behind it waits for all ranks' parts and adds them (``hyper.launch``): each of its
programs waits for the rows that it reads, and no launch more does. Between the two nothing else is exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall
from ownpath.kernels.exchange.launch import PushKey, check_parts, start_exchange, variant_of
from ownpath.kernels.exchange.window import Window
from ownpath.kernels.launch_cache import LaunchCache


@dataclass(frozen=True)
class PartOperand:
    """launches: for inputs that have passed every check."""

    window: Window
    launches: LaunchCache[PushKey, TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class PushedPart:
    """Pushes what ``PushedReduce`` would add up."""

    def prepare(self, window: Window) -> PartOperand:
        """Makes the operand. Exchanges of one window share its epochs: all are on one stream."""
        return PartOperand(window)

    def configs(self, operand: PartOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x_TD: Tensor, operand: PartOperand) -> str:
        """Returns the variant's name, which depends on the number of elements."""
        return variant_of(x_TD, operand.window)

    def run(self, x_TD: Tensor, operand: PartOperand, other_TD: Tensor | None = None) -> Tensor:
        """Pushes x, or x + other rounded as it would be stored. Returns x, as it is. Shapes: bfloat16 [T, D].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, before any launch.
        """
        check_parts(x_TD, other_TD, operand.window)
        key, other = (x_TD.shape, other_TD is not None), x_TD if other_TD is None else other_TD
        prepared = operand.launches.get(key)
        with operand.lock:
            if prepared is not None:
                addresses = x_TD.data_ptr(), other.data_ptr(), x_TD.data_ptr()
                prepared.start(current_stream(x_TD.get_device()), *addresses)
            else:
                call = start_exchange(operand.window, x_TD, other_TD, x_TD, pushes=True, sums=False)
                if call is not None:
                    operand.launches.add(key, call)
        return x_TD


PUSHED_PART = PushedPart()
