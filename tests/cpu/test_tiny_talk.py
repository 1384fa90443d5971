"""The embedded model's training data on thinking, tools and JSON, as ownpath encodes and reads it."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer

from ownpath.chat.answer import content_of
from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.markers import Special
from ownpath.chat.messages import Message, ToolCall
from ownpath.chat.parts import MalformedMarkup, Reasoning
from ownpath.chat.tokenizer import Tokenizer
from ownpath.loading import default_model_dir

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from tiny import answer_form, corpus, exam, facts, json_talk, random_names, tool_talk, toolbox  # noqa: E402
from tiny.batches import ANSWER, Encoder  # noqa: E402
from tiny.chat import Conversation, conversation_document  # noqa: E402
from tiny.question import group_name  # noqa: E402
from tiny.tool_talk import Wish  # noqa: E402

NUM_DRAWN = 150


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(default_model_dir())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(BackendTokenizer.from_file(str(default_model_dir() / "tokenizer.json")))


def call(rng: random.Random) -> Conversation:
    return tool_talk.call_talk(rng, Wish(rng.randint(1, 3), rng.random() < 0.5))


def call_with_results(rng: random.Random) -> Conversation:
    return tool_talk.call_talk(rng, Wish(rng.randint(1, 3), rng.random() < 0.5, with_results=True), "Be polite.")


def without_call(rng: random.Random) -> Conversation:
    return tool_talk.plain_talk(rng, Wish(thinking=rng.random() < 0.5))


def in_json(rng: random.Random) -> Conversation:
    return json_talk.json_talk(rng, json_talk.JsonWish(rng.random() < 0.5), "Be polite.")


def effort(rng: random.Random) -> Conversation:
    turns = [tool_talk.chat_without_tool(rng), tool_talk.chat_without_tool(rng)]
    return corpus.chat(turns, setting=Setting(True, rng.choice(tool_talk.EFFORT_TEXTS)))


MAKERS = (call, call_with_results, without_call, in_json, effort)


@pytest.mark.parametrize("make", MAKERS)
def test_prompts_are_the_encoders_token_by_token(
    make: Callable[[random.Random], Conversation], encoder: Encoder, tokenizer: Tokenizer
) -> None:
    rng = random.Random(11)
    for _ in range(NUM_DRAWN):
        talk = make(rng)
        ids, roles = encoder.encode(conversation_document(talk, last_only=True))
        prompt = tokenizer.encode_segments(encode_messages(talk.messages[:-1], talk.setting))
        assert ids[: len(prompt)] == prompt
        assert ANSWER not in roles[: len(prompt)]
        assert set(roles[len(prompt) :]) == {ANSWER}
        assert ids == tokenizer.encode_segments(encode_messages(talk.messages, talk.setting))


@pytest.mark.parametrize("make", MAKERS)
def test_taught_answers_are_read_back_whole(
    make: Callable[[random.Random], Conversation], encoder: Encoder, tokenizer: Tokenizer
) -> None:
    rng = random.Random(12)
    for _ in range(NUM_DRAWN):
        talk = make(rng)
        ids, roles = encoder.encode(conversation_document(talk, last_only=True))
        answer = [token for token, role in zip(ids, roles, strict=True) if role == ANSWER]
        assert answer_form.fault(tokenizer, talk.setting, answer) == ""
        parts = answer_form.read_answer(tokenizer, talk.setting, answer[:-1])
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == talk.answer.reasoning
        assert content_of(parts) == talk.answer.content
        calls = [(name, json.loads(text)) for name, text in answer_form.calls_of(parts)]
        assert calls == [(c.name, json.loads(c.arguments)) for c in talk.answer.tool_calls]
        assert not any(isinstance(part, MalformedMarkup) for part in parts)


def test_an_earlier_answer_is_learnt_only_where_its_prompt_was_the_same() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", "c"),
        Message("user", "d"),
        Message("assistant", "e", "f"),
    )
    tool = {"name": "t", "parameters": {"type": "object", "properties": {}}}

    def learnt(setting: Setting) -> str:
        document = conversation_document(Conversation(messages, setting))
        return "".join(piece.text for piece in document if piece.answer)

    end = "<｜end▁of▁sentence｜>"
    assert learnt(Setting()) == f"b{end}e{end}"
    assert learnt(Setting(thinking=True)) == f"f</think>e{end}"
    assert learnt(Setting(thinking=True, functions=(tool,))) == f"c</think>b{end}f</think>e{end}"


def test_calls_use_the_values_that_were_asked_for() -> None:
    rng = random.Random(13)
    for _ in range(NUM_DRAWN):
        talk = call(rng)
        ask = talk.messages[0].content
        offered = {function["name"]: function["parameters"]["properties"] for function in talk.setting.functions}
        assert 1 <= len(offered) <= 3
        places = []
        for made in talk.answer.tool_calls:
            arguments = json.loads(made.arguments)
            assert list(arguments) == list(offered[made.name])
            first = next(iter(arguments.values()))
            places.append(ask.index(str(first)))
            for value in arguments.values():
                assert {True: " on ", False: " off "}[value] if isinstance(value, bool) else str(value) in ask
        assert 1 <= len(places) <= 3


def test_a_question_without_its_tool_is_never_called_for() -> None:
    rng = random.Random(14)
    for _ in range(NUM_DRAWN):
        talk = without_call(rng)
        assert talk.setting.functions
        assert not talk.answer.tool_calls
        assert talk.answer.content
    for _ in range(NUM_DRAWN):
        assert tool_talk.chat_without_tool(rng).answer == facts.UNKNOWN


def test_results_are_told_in_the_order_of_the_calls() -> None:
    rng = random.Random(15)
    for _ in range(NUM_DRAWN):
        talk = call_with_results(rng)
        (calls,) = (m.tool_calls for m in talk.messages if m.tool_calls)
        values = [str(next(iter(json.loads(made.arguments).values()))) for made in calls]
        said = talk.answer.content
        assert {m.tool_call_id for m in talk.messages if m.role == "tool"} == {made.call_id for made in calls}
        places, start = [], 0
        for value, made in zip(values, calls, strict=True):
            if "search" in made.name or value not in said[start:]:
                continue  # what was searched for is not said again
            places.append(said.index(value, start))
            start = places[-1] + 1
        assert places == sorted(places)


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(16)
    new_names = {concept.names[-1] for concept in toolbox.CONCEPTS}
    new_keys = {parameter.names[-1] for concept in toolbox.CONCEPTS for parameter in concept.parameters}
    wording = [template.split("{p}")[0] for template in (tool_talk.NEW_QUESTION, tool_talk.NEW_ORDER)]
    for _ in range(600):
        talk = tool_talk.call_talk(rng, Wish(rng.randint(1, 3)))
        for function in talk.setting.functions:
            assert function["name"] not in new_names
            assert not new_keys & set(function["parameters"]["properties"])
        assert not talk.messages[0].content.startswith(tuple(wording))
        assert not tool_talk.draw_job(rng, rng.choice(toolbox.CONCEPTS)).held_out
    countries = {c.name for c in facts.countries() if json_talk.is_held_out(c)}
    assert 5 < len(countries) < 40
    keys = {names[-1] for names in json_talk._KEYS.values()}
    for _ in range(600):
        talk = json_talk.json_talk(rng, json_talk.JsonWish())
        answer = json.loads(talk.answer.content)
        assert not keys & set(answer)
        assert not countries & {value for value in answer.values() if isinstance(value, str)}


def test_made_up_names_are_never_those_held_out() -> None:
    concepts = toolbox.CONCEPTS
    spellings = {concept.names[-1] for concept in concepts} | {names[-1] for names in json_talk._KEYS.values()}
    spellings |= {parameter.names[-1] for concept in concepts for parameter in concept.parameters}
    assert spellings == random_names.NEVER_TRAINED
    rng = random.Random(19)
    names = {random_names.random_name(rng) for _ in range(5000)} | {
        random_names.extend_name(rng, "time") for _ in range(5000)
    }
    assert not names & spellings
    assert len(names) > 5000
    assert all(name.replace("_", "").isalpha() and name.isascii() for name in names)


def test_a_thought_about_a_tool_has_the_tokens_of_the_offer(encoder: Encoder) -> None:
    rng = random.Random(20)
    for _ in range(30):
        talk = tool_talk.call_talk(rng, Wish(1, thinking=True))
        name = talk.answer.tool_calls[0].name
        name_ids = encoder.text_ids(name)
        thought, offered = (encoder.text_ids(text) for text in (talk.answer.reasoning, json.dumps({"name": name})))
        for ids in (thought, offered):
            assert any(ids[place : place + len(name_ids)] == name_ids for place in range(len(ids)))


def test_the_held_out_questions_of_the_examination_are_new() -> None:
    asked = [question for question in exam.questions(seed=1) if question.group.startswith(("tools/", "json/"))]
    groups = {group_name(question) for question in asked}
    for form in ("chat", "thinking"):
        assert {f"tools/{form}/{name} calls" for name in ("two", "three")} <= groups
        assert {f"tools/{form}/{name} (held out)" for name in ("new jobs", "new names", "new wording")} <= groups
        assert {f"tools/{form}/no tool fits", f"tools/{form}/none offered"} <= groups
    new_names = {concept.names[-1] for concept in toolbox.CONCEPTS}
    for question in asked:
        if question.group.endswith("/new names") and question.setting.functions:
            assert {function["name"] for function in question.setting.functions} <= new_names
        assert question.answer


WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}}


def said(tokenizer: Tokenizer, message: Message, setting: Setting) -> list[int]:
    """The tokens of an answer, as the encoder writes it."""
    asked = [Message("user", "?")]
    prompt = encode_messages(asked, setting)
    return tokenizer.encode_segments(encode_messages([*asked, message], setting)[len(prompt) :])


@pytest.mark.parametrize(
    ("setting", "message", "fault"),
    [
        (Setting(), Message("assistant", "Hello"), ""),
        (Setting(), Message("assistant", ""), "nothing is said"),
        (Setting(thinking=True), Message("assistant", "Hello", "Why?"), ""),
        (Setting(thinking=True), Message("assistant", "Hello"), "no reasoning"),
        (Setting(thinking=True), Message("assistant", "", "Why?"), "nothing is said"),
        (Setting(functions=(WEATHER,)), Message("assistant", "Hello"), ""),
        (Setting(response_schema=SCHEMA), Message("assistant", '{"sum": 41}'), ""),
        (Setting(response_schema=SCHEMA), Message("assistant", '{"sum": 41'), "not JSON"),
        (Setting(response_schema=SCHEMA), Message("assistant", "41"), "no object"),
        (Setting(response_schema=SCHEMA), Message("assistant", '{"sum": "41"}'), "'sum' is no integer"),
        (Setting(response_schema=SCHEMA), Message("assistant", '{"sum": true}'), "'sum' is no integer"),
        (Setting(response_schema=SCHEMA), Message("assistant", '{"a": 1}'), "the keys ['a'], not ['sum']"),
        (Setting(response_schema={"type": "json_object"}), Message("assistant", "{}"), ""),
    ],
)
def test_faults_of_form_are_named(setting: Setting, message: Message, fault: str, tokenizer: Tokenizer) -> None:
    assert answer_form.fault(tokenizer, setting, said(tokenizer, message, setting)) == fault


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("weather", {"city": "Rome", "days": 3}, ""),
        ("weather", {"city": "Rome", "days": "3"}, "the arguments of 'weather': 'days' is no integer"),
        ("weather", {"city": "Rome"}, "the arguments of 'weather': the keys ['city'], not ['city', 'days']"),
        ("time", {"city": "Rome", "days": 3}, "a call of 'time', which is not on offer"),
    ],
)
def test_faults_of_calls_are_named(name: str, arguments: dict[str, object], fault: str, tokenizer: Tokenizer) -> None:
    setting = Setting(functions=(WEATHER,))
    message = Message("assistant", "", tool_calls=(ToolCall(name, json.dumps(arguments)),))
    assert answer_form.fault(tokenizer, setting, said(tokenizer, message, setting)) == fault


def test_an_answer_that_breaks_off_has_no_form(tokenizer: Tokenizer) -> None:
    setting = Setting(functions=(WEATHER,))
    whole = said(
        tokenizer, Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Rome", "days": 3}'),)), setting
    )
    assert answer_form.fault(tokenizer, setting, whole) == ""
    assert answer_form.fault(tokenizer, setting, whole[:-1]) == "no end"
    assert answer_form.fault(tokenizer, setting, [*whole[:-4], whole[-1]]) == "the answer ends inside the tool calls"
    thinking = Setting(thinking=True)
    ids = said(tokenizer, Message("assistant", "Hello", "Why?"), thinking)
    closing = tokenizer.special_id("</think>")
    assert answer_form.fault(tokenizer, thinking, [i for i in ids if i != closing]) == "reasoning is not closed once"
    # Without tools on offer, a call's marker has no place.
    assert answer_form.fault(tokenizer, Setting(), whole) == "a marker that has no place there"


def test_every_effort_text_of_every_release_is_taught() -> None:
    texts = {tool_talk.EFFORT_TEXTS.index(text) for text in tool_talk.EFFORT_TEXTS}
    assert len(texts) == 2
    rng = random.Random(17)
    seen = {corpus.request_document(rng)[1].text for _ in range(400)}
    assert all(any(found.startswith(text) for found in seen) for text in tool_talk.EFFORT_TEXTS)


def test_specials_in_the_documents_are_pieces_of_their_own() -> None:
    rng = random.Random(18)
    markers = {segment.text for segment in encode_messages([Message("user", "a")]) if isinstance(segment, Special)}
    for _ in range(50):
        for piece in corpus.tools_document(rng):
            assert piece.special or not any(marker in piece.text for marker in markers)
