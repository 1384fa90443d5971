"""K02 and K10 of every planned slot: earlier contents of memory, and meaningless calls."""

from collections.abc import Iterator

from ownpath.conformance.contracts import contract_problems
from ownpath.conformance.memory import memory_problem
from ownpath.finding import Finding
from ownpath.verify.kernels.calls import calls
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

ROWS, MANY_ROWS = (1, 33), (1, 3, 33, 129, 1025)
FEW_ROWS = 3
MEMORY_REMEDY = "the kernel reads or leaves unwritten memory: do not serve with it; the plan can choose another"
CONTRACT_REMEDY = "the runner must check this argument: a caller's mistake would be computed with"


def check_memory(probe: Probe) -> Iterator[Finding]:
    """K02: checks every planned slot."""
    tally = Tally("K02", probe.name, "calls in memory full of NaN and of zeros", MEMORY_REMEDY)
    for num_rows in MANY_ROWS if probe.is_cuda else ROWS:
        for call in calls(probe, num_rows):
            kernel, rows = probe.kernels[call.slot], f"{num_rows} rows: "
            with tally.catch_errors(call.slot, kernel, rows):
                problem = memory_problem(call)
                tally.judge(call.slot, kernel, problem and rows + problem)
    yield from tally.findings()


def check_contracts(probe: Probe) -> Iterator[Finding]:
    """K10: checks every planned slot."""
    tally = Tally("K10", probe.name, "wrong dtype, width, device, routing or strides", CONTRACT_REMEDY)
    for call in calls(probe, FEW_ROWS):
        for problem in contract_problems(call):
            tally.judge(call.slot, probe.kernels[call.slot], problem)
    yield from tally.findings()
