"""Keys of one cache tensor, read and written by row in whatever form its memory has.

Legend: E keys, H channels of a key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.cache.layout import CacheTensor, EntryKind
from ownpath.numerics import INDEX_FORMS, KEY_PAGES, PageForm


@dataclass(frozen=True)
class StoredKeys:
    """The keys of a window, or the entries of a layer or its indexer.

    memory: as kernels take it: values [rows, H], or pages uint8 [slots or blocks, rows * bytes]. dtype: of keys
    that are read. pages: the form of the pages; ``None`` for values.
    """

    memory: Tensor
    dtype: torch.dtype
    pages: PageForm | None = None

    @classmethod
    def of(cls, member: CacheTensor, memory: Tensor, dtype: torch.dtype) -> "StoredKeys":
        form = KEY_PAGES if member.part is EntryKind.MAIN else INDEX_FORMS.get(member.format)
        return cls(memory, dtype, form if member.page_bytes else None)

    @property
    def width(self) -> int:
        """Channels of a key."""
        return self.memory.shape[1] if self.pages is None else self.pages.num_channels

    def read(self, rows: Tensor) -> Tensor:
        """Reads rows, int64 [...], and no others: [..., H]."""
        return self.memory[rows] if self.pages is None else self.pages.read(self.memory, rows, self.dtype)

    def write(self, rows_E: Tensor, keys_EH: Tensor) -> None:
        """Writes keys to rows, rounded to the memory's form."""
        if self.pages is None:
            self.memory[rows_E] = keys_EH
        else:
            self.pages.write(self.memory, rows_E, keys_EH)

    def bytes_of_rows(self) -> Tensor:
        """Returns the bytes of every row, uint8 [rows, bytes]."""
        return self.memory.view(torch.uint8) if self.pages is None else self.pages.bytes_of_rows(self.memory)

    def rounded(self, keys_EH: Tensor) -> Tensor:
        """Returns what ``read`` returns of keys once they are written."""
        return keys_EH if self.pages is None else self.pages.rounded(keys_EH)
