"""The ring of shared-memory stages: producers fill one stage after another, consumers follow them around."""

from cutlass import Int32, cute


@cute.jit
def next_stage(slot: Int32, phase: Int32, num_stages: int) -> tuple[Int32, Int32]:
    """The stage behind ``slot``, and the parity that its barriers show there: it flips with every turn."""
    slot += 1
    if slot == num_stages:
        slot = Int32(0)
        phase = phase ^ 1
    return slot, phase
