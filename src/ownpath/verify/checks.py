"""The stable id of every check, and its message when it passes. ``ownpath verify --list`` prints both tables."""

from types import MappingProxyType

STAGE_NAMES = ("file", "environment", "load", "kernels", "layers", "ledger")
"""The stages, in the order in which they run."""
SHARE_OF_BOUND = frozenset({"K01", "K04", "K06", "K07", "K08", "K09", "K11", "K12", "V01", "VE01"})
"""Checks whose number is an error over what rounding may cause: 1 is the most that is allowed."""
TITLES = MappingProxyType(
    {
        "F01": "files are whole; index and shards agree",
        "F02": "every tensor that config.json asks for, and no other",
        "F03": "dtypes and shapes are an encoding's",
        "F04": "each module's format: tensors agree with the files' claims",
        "F05": "global scales are multipliers, near their layer's",
        "F06": "gate and up of an expert share a global scale",
        "F07": "block scales are numbers; no expert is far from the others",
        "F09": "input scales are there and calibrated",
        "F10": "router: tables and biases choose experts that exist",
        "F11": "config.json can be honoured and fits the tensors",
        "F12": "tokenizer: ids, markers, round trips and golden prompts",
        "F13": "experts decode to what another export's do",
        "F14": "every weight is as large as its peers",
        "E01": "device, driver and libraries: no combination known to fail",
        "E02": "every planned kernel can run here",
        "E03": "tuned tables and compiled kernels are these sources'",
        "E04": "memory",
        "L01": "every byte of every operand was written once",
        "L02": "what the kernels hold is what the file holds",
        "L03": "the scales that kernels receive are the file's",
        "L04": "padding is zero",
        "K01": "products, experts, norms: what the weights' values give",
        "K02": "every element is written, whatever memory held",
        "K03": "quantisers round to the nearest code, bit by bit",
        "K04": "every variant that can be chosen",
        "K05": "router: ties, extremes, weights that sum up",
        "K06": "SwiGLU's clamp, in routed and shared experts",
        "K07": "rotations at near and far positions",
        "K08": "hyper-connections: mixing weights sum to 1",
        "K09": "attention: empty rows, window edges, sink",
        "K10": "contracts: dtypes, strides and layouts of every call",
        "K11": "decode steps: entries, index scores, selection, attention",
        "K12": "chunks of prompts: index scores, selection, attention, caches",
        "V01": "values of each layer, slot by slot, within their budgets",
        "V02": "what leaves each layer, fed with the reference's input",
        "V03": "magnitudes across the depth",
        "V04": "the whole model's logits",
        "V05": "in chunks and token by token as in one go",
        "V08": "a second run has the same bits",
        "V09": "in a batch as alone",
        "V10": "keys survive their cache's format",
        "V11": "the module of drafts: what enters its layer, and its logits",
        "V12": "steps that draft: their tokens, their guesses, the module's window",
        "LG01": "the plan is the one that was written down",
        "LG02": "every planned slot ran, and no other",
        "LG03": "runners and kernels are the planned ones",
        "LG04": "layouts are the planned ones",
        "LG05": "dtypes are the demanded ones",
        "LG06": "the device saw the planned kernels",
        "RUN": "the stage came to its end",
    }
)
"""id -> one line."""

