"""Names of tokens in log-probabilities."""

from dataclasses import dataclass

from ownpath.chat.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenNaming:
    """Names tokens by their text, or with ``by_id`` as ``token_id:N``, which tells equal texts apart."""

    tokenizer: Tokenizer
    by_id: bool

    def name(self, token_id: int) -> str:
        """Returns a token's name."""
        return f"token_id:{token_id}" if self.by_id else self.tokenizer.token_text(token_id)
