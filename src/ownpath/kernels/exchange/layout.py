"""The memory of pushed exchanges: a window on every rank, of one layout, that all ranks write to.

A window is int32 words: flags [N, P], one for each pushing program of each rank; epochs [P], this rank's, and written
by nobody else; the abort cell, bits of the ranks that somebody has named as lost; the limit of a wait in microseconds.
Behind them is the inbox, bfloat16 [2, N, elements]: what each rank has pushed, in two buffers that exchanges take in
turn. Behind that are the rows: where tensors of all ranks' rows lie as kernels read them, at addresses that stay. Last
are tagged words [2, N, words] of 64 bits, an inbox for few rows, which ``tagged`` explains.

The protocol, which ``tests/support/exchange_model.py`` goes through in every order of its steps:
  1. Push. Program p counts its epoch up, stores its share of the rows into buffer ``epoch % 2`` of every inbox, its own
     too, and then its flag, the epoch, with release. Nothing is pushed while the abort cell is set.
  2. Wait. A reader polls the flags of the programs whose rows it reads, with acquire, until each is the epoch or later
     (by wrapping subtraction); it ends early when the abort cell is set, and when the limit is over, which sets all
     abort cells. What misses several ranks waits a sixteenth longer: another rank may know which of them is lost.
  3. Sum. The N rows are added in the order of ranks in float32 and rounded once; behind a failed wait they are NaN.
Two buffers are enough, without acknowledgements. A rank writes a buffer again two exchanges later, after it has seen
every rank's flag of the exchange between, and a rank pushes that one only after its readers of the first have ended.
That needs one stream on each rank, every kernel behind the end of the one before, and all programs pushing in every
exchange, those without rows too; so flags also never lag by half a turn of the epoch. Every flag has one writer: no
atomic sums, nothing that must be zero, and a captured graph replays.

Rows have one place, which exchanges do not take in turn. It is enough where another exchange lies between two that push
rows, and kernels that read them are in front of that one: by the same argument.

Legend: N ranks, P pushing programs, T tokens, D hidden.
"""

from dataclasses import dataclass

MAX_RANKS = 8
NUM_PROGRAMS = 128
"""Pushing programs: no more than an H200 has SMs (132), so that all run at once, and enough to fill a link."""
TAGGED_ELEMENTS = 1 << 18
"""The most elements of a rank whose words have tags (``tagged``), if exchanges may be as large: 64 tokens of 4,096."""
SHARE_MULTIPLE = 128
"""A share of an exchange is a multiple of it: 256 bytes, so that every program's stores are whole sectors."""
_LINE_WORDS = 32


@dataclass(frozen=True)
class WindowLayout:
    """size: ranks. max_elements: the most elements of an exchange, T * D. num_programs: pushing programs.

    row_elements: the most words of 16 bits of one rank's rows.
    """

    size: int
    max_elements: int
    num_programs: int = NUM_PROGRAMS
    row_elements: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_RANKS:
            raise ValueError(f"exchanges are made for 1 to {MAX_RANKS} ranks, not {self.size}")
        if self.max_elements < 1 or self.max_elements % SHARE_MULTIPLE:
            raise ValueError(f"elements must be a multiple of {SHARE_MULTIPLE}, found {self.max_elements}")
        if self.row_elements < 0 or self.row_elements % SHARE_MULTIPLE:
            raise ValueError(f"elements of rows must be a multiple of {SHARE_MULTIPLE}, found {self.row_elements}")

    @property
    def epochs_at(self) -> int:
        """The word at which the epochs begin."""
        return self.size * self.num_programs

    @property
    def abort_at(self) -> int:
        """The word that is the abort cell."""
        return self.epochs_at + self.num_programs

    @property
    def limit_at(self) -> int:
        """The word that holds the limit of a wait, in microseconds."""
        return self.abort_at + 1

    @property
    def inbox_at(self) -> int:
        """The word at which the inbox begins: on a line of its own."""
        return -(-(self.limit_at + 1) // _LINE_WORDS) * _LINE_WORDS

    @property
    def rows_at(self) -> int:
        """The word at which the rows begin."""
        return self.inbox_at + self.size * self.max_elements  # two buffers of half words

    @property
    def tags_at(self) -> int:
        """The word at which the tagged words begin."""
        return self.rows_at + self.size * self.row_elements // 2

    @property
    def tagged_elements(self) -> int:
        """The most elements, of 16 bits, of a rank in an exchange by tagged words."""
        return min(max(self.max_elements, self.row_elements), TAGGED_ELEMENTS)

    @property
    def num_words(self) -> int:
        """Words of a window."""
        return self.tags_at + 2 * self.size * self.tagged_elements  # two buffers, two elements in two words

    def share(self, num_elements: int) -> int:
        """Returns how many elements each pushing program has; the last ones may have fewer or none."""
        whole = self.num_programs * SHARE_MULTIPLE
        return max(1, -(-num_elements // whole)) * SHARE_MULTIPLE
