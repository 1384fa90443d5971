"""Clients of ``/v1/responses`` and ``/v1/messages`` against a real server. One that is not installed is skipped, by
name."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::UserWarning")]

QUESTION, CAPITAL = "What is the capital of France?", "The capital of France is Paris."
WEATHER, RESULT = "What is the weather in Rome?", "18 degrees"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = {"name": "get_weather", "description": "Get the weather in a city."}
FUNCTION: dict[str, Any] = {"type": "function", **ABOUT, "parameters": CITY, "strict": False}
TOOL: dict[str, Any] = {**ABOUT, "input_schema": CITY}
REQUESTS = Path(__file__).parents[1] / "golden/requests"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client calls home, or finds a key that is not meant."""
    for vendor in ("OPENAI", "ANTHROPIC"):
        for name in ("API_KEY", "BASE_URL", "AUTH_TOKEN"):
            monkeypatch.delenv(f"{vendor}_{name}", raising=False)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return RESULT


class TestResponses:
    @pytest.fixture
    def client(self, served: Any) -> Any:
        return pytest.importorskip("openai").OpenAI(base_url=served.url, api_key="x", max_retries=0)

    def test_a_text(self, client: Any) -> None:
        answer = client.responses.create(model="tiny-v4", input=QUESTION, temperature=0, metadata={"a": "b"})
        assert answer.output_text == CAPITAL
        assert (answer.status, answer.metadata, answer.usage.input_tokens_details.cached_tokens) == (
            "completed",
            {"a": "b"},
            0,
        )

    @pytest.mark.parametrize("summary", [None, "auto"])
    def test_an_agents_turn_without_anything_stored(self, client: Any, summary: str | None) -> None:
        """The items of the answer are sent back as the SDK holds them."""
        fields = {"model": "tiny-v4", "tools": [FUNCTION, {"type": "web_search"}], "temperature": 0, "store": False}
        fields |= {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": summary}}
        items: list[Any] = [{"role": "user", "content": WEATHER}]
        first = client.responses.create(input=items, **fields)
        thought, call = first.output
        assert thought.type == "reasoning"
        assert thought.encrypted_content
        assert json.loads(call.arguments) == {"city": "Rome"}
        items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
        second = client.responses.create(input=items, **fields)
        assert second.output[-1].type == "message"
        assert second.usage.input_tokens > first.usage.input_tokens

    def test_the_helper_for_streams(self, client: Any) -> None:
        with client.responses.stream(model="tiny-v4", input=WEATHER, tools=[FUNCTION], temperature=0) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert kinds[-1] == "response.completed"
        assert json.loads(final.output[-1].arguments) == {"city": "Rome"}

    def test_streamed_text_with_log_probabilities(self, client: Any) -> None:
        include = ["message.output_text.logprobs"]
        events = list(
            client.responses.create(model="tiny-v4", input=QUESTION, temperature=0, stream=True, include=include)
        )
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert "".join(event.delta for event in deltas) == CAPITAL
        assert all(event.logprobs[0].logprob <= 0 for event in deltas)

    def test_refusals_are_the_sdks_errors(self, client: Any) -> None:
        openai = pytest.importorskip("openai")
        with pytest.raises(openai.BadRequestError, match="keeps nothing of earlier requests"):
            client.responses.create(model="tiny-v4", input="x", previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="other", input="x")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_1")

    def test_a_coding_agents_request(self, client: Any) -> None:
        """As one agent of November 2026 sends it: developer's items, hosted tools, nothing stored."""
        body = json.loads((REQUESTS / "responses_agent.json").read_text(encoding="utf-8"))
        more = {"client_metadata": body.pop("client_metadata")}
        raw = client.responses.with_raw_response.create(
            **body | {"model": "tiny-v4", "max_output_tokens": 32}, extra_body=more
        )
        ignored = set(raw.headers["X-Ownpath-Ignored"].split(", "))
        assert {"store", "client_metadata", "tools.web_search", "tools.image_generation"} <= ignored
        *_, last = raw.parse()
        assert last.type in ("response.completed", "response.incomplete")

    def test_langchain(self, served: Any) -> None:
        module, messages = pytest.importorskip("langchain_openai"), pytest.importorskip("langchain_core.messages")
        chat = module.ChatOpenAI(
            model="tiny-v4", base_url=served.url, api_key="x", temperature=0, use_responses_api=True
        )
        assert chat.invoke(QUESTION).text == CAPITAL
        assert "".join(part.text for part in chat.stream(QUESTION)) == CAPITAL
        bound, history = chat.bind_tools([get_weather], strict=False), [messages.HumanMessage(WEATHER)]
        answer = bound.invoke(history)
        (call,) = answer.tool_calls
        assert call["args"] == {"city": "Rome"}
        history += [answer, messages.ToolMessage(RESULT, tool_call_id=call["id"])]
        assert "degrees" in bound.invoke(history).text

    def test_openai_agents_at_their_default_model(self, served: Any) -> None:
        agents = pytest.importorskip("agents")
        agents.set_tracing_disabled(True)
        client = pytest.importorskip("openai").AsyncOpenAI(base_url=served.url, api_key="x")
        model = agents.OpenAIResponsesModel(model="tiny-v4", openai_client=client)
        agent = agents.Agent(
            name="a",
            instructions="Be brief.",
            model=model,
            model_settings=agents.ModelSettings(temperature=0),
            tools=[agents.function_tool(get_weather, strict_mode=False)],
        )
        assert "degrees" in agents.Runner.run_sync(agent, WEATHER).final_output

    def test_pydantic_ai(self, served: Any) -> None:
        pydantic_ai, models = pytest.importorskip("pydantic_ai"), pytest.importorskip("pydantic_ai.models.openai")
        provider = pytest.importorskip("pydantic_ai.providers.openai").OpenAIProvider(base_url=served.url, api_key="x")
        agent = pydantic_ai.Agent(
            models.OpenAIResponsesModel("tiny-v4", provider=provider), model_settings={"temperature": 0}
        )
        first = agent.run_sync(QUESTION)
        assert first.output == CAPITAL
        assert agent.run_sync(QUESTION, message_history=first.all_messages()).output


class TestMessages:
    @pytest.fixture
    def client(self, served: Any) -> Any:
        url = served.url.removesuffix("/v1")
        return pytest.importorskip("anthropic").Anthropic(base_url=url, api_key="x", max_retries=0)

    def test_a_text(self, client: Any) -> None:
        asked = [{"role": "user", "content": QUESTION}]
        answer = client.messages.create(model="tiny-v4", max_tokens=64, messages=asked, extra_body={"temperature": 0})
        assert answer.content[0].text == CAPITAL
        assert (answer.stop_reason, answer.usage.input_tokens) == (
            "end_turn",
            client.messages.count_tokens(model="tiny-v4", messages=asked).input_tokens,
        )
        assert answer._request_id

    @pytest.mark.parametrize("display", ["summarized", "omitted"])
    def test_an_agents_turn_by_the_helper_for_streams(self, client: Any, display: str) -> None:
        """The blocks of the answer are sent back as the SDK holds them, and what it adds is read."""
        fields: dict[str, Any] = {
            "model": "tiny-v4",
            "max_tokens": 200,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "tools": [TOOL],
            "thinking": {"type": "adaptive", "display": display},
            "betas": ["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "metadata": {"user_id": "u"},
            "extra_body": {"temperature": 0},
        }
        messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": WEATHER}]}]
        with client.beta.messages.stream(messages=messages, **fields) as stream:
            first = stream.get_final_message()
        thought, call = first.content
        assert bool(thought.thinking) == (display == "summarized")
        assert thought.signature
        assert (first.stop_reason, call.input, first.context_management.applied_edits) == (
            "tool_use",
            {"city": "Rome"},
            [],
        )
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": RESULT}]}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = client.beta.messages.create(messages=messages, **fields)
        assert second.stop_reason == "end_turn"
        assert second.content[-1].type == "text"

    def test_raw_events(self, client: Any) -> None:
        asked = [{"role": "user", "content": QUESTION}]
        stream = client.messages.create(
            model="tiny-v4", max_tokens=64, messages=asked, stream=True, extra_body={"temperature": 0}
        )
        events = list(stream)
        text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
        assert text == CAPITAL
        assert [events[0].type, events[-2].type, events[-1].type] == ["message_start", "message_delta", "message_stop"]
        assert events[-2].usage.output_tokens > 0

    def test_refusals_are_the_sdks_errors(self, client: Any) -> None:
        anthropic = pytest.importorskip("anthropic")
        asked = [{"role": "user", "content": "x"}]
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            client.messages.create(model="other", max_tokens=1, messages=asked)
        image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0\.type") as refused:
            client.messages.create(model="tiny-v4", max_tokens=1, messages=[{"role": "user", "content": [image]}])
        assert refused.value.request_id

    def test_a_coding_agents_request(self, client: Any) -> None:
        """As one agent of November 2026 sends it: blocks with cache marks, beta headers, edits of the context."""
        body = json.loads((REQUESTS / "messages_agent.json").read_text(encoding="utf-8"))
        raw = client.beta.messages.with_raw_response.create(**body | {"model": "tiny-v4", "max_tokens": 32})
        ignored = set(raw.headers["X-Ownpath-Ignored"].split(", "))
        assert {"metadata", "context_management", "system.cache_control", "messages.content.cache_control"} <= ignored
        *_, last = raw.parse()
        assert last.type == "message_stop"

    def test_litellm(self, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm = pytest.importorskip("litellm")
        fields = {"model": "anthropic/tiny-v4", "api_base": served.url.removesuffix("/v1"), "api_key": "x"}
        fields |= {"temperature": 0, "max_tokens": 64}
        messages = [{"role": "user", "content": QUESTION}]
        assert litellm.completion(messages=messages, **fields).choices[0].message.content == CAPITAL
        parts = litellm.completion(messages=messages, stream=True, **fields)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == CAPITAL
        tool = {"type": "function", "function": {**ABOUT, "parameters": CITY}}
        asked = [{"role": "user", "content": WEATHER}]
        (call,) = litellm.completion(messages=asked, tools=[tool], **fields).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}

    def test_pydantic_ai(self, served: Any) -> None:
        pydantic_ai, models = pytest.importorskip("pydantic_ai"), pytest.importorskip("pydantic_ai.models.anthropic")
        client = pytest.importorskip("anthropic").AsyncAnthropic(base_url=served.url.removesuffix("/v1"), api_key="x")
        provider = pytest.importorskip("pydantic_ai.providers.anthropic").AnthropicProvider(anthropic_client=client)
        model = models.AnthropicModel("tiny-v4", provider=provider)
        settings = {"extra_body": {"temperature": 0}}
        assert pydantic_ai.Agent(model, model_settings=settings).run_sync(QUESTION).output == CAPITAL
        assert (
            "degrees" in pydantic_ai.Agent(model, tools=[get_weather], model_settings=settings).run_sync(WEATHER).output
        )
