"""Arguments and results of the sampler.

Legend: T rows of logits, V tokens of the vocabulary, K places for biased tokens, R tables of counts, W rows that there
is room for, N numbers of a row's results.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.kernels.contract import Kernel, Operand

LEAST_TEMPERATURE = 1e-30
"""A row of a lower temperature takes the likeliest token: its inverse would not be a float32."""
IN_PROMPT = 1 << 30
"""Bit of a token's entry in a table of counts: it is in the prompt. The bits below count it in the answer."""
FAULT_NON_FINITE, FAULT_NOTHING_ALLOWED = 1, 2
"""A row without a choice: a logit that is NaN or infinite; a mask without a token."""


class FilterRows(NamedTuple):
    """Limits of a row's draw. Each filter looks at the whole distribution after temperature; all must agree.

    Shapes: top_k_T int32 [T]: keep the k likeliest, 0 keeps all. top_p_T float32 [T]: keep the likeliest that together
        reach this probability, 1 keeps all. min_p_T float32 [T]: keep what has this share of the best one's
        probability, 0 keeps all. Of equal logits the lower id counts as likelier.
        The likeliest token is always kept.
    """

    top_k_T: Tensor
    top_p_T: Tensor
    min_p_T: Tensor


class PenaltyRows(NamedTuple):
    """Penalties on tokens that a row has seen.

    Shapes: tables_RV int32 [R, V]: an entry is how often the answer has the token, plus ``IN_PROMPT``. table_T int32
        [T]: the row's table, -1 for a row without penalties. presence_T, frequency_T, repetition_T float32 [T].
    """

    tables_RV: Tensor
    table_T: Tensor
    presence_T: Tensor
    frequency_T: Tensor
    repetition_T: Tensor


class BiasRows(NamedTuple):
    """Values added to the logits of some tokens.

    Shapes: ids_TK int32 [T, K], ascending, each once; values_TK float32 [T, K], finite; counts_T int32 [T]: how many
        of a row's K places are used.
    """

    ids_TK: Tensor
    values_TK: Tensor
    counts_T: Tensor


class SampleRows(NamedTuple):
    """The parameters of each row. What is ``None`` costs nothing.

    Shapes: temperature_T float32 [T], 0 for the likeliest token; seed_T int64 [T]; index_T int32 [T]: how many tokens
        the answer already has. mask_TW int32 [T, ceil(V / 32)]: bit i of word w allows token 32 w + i.
        place_T int32 [T]: the row's place among those of the logits and of the results, each place at most once;
        results elsewhere stay as they are. ``None``: the rows are all there are, in order.
    """

    temperature_T: Tensor
    seed_T: Tensor
    index_T: Tensor
    filters: FilterRows | None = None
    penalties: PenaltyRows | None = None
    bias: BiasRows | None = None
    mask_TW: Tensor | None = None
    place_T: Tensor | None = None


class Sampled(NamedTuple):
    """Chosen tokens.

    Shapes: token_T int64 or int32 [T], 0 in a row with a fault. fault_T of the same dtype, 0 for none. logprob_T
        float32 [T], of the token by the raw logits, before temperature and filters; ``None``: not computed.
    """

    token_T: Tensor
    fault_T: Tensor
    logprob_T: Tensor | None = None


class NextStep(NamedTuple):
    """The arrays in which a decode step's rows go on, written with their tokens; row t is column t.

    Shapes, all int32: token_W, the token that the next step reads, -1 in a padded row. pad_W: -1 in a padded row,
        else 0. counts_2W: the row's position and the number of its drawn tokens, each one more than before but in a
        padded row. results_NW: token, fault and log-prob, then what other kernels of the step have written.
        shared_2NW: two copies of the results, in memory that the host reads too. turn_W, 0 or 1: the copy that is
        written, 1 - turn after it.
    Rows with places were in a step that has counted them: their tokens and results are written over those it wrote.
    """

    token_W: Tensor
    pad_W: Tensor
    counts_2W: Tensor
    turn_W: Tensor
    results_NW: Tensor
    shared_2NW: Tensor


class SampleKernel(Kernel[Operand], Protocol[Operand]):
    """One token for each row of logits."""

    def prepare(self) -> Operand:
        """Makes the operand: what calls that follow each other on one stream share."""

    def variant(self, logits_TV: Tensor, rows: SampleRows, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(
        self,
        logits_TV: Tensor,
        rows: SampleRows,
        operand: Operand,
        *,
        out: Sampled | None = None,
        following: NextStep | None = None,
    ) -> Sampled:
        """Chooses tokens. Shapes: logits_TV float32 [T, V], rows any number of elements apart; V tokens, no padding.
            With ``rows.place_T`` logits and ``out``, which must be given then, may have more rows. With ``following``
            the tokens of ``out`` are int32, and log-probs are computed.

        Errors: ValueError naming what is wrong with the logits, the rows or out.
        """
