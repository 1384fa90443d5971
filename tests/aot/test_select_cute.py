"""Hopper's selection among long rows, compiled without a GPU: it fits an SM, and its PTX, run on the CPU, is exact."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.covering import covering, slow_beside
from support.disassembled import usage
from support.indexer_cases import SCORES, hide_unseen, make_rows
from support.ptx_machine import Machine, Program

from ownpath.kernels.scores.types import CSA_PAGES, PagedRows
from ownpath.kernels.select.choose_sm90 import choose_config, reachable_configs
from ownpath.kernels.select.config_sm90 import SelectConfig
from ownpath.kernels.select.ref import select

CONFIGS = reachable_configs(CSA_PAGES)
SMALL = (SelectConfig(256, 4, 2), SelectConfig(256, 8, 1))
"""As few threads as there are: the CPU runs them."""
WRITE_PTX = """
import json, sys
from ownpath.kernels.select.config_sm90 import SelectConfig
from ownpath.kernels.select.select_sm90 import compile_select
print(json.dumps([compile_select(SelectConfig(*sizes)).__ptx__ for sizes in json.loads(sys.argv[1])]))
"""


@pytest.mark.parametrize("config", slow_beside(covering(CONFIGS), CONFIGS), ids=lambda config: config.name)
def test_an_sm_holds_as_many_as_are_counted_on(config: SelectConfig, binary: Path) -> None:
    registers, stack, shared = usage(binary)
    ctas = max(1, 1024 // config.threads)
    assert registers * config.threads * ctas <= 65536
    assert shared <= 48 * 1024  # static
    # A few words, of what every round of the search needs once.
    assert stack <= 64


def test_long_rows_take_a_cluster_and_the_longest_too() -> None:
    chosen = set()
    for num_rows in (1, 4, 5, 8, 16, 17, 33, 66, 67, 128, 256):
        assert choose_config(num_rows, 64, CSA_PAGES) is None
        for num_blocks in (65, 128, 129, 512, 513, 4096):
            config = choose_config(num_rows, num_blocks, CSA_PAGES)
            assert config is not None
            assert num_blocks * 64 <= config.most_scores
            chosen.add(config)
        assert choose_config(num_rows, 4097, CSA_PAGES) is None
    assert chosen == set(CONFIGS)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[SelectConfig, Program]:
    """The small kernels' PTX. The DSL keeps it for a process that asks before it imports it."""
    settings = {"ARCH": "sm_90a", "KEEP_PTX": "1", "DUMP_DIR": str(tmp_path_factory.mktemp("ptx"))}
    sizes = json.dumps([(config.threads, config.keys, config.cluster) for config in SMALL])
    environment = os.environ | {f"CUTE_DSL_{key}": value for key, value in settings.items()}
    command = [sys.executable, "-c", WRITE_PTX, sizes]
    texts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    return {config: Program.parse(text) for config, text in zip(SMALL, texts, strict=True)}


def words_of(tensor: torch.Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    return tensor.contiguous().numpy().view(np.uint32).ravel()


def run_on_cpu(config: SelectConfig, program: Program, scores_TC: torch.Tensor, rows: PagedRows, topk: int) -> set[int]:
    """Runs the kernel, compares it with the twin, and returns the instructions that were reached."""
    num_rows = len(scores_TC)
    outs = [np.full(count, 0xFFFFFFF9, np.uint32) for count in (num_rows * topk, num_rows, num_rows)]
    tensors = [words_of(scores_TC), *map(words_of, rows), *outs]
    machine = Machine(program, tensors, (rows.blocks_TB.shape[1], topk), {4, 5, 6})
    machine.run(config.cluster, num_rows, seed=topk)
    for name, found, wanted in zip(("rows", "num", "non_finite"), outs, select(scores_TC, rows, topk), strict=True):
        assert np.array_equal(found.view(np.int32), wanted.numpy().ravel()), name
    return machine.reached


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_its_ptx_is_exact(config: SelectConfig, programs: dict[SelectConfig, Program]) -> None:
    """Rows in one CTA and in all, shorter than K, as long, one longer; every kind of hard scores; every line runs.

    A kind has every other position, and the other kernel its other ones: a run of the PTX takes a second a row.
    """
    parsed = programs[config]
    width, reached = config.most_scores // 64, set[int]()
    longest = 4 * config.most_scores - 1
    for seed, (kind, topk) in enumerate(zip(SCORES, (512, 512, 1024, 128, 100, 512, 512), strict=True)):
        g = torch.Generator().manual_seed(seed)
        all_positions = (longest, longest - 5, 4 * topk - 1, 4 * topk + 3, min(5003, longest), 2)
        positions = all_positions[(seed + config.cluster) % 2 :: 2]
        rows = make_rows(positions, width, len(positions) * width + 8, g)
        scores_TC = hide_unseen(SCORES[kind](len(positions), config.most_scores, g), rows)
        reached |= run_on_cpu(config, parsed, scores_TC, rows, topk)
    assert len(reached) >= 0.97 * len(parsed.instructions)