FAILS_ON = MappingProxyType(
    {
        "F01": "a shard that is damaged, missing or foreign; an index that disagrees with the shards",
        "F02": "missing and unexpected tensors, expert by expert",
        "F03": "a dtype or shape that no encoding stores",
        "F04": "experts of a layer that are stored differently; scales that a planned kernel cannot read; warns of "
        "config files that claim another format",
        "F05": "zero, negative, NaN or no normal number; a divisor for a multiplier; warns of a factor of 1000 "
        "from the layer's median",
        "F06": "nothing; warns of different global scales of w1 and w3: exact here, wrong in engines that apply "
        "w1's to both",
        "F07": "NaN, negative, vanished or saturated block scales; an expert far from its layer's others; counts "
        "FP8 scales that are no power of two, which kernels that keep exponents alone get wrong",
        "F09": "input_scale not finite and positive, or exactly 1, where a planned kernel reads it; warns where none "
        "does; counts those that calibration did not reach",
        "F10": "expert ids out of range or twice in a row; a bias that is NaN, or constant while other layers' are not",
        "F11": "a field that cannot be honoured or contradicts the tensors; lists the fields that are not read",
        "F12": "end tokens without the chat format's, markers that are not one token, text that does not come back, "
        "wrong prompts; warns of other ids that differ",
        "F13": "with --source: an element further from the other export's than half a step of either format",
        "F14": "sampled rows of a weight, decoded, whose RMS is 6 times that of its layer's experts or of the same "
        "weight in other layers, or a sixth (8 where there is one other layer, 20 for norms, 300 upwards for biases; "
        "24 for the largest value and between kinds of matrices), and beyond what their own spread explains",
        "E01": "a combination of device, driver, CUDA, torch and Triton that is publicly known to fail (listed below)",
        "E02": "a module that cannot be imported; a variant not on disk where there is no compiler",
        "E03": "a tuned table that is none; machine code that is damaged",
        "E04": "two layers that do not fit; a whole model that does not fit is skipped",
        "L01": "a slot written not at all or twice; a sentinel that is left; anything that loading refuses",
        "L02": "one element of codes, block scales or plain tensors that is not the file's, read back from the layout",
        "L03": "a factor off by more than 3 x 2^-24, relative",
        "L04": "a byte of padding that a kernel may read and that is not zero",
        "K01": "an element beyond what the arithmetic allows, for many row counts and sizes; each expert alone",
        "K02": "a bit that depends on what memory held; NaN; nothing but zeros; an earlier input's result",
        "K03": "one wrong value at codes, midpoints and their neighbours, for quantisers that stand alone",
        "K04": "as K01, at both ends of the row counts that each compiled variant serves",
        "K05": "an expert with too small a score, a tie that is not the lowest id, weights that are not the scores'",
        "K06": "as K01, on inputs up to 1024 times too large; says when a missing clamp explains it",
        "K07": "an angle that is not the layer's theta and YaRN; a rotation that wo_a does not undo",
        "K08": "as K01; columns of comb that do not sum to 1; mixing weights narrower than float32",
        "K09": "as K01, at window edges and round the ring; a bit that hidden keys change",
        "K10": "a wrong call that is not refused; a result narrower than the activations",
        "K11": "as K01, over caches full of NaN but for each row's own; a written row that is not the step's; a "
        "selected entry that is not the next best",
        "K12": "as K11, for many short chunks together and a long one alone",
        "V01": "a value beyond its budget over all rows, or 8 budgets in one; choices that the scores do not explain",
        "V02": "the streams behind a layer beyond their budget",
        "V03": "the largest magnitude of a value more than 8 budgets from the oracle's",
        "V04": "KL, best token or likelihood beyond the logit budget, over the 99 % of positions that agree best",
        "V05": "a row more than 2 x 8 budgets from one shot",
        "V08": "one bit, in caches that were filled with NaN",
        "V09": "as V05; one bit with --batch-invariant",
        "V10": "with official numerics: keys that do not move, or by more than half a step of E4M3",
        "V11": "with --draft: norms and products of the next token and of the streams, their sum, or the logits beyond "
        "their budgets",
        "V12": "with --draft: an answer that is not what the target drew, a step that goes on from another place, a "
        "guess that counts and is wrong or is right and does not, a guess that is not the module's, a row of the "
        "module more than 2 x 8 budgets from one forward over the text",
        "LG01": "another checkpoint's plan or device; a slot that the file lacks",
        "LG02": "a slot that was never called; a layer that could not be loaded or run",
        "LG03": "a runner or kernel put in another's place after planning; a call that is not planned",
        "LG04": "a kernel that reads another layout than the weights were planned in",
        "LG05": "arguments or results of another dtype than the plan demands",
        "LG06": "on CUDA: a library's product in a slot planned on our kernel, a planned kernel that did not run, "
        "a product outside every slot",
        "RUN": "a stage that ended with an error",
    }
)
"""id -> what makes it fail."""

ENGINE_TITLES = MappingProxyType(
    {
        "VE01": "each module's output, from what it got, within its budget",
        "VE02": "experts and compressed entries are those that the scores say",
        "VE03": "every worker: what multiplies each weight",
        "VE04": "which steps and modules were looked at",
        "VE05": "the device's own record of each step, replays too, has the planned kernels",
    }
)
"""Checks of another engine's modules (``--engine``): id -> one line."""
ENGINE_FAILS_ON = MappingProxyType(
    {
        "VE01": "with --engine vllm: a module whose output, in any of the steps, is further from the reference of the "
        "same input than 4 times what rounding moves that reference by; anything not finite",
        "VE02": "with --engine vllm: a row that goes to other experts than the logits of its router say, or attends "
        "to an entry that is not complete, near ties aside",
        "VE03": "with --engine vllm: a module of ours whose kernel is not the plan's, or that still has parameters",
        "VE04": "nothing; tells what this vLLM lacks, what could not be captured, and steps that do not fit its limits",
        "VE05": "with --engine vllm, graphs on: a step in which the device ran a planned kernel less often than it is "
        "called, one of vLLM's for a part that is ours, or one of ours that is not planned",
    }
)


def title_of(id_: str) -> str:
    """Returns a check's line, "" for an id that is none."""
    return TITLES.get(id_) or ENGINE_TITLES.get(id_, "")
