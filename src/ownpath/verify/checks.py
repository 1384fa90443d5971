"""Every check's stable name, and what it says when it passes. docs/verify.md says more of each."""

from types import MappingProxyType

TITLES = MappingProxyType(
    {
        "F01": "files are whole; index and shards agree",
        "F02": "every tensor that config.json asks for, and no other",
        "F03": "dtypes and shapes are an encoding's",
        "F04": "each module's format: the tensors agree with what the files claim",
        "F05": "global scales are multipliers, near their layer's",
        "F06": "gate and up of an expert share a global scale",
        "F07": "block scales are numbers; no expert is far from the others",
        "F08": "FP8 block scales are powers of two",
        "F09": "input scales are there and calibrated",
        "F10": "router: tables and biases choose experts that exist",
        "F11": "config.json can be honoured and fits the tensors",
        "F12": "tokenizer: ids, markers, round trips and golden prompts",
        "F13": "experts decode to what another export's do",
        "E01": "device, driver and libraries: no combination known to fail",
        "E02": "every planned kernel can run here",
        "E03": "tuned tables and compiled kernels are these sources'",
        "E04": "memory",
        "L01": "every byte of every operand was written once",
        "L02": "what the kernels hold is what the file holds",
        "L03": "the scales that kernels receive are the file's",
        "L04": "padding is zero",
        "L05": "every expert lies on one rank",
        "RUN": "the stage came to its end",
    }
)
"""id -> one line."""
