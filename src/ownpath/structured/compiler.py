"""Compiles grammars once each: tried in a process of its own, then kept, refusals too, as far as there is room."""

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from ownpath.structured.errors import GrammarQueueFull, GrammarRefused
from ownpath.structured.grammar import Grammar, compile_grammar
from ownpath.structured.vocabulary import Vocabulary, library_tokenizer
from ownpath.structured.warden import TrialProcess

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT = 128
MAX_KEPT_CHARS = 8 * 2**20
"""Grammars that are kept, and their texts together."""
WAIT_S = 2.0
"""Time that a grammar may wait for others to be compiled."""


class GrammarCompiler:
    """Compiled grammars for one vocabulary. May be asked by several threads; they compile one after the other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = library_tokenizer(vocabulary)
        self._trial = TrialProcess(vocabulary)
        self._kept: OrderedDict[Grammar, LLMatcher | GrammarRefused] = OrderedDict()
        self._turn, self._lock = threading.Lock(), threading.Lock()

    def start(self) -> None:
        """Starts the process that tries grammars."""
        with self._turn:
            self._trial.start()

    def matcher(self, grammar: Grammar) -> "LLMatcher":
        """Returns a matcher of its own for one answer. Errors: GrammarRefused, GrammarQueueFull."""
        known = self.kept(grammar)
        if known is None:
            if not self._turn.acquire(timeout=WAIT_S):
                raise GrammarQueueFull("too many new grammars are waiting to be compiled")
            try:
                known = self.kept(grammar) or self._compile(grammar)
            finally:
                self._turn.release()
        if isinstance(known, GrammarRefused):
            raise GrammarRefused(str(known))
        return known.deep_copy()

    def kept(self, grammar: Grammar) -> "LLMatcher | GrammarRefused | None":
        """Returns what is known of a grammar without any work; ``None``: nothing."""
        with self._lock:
            known = self._kept.get(grammar)
            if known is not None:
                self._kept.move_to_end(grammar)
            return known

    def close(self) -> None:
        """Ends the process that tries grammars."""
        with self._turn:
            self._trial.close()

    def _compile(self, grammar: Grammar) -> "LLMatcher | GrammarRefused":
        found: LLMatcher | GrammarRefused
        try:
            found = compile_grammar(self._tokenizer, self._trial.judge(grammar))
        except GrammarRefused as error:
            found = error
            if error.is_for_now:
                return found
        with self._lock:
            self._kept[grammar] = found
            while len(self._kept) > MAX_KEPT or sum(len(one.text) for one in self._kept) > MAX_KEPT_CHARS:
                self._kept.popitem(last=False)
        return found
