"""Computes our own log-probs of the same token ids, and knows which tokens our tokenizer calls special."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.chat.markers import THINK_END, THINK_START
from ownpath.chat.tokenizer import Tokenizer
from ownpath.diff.responses import ScoredPosition, SequenceReading
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model


@dataclass(frozen=True)
class LocalModel:
    """The model here, which is taken as right."""

    model: Model
    tokenizer: Tokenizer

    def logprobs(self, reading: SequenceReading) -> torch.Tensor:
        """Returns the log-probs of every token at the reading's positions, on the CPU: [P, V], float32.

        One forward over the sequence, in a fresh cache. Errors: ValueError when the sequence does not fit, or when a
        logit or an index score is not finite.
        """
        ids = list(reading.ids)
        if len(ids) > self.model.cache_spec.max_tokens:
            raise ValueError(f"a sequence of {len(ids)} tokens; --max-model-len {self.model.cache_spec.max_tokens}")
        batch = ForwardBatch.of([(ids, self.model.new_cache())], self.model.cache_spec.device, all_logits=True)
        logits_TV = self.model.forward(batch)[:, : self.tokenizer.num_tokens].float()
        if not bool(torch.isfinite(logits_TV).all()):
            raise ValueError("our own model gives logits that are not finite; nothing can be compared with them")
        if bool(batch.tables.flags_LT.any()):
            raise ValueError(
                "our own model's indexer gives scores that are not finite; nothing can be compared with it"
            )
        # Row n is of the token after ids[n].
        first = reading.start - 1
        rows: torch.Tensor = logits_TV.log_softmax(-1)[first : first + max(len(reading.scored), 1)].cpu()
        return rows

    def is_special(self, token_id: int | None) -> bool:
        return token_id is not None and self.tokenizer.is_hidden(token_id)

    def likelihood(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> float:
        """Returns the log-prob of ``ids`` after a prompt, in nats. Errors: as ``logprobs``."""
        blanks = tuple(ScoredPosition(i, None, {}) for i in ids)
        rows_PV = self.logprobs(SequenceReading((*prompt_ids, *ids), len(prompt_ids), blanks))
        return float(rows_PV.gather(1, torch.tensor(ids).unsqueeze(1)).sum())

    def shown_text(self, ids: Sequence[int]) -> str:
        """Returns the text of generated tokens as a server would show it: no markers, no unfinished character."""
        hidden = {self.tokenizer.special_id(THINK_START), self.tokenizer.special_id(THINK_END)}
        shown = (i for i in ids if i not in hidden and not self.tokenizer.is_hidden(i))
        return b"".join(map(self.tokenizer.token_bytes, shown)).decode("utf-8", "ignore")
