"""Compiles what requests ask their answers to fit, off the event loop, and hands out a matcher for each answer."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ownpath.chat.tokenizer import Tokenizer
from ownpath.server.answer_grammars import AnswerGrammar
from ownpath.server.errors import bad_request, overloaded
from ownpath.structured.compiler import GrammarCompiler
from ownpath.structured.errors import GrammarQueueFull, GrammarRefused, NoGrammarLibrary
from ownpath.structured.matcher import AnswerMatcher, FreeMasks
from ownpath.structured.vocabulary import Vocabulary, load_library

_NUM_THREADS = 4


@dataclass
class GrammarDesk:
    """The grammars of one server. end_ids: tokens that end an answer."""

    tokenizer: Tokenizer
    end_ids: frozenset[int]
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_NUM_THREADS, "ownpath-grammars"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _compiler: GrammarCompiler | None = None
    _masks: FreeMasks | None = None

    def warm_up(self) -> None:
        """Makes the compiler ready in the background, if its library is installed."""
        self._threads.submit(self._ready_compiler)

    async def matchers(self, wanted: AnswerGrammar | None, count: int, ignores_end: bool) -> list[AnswerMatcher | None]:
        """Returns a matcher for each of ``count`` answers; nothing is asked: ``None`` for each.

        ignores_end: end tokens come only where nothing else may follow.
        Errors: ApiError 400 naming the field, or what is not installed here; 429.
        """
        if wanted is None:
            return [None] * count
        try:
            load_library()
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._threads, self._make, wanted, count, ignores_end)
            return list(made)
        except GrammarRefused as error:
            raise wanted.refusal(error) from None
        except GrammarQueueFull as error:
            raise overloaded(str(error)) from None
        except NoGrammarLibrary as error:
            raise bad_request(f"{wanted.param}: {error}", wanted.param, "unsupported_parameter") from None

    def close(self) -> None:
        """Ends threads and processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()

    def _make(self, wanted: AnswerGrammar, count: int, ignores_end: bool) -> list[AnswerMatcher]:
        compiler = self._ready_compiler()
        assert self._masks is not None
        grammars = [compiler.matcher(wanted.grammar) for _ in range(count)]
        return [AnswerMatcher(self._masks, grammar, wanted.free, ignores_end) for grammar in grammars]

    def _ready_compiler(self) -> GrammarCompiler:
        """Returns the compiler, made at the first call. Errors: NoGrammarLibrary."""
        with self._lock:
            if self._compiler is None:
                known = range(self.tokenizer.num_tokens)
                ends = sorted(idx for idx in self.end_ids if idx in known) or [self.tokenizer.eos_id]
                tokens = [self.tokenizer.token_bytes(idx) for idx in known]
                markers = tuple(sorted({*self.tokenizer.marker_ids, *ends}))
                vocabulary = Vocabulary(tokens, markers, tuple(ends))
                self._masks, self._compiler = FreeMasks(vocabulary), GrammarCompiler(vocabulary)
                self._compiler.start()
            return self._compiler
