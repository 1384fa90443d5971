"""The cases of tools/vllm_rate.py, and how the prompts behind a decode step are read.

Stock compiles for each new class of rows, so every step that only reads prompts has ``CHUNK`` rows, or all of the
prompts of a case in one step.
"""

from collections.abc import Sequence
from itertools import pairwise

CHUNK = 1024
SHORT, LONG = 16, 1024
WARM_UPS, PROFILED, TIMED = 3, 8, 24
"""Steps of a case: before the others, recorded, and timed on the host."""
Case = tuple[str, int, int]
"""Kind, requests, context."""


def all_cases(requests: Sequence[int], contexts: Sequence[int], chunks: Sequence[int]) -> list[Case]:
    """Returns every case, those with the most prompt tokens last."""
    decodes = [("decode", count, context) for context in contexts for count in requests]
    return sorted([*decodes, *(("chunk", count, 0) for count in chunks)], key=lambda case: case[1] * case[2])


def num_steps(num_requests: int, context: int) -> int:
    """Returns the most steps that a request may be answered in: those in which the others are read, and the timed."""
    return len(prompt_groups(num_requests, context)) * steps_of_a_prompt(context) + WARM_UPS + PROFILED + TIMED + 2


def steps_of_a_prompt(context: int) -> int:
    """Returns the number of steps that read one group of prompts."""
    return max(1, context // CHUNK)


def prompt_groups(num_requests: int, context: int) -> list[list[int]]:
    """Returns lengths of prompts, group by group; a group is read before the next one is added.

    If they do not fit one step together, all steps have the same number of rows, ``CHUNK`` where contexts divide it:
    one of each request that already decodes, and the rest of prompts. So later prompts are shorter, by what earlier
    requests have answered when all are read.
    """
    if num_requests * context <= CHUNK:
        return [[context] * num_requests]
    num_groups = -(-num_requests // max(1, CHUNK // context))
    num_reading = steps_of_a_prompt(context)
    rows = num_requests * context // (num_groups * num_reading)
    firsts = [num_requests * idx // num_groups for idx in range(num_groups + 1)]
    groups = []
    for first, last in pairwise(firsts):
        short, num_longer = divmod(num_reading * (rows - first), last - first)
        groups.append([short + 1] * num_longer + [short] * (last - first - num_longer))
    return groups
