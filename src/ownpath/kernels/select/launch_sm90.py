"""Exact top-k of the indexer's scores on Hopper: Triton's kernel for short rows, a cluster of CTAs for each long row.

Which one depends on the table's width, the longest possible row, and on K: one launch either way, and no workspace for
a cluster. ``select_sm90`` and ``launch`` tell how the kernels work. Both are exact, so a row's bits depend on nothing
else. Rows longer than a cluster holds go to Triton's tree.
"""

from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass, field
from threading import Lock

import torch

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Launch, Pointers, current_stream
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.scores.launch import check_rows
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, PagedRows
from ownpath.kernels.select.choose_sm90 import choose_config, reachable_configs
from ownpath.kernels.select.config_sm90 import SelectConfig
from ownpath.kernels.select.launch import SELECT, SelectOperand
from ownpath.kernels.select.outputs import SelectOutputs, check_selected
from ownpath.kernels.select.types import Selected, SelectWeights


class ClusterSelectLaunch:
    """The prepared launch of one size, and its outputs."""

    def __init__(self, config: SelectConfig, topk: int, shape: torch.Size, device_index: int) -> None:
        num_rows, num_blocks = shape
        self.outputs = SelectOutputs(num_rows, topk, device_index)
        self._pointers = Pointers(6)
        args: tuple[Argument, ...] = (*self._pointers.arguments, c_int(num_blocks), c_int(topk))
        self._launch = Launch(load(config, device_index), (config.cluster, num_rows, 1), args)

    def start(self, stream: int, *addresses: int) -> None:
        """Launches. addresses: of scores, positions, blocks and the three outputs."""
        self._pointers.set(*addresses)
        self._launch.start(stream)


ClusterCallKey = tuple[torch.Size, int]
"""Shape of the block table, device."""


@dataclass(frozen=True)
class CuteSelectOperand:
    """tree: Triton's operand, for rows that are not long. calls: for inputs that have passed every check."""

    tree: SelectOperand
    calls: LaunchCache[ClusterCallKey, ClusterSelectLaunch] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class CuteSelect:
    """Each row's ``topk`` visible entries with the best scores, as rows of the pool in the order of the entries.

    The lower index wins a tie, -0 equals 0, a NaN counts as minus infinity and flags its row.
    """

    def prepare(self, weights: SelectWeights) -> CuteSelectOperand:
        """Makes the operand. Errors: ValueError for a ``topk`` outside 1 to 1024, or blocks not a power of two long."""
        return CuteSelectOperand(SELECT.prepare(weights))

    def configs(self, operand: CuteSelectOperand) -> Sequence[Config]:
        """Returns the clusters' kernels; Triton compiles at the first call."""
        return reachable_configs(operand.tree.pages)

    def config(self, num_rows: int, num_blocks: int, operand: CuteSelectOperand) -> SelectConfig | None:
        """Returns the kernel of a call's rows; ``None`` where Triton's runs."""
        return choose_config(num_rows, num_blocks, operand.tree.pages)

    def variant(self, scores_TC: torch.Tensor, operand: CuteSelectOperand) -> str:
        """Returns the variant's name, which depends on the number of rows, the longest possible one and ``topk``."""
        num_rows, width = scores_TC.shape
        config = self.config(num_rows, width // operand.tree.pages.per_block, operand)
        return SELECT.variant(scores_TC, operand.tree) if config is None else config.name

    def workspace(
        self, operand: CuteSelectOperand, num_rows: int, num_blocks: int, device: torch.device
    ) -> torch.Tensor | None:
        """Allocates zeroed scratch for calls that Triton's tree answers; ``None`` for others."""
        if num_rows and self.config(num_rows, num_blocks, operand) is not None:
            return None
        return SELECT.workspace(operand.tree, num_rows, num_blocks, device)

    def run(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        operand: CuteSelectOperand,
        *,
        out: Selected | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Selected:
        """Selects entries. Scores float32 [T, B * per_block]; those that a row does not see change nothing.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        check_rank("scores_TC", scores_TC, 2, runs_on_cpu=False)
        device, num_rows, tree = scores_TC.device, len(scores_TC), operand.tree
        shape, index = rows.blocks_TB.shape, scores_TC.get_device()
        call = operand.calls.get((shape, index))
        config = None
        if call is None and len(shape) == 2:
            config = self.config(num_rows, shape[1], operand)
        if call is None and (config is None or not num_rows):
            return SELECT.run(scores_TC, rows, tree, out=out, workspace=workspace)
        check_rows(rows, num_rows, device)
        check("scores_TC", scores_TC, (torch.float32,), (num_rows, shape[1] * tree.pages.per_block), device)
        if out is not None:
            check_selected(out, num_rows, tree.topk, device)
        with operand.lock:
            if call is None:
                assert config is not None
                call = operand.calls.add((shape, index), ClusterSelectLaunch(config, tree.topk, shape, index))
            out = call.outputs.new() if out is None else out
            call.start(current_stream(index), *(tensor.data_ptr() for tensor in (scores_TC, *rows, *out)))
        return out

    def __call__(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        topk: int,
        pages: EntryPages = CSA_PAGES,
        out: Selected | None = None,
    ) -> Selected:
        """Computes ``run`` with the signature of the twin."""
        return self.run(scores_TC, rows, self.prepare(SelectWeights(topk, pages)), out=out)


CUTE_SELECT = CuteSelect()
