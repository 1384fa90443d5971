"""Two hundred random schemas, each answered by the embedded model: every answer that ends fits its schema."""

import json
import queue
from collections import Counter

import jsonschema
import pytest
from support.random_schemas import SchemaMaker

from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.loading import default_model_dir, load_model
from ownpath.structured.compiler import GrammarCompiler
from ownpath.structured.grammar import Grammar, GrammarKind, schema_rule
from ownpath.structured.matcher import AnswerMatcher, FreeMasks
from ownpath.structured.vocabulary import Vocabulary

pytestmark = pytest.mark.schemas
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid"])
"""Times it would judge by an old draft."""
NUM_SCHEMAS, MAX_TOKENS, WAIT_S = 200, 400, 600


def test_every_answer_that_ends_fits_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_folder(default_model_dir())
    tokens = [tokenizer.token_bytes(idx) for idx in range(tokenizer.num_tokens)]
    vocabulary = Vocabulary(tokens, tuple(sorted(tokenizer.marker_ids)), (tokenizer.eos_id,))
    compiler, masks = GrammarCompiler(vocabulary), FreeMasks(vocabulary)
    config = EngineConfig("cpu", max_model_len=1024, max_num_seqs=32)
    engine = Engine(load_model(default_model_dir(), config), config, tokenizer.num_tokens)
    engine.start()
    schemas = [SchemaMaker(seed).make() for seed in range(NUM_SCHEMAS)]
    heard: list[queue.SimpleQueue[StepOutput]] = [queue.SimpleQueue() for _ in schemas]
    # Something that closes is a little likelier, so that most answers of so small a model end.
    closing = tuple((tokenizer.encode_text(text)[0], 3.0) for text in ('"', "}", "]", ","))
    try:
        for seed, schema in enumerate(schemas):
            grammar = compiler.matcher(Grammar(GrammarKind.LARK, f"start: {schema_rule(schema)}"))
            params = SamplingParams(MAX_TOKENS, temperature=1.0 * (seed % 2), seed=seed, logit_bias=closing)
            prompt = tokenizer.encode_raw(f"JSON {seed}: ")
            request = Request(prompt, params, heard[seed].put, matcher=AnswerMatcher(masks, grammar))
            engine.submit([request])
        ended: Counter[str] = Counter()
        for schema, outputs in zip(schemas, heard, strict=True):
            ids, reason = read(outputs)
            ended[reason.value] += 1
            if reason is FinishReason.STOP:
                text = tokenizer.join_bytes(ids, show_hidden=False).decode()
                judge = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
                judge.validate(json.loads(text))
    finally:
        engine.stop()
        compiler.close()
    with capsys.disabled():
        print(f"\n{NUM_SCHEMAS} schemas: {ended['stop']} answers ended, and fit; {ended['length']} met their limit")
    assert ended["error"] == 0
    assert ended["stop"] > NUM_SCHEMAS // 2


def read(outputs: "queue.SimpleQueue[StepOutput]") -> tuple[list[int], FinishReason]:
    ids: list[int] = []
    while True:
        output = outputs.get(timeout=WAIT_S)
        assert output.error is None, output.error
        ids += [output.token.token_id] if output.token else []
        if output.finish_reason is not None:
            return ids, output.finish_reason
