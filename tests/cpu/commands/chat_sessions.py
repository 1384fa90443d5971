"""Sessions for ``ownpath chat`` around a model whose answers the test writes."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu.chat.small_tokenizer import ASSISTANT_ID, NUM_TOKENS, small_tokenizer
from cpu.engine.fake_model import EOS_ID, FakeModel

from ownpath.chat.markers import segments_of
from ownpath.commands import session
from ownpath.commands.session import Session
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.trace import Ledger

TOKENIZER = small_tokenizer()
VOCAB = NUM_TOKENS + 7


class Scripted(FakeModel):
    """Answers each prompt with the next text, markers meant. prompts: what it read.

    A text that ends in an ellipsis is said over and over; one that is empty fails the request.
    """

    def __init__(self, *texts: str, max_model_len: int = 256) -> None:
        super().__init__(self._logits, VOCAB, max_model_len)
        self.prompts: list[tuple[int, ...]] = []
        self._texts = texts

    def read(self, number: int) -> str:
        """Returns what it read before an answer."""
        return b"".join(TOKENIZER.token_bytes(i) for i in self.prompts[number]).decode()

    def _logits(self, history: tuple[int, ...]) -> torch.Tensor:
        opening = len(history) - history[::-1].index(ASSISTANT_ID) + 1
        if opening == len(history):
            self.prompts.append(history)
        text = self._texts[len(self.prompts) - 1]
        if not text:
            return torch.full((VOCAB,), torch.nan)
        ids = TOKENIZER.encode_segments(segments_of(text.removesuffix("...")))
        position = len(history) - opening
        if text.endswith("..."):
            position %= len(ids)
        token_id = ids[position] if position < len(ids) else EOS_ID
        return torch.nn.functional.one_hot(torch.tensor(token_id), VOCAB).float() * 30


def serve_session(patch: pytest.MonkeyPatch, model: FakeModel, folder: Path, ledger: Ledger | None = None) -> None:
    """Has every command load this model, whatever it is asked for."""

    @contextlib.contextmanager
    def opened(args: argparse.Namespace, max_num_seqs: int, _prefix: object = None) -> Iterator[Session]:
        engine = Engine(model, EngineConfig(max_model_len=model.max_model_len, max_num_seqs=1), NUM_TOKENS)
        engine.start()
        try:
            yield Session(folder, TOKENIZER, engine, ledger or Ledger({}), (), model.config)
        finally:
            engine.stop()

    patch.setattr(session, "open_session", opened)
