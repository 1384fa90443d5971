"""Tells whether the device still computes after a step has failed on it."""

import torch


def device_problem(device: torch.device | str) -> str | None:
    """Returns the error that a small sum on the device ends with; None if the sum is right.

    After some CUDA errors (an illegal address, a failed assertion) every later call of the process fails. Running out
    of memory is none of them: then the sum is right again, once the step's memory is given back.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        total = float(torch.ones(2, device=device).sum())
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None if total == 2.0 else f"1 + 1 is {total:g}"
