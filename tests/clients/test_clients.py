"""Public clients against a real server, at their defaults: what they promise their callers, strict tools and output by
a schema, the server enforces. A client that is not installed is skipped, by name."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::UserWarning")]

QUESTION, CAPITAL = "What is the capital of France?", "The capital of France is Paris."
WEATHER, RESULT = "What is the weather in Rome?", "18 degrees"
AGENT = json.loads((Path(__file__).parents[1] / "golden/requests/coding_agent.json").read_text(encoding="utf-8"))
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client calls home."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"OTEL_SDK_DISABLED": "true", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}.items():
        monkeypatch.setenv(name, value)


class Unit(StrEnum):
    """The units that a strict tool leaves the model to choose from."""

    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Weather:
    """A tool that remembers what it was asked."""

    def __init__(self) -> None:
        self.cities: list[str] = []

    def function(self) -> Any:
        """Returns the tool as a plain function, as frameworks want it."""

        def get_weather(city: str) -> str:
            """Get the weather in a city."""
            self.cities.append(city)
            return RESULT

        return get_weather


@pytest.fixture
def weather() -> Weather:
    return Weather()


@pytest.fixture
def city() -> Any:
    """The output that callers ask for: one field, a string."""
    return pytest.importorskip("pydantic").create_model("City", capital=(str, ...))


class TestOpenAI:
    @pytest.fixture
    def client(self, served: Any) -> Any:
        return pytest.importorskip("openai").OpenAI(base_url=served.url, api_key="x")

    def test_chat(self, client: Any) -> None:
        answer = client.chat.completions.create(model="tiny-v4", messages=[{"role": "user", "content": QUESTION}])
        assert answer.choices[0].message.content
        assert answer.system_fingerprint.startswith("ownpath-")
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
        assert answer.choices[0].message.reasoning is None, "an attribute that vLLM's clients read"

    def test_stream(self, client: Any) -> None:
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(
                model="gpt-4o",
                messages=messages,
                temperature=0,
                stream=True,
                stream_options=options,
                store=True,
                user="u",
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == CAPITAL
        assert chunks[-1].usage.completion_tokens > 0

    def test_the_request_that_started_this_project(self, client: Any, served: Any) -> None:
        stream = client.completions.create(
            model=served.model, prompt="The capital of France is", stream=True, max_tokens=10, temperature=0
        )
        assert "Paris" in "".join(chunk.choices[0].text for chunk in stream)

    def test_tools(self, client: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": WEATHER}]
        first = client.chat.completions.create(model="tiny-v4", messages=messages, tools=[TOOL], temperature=0)
        message = first.choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": RESULT}]
        second = client.chat.completions.create(model="tiny-v4", messages=messages, tools=[TOOL], temperature=0)
        assert "degrees" in second.choices[0].message.content

    def test_the_helper_for_streams(self, client: Any) -> None:
        messages = [{"role": "user", "content": WEATHER}]
        with client.chat.completions.stream(model="tiny-v4", messages=messages, tools=[TOOL], temperature=0) as stream:
            final = stream.get_final_completion()
        (call,) = final.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        again = [
            *messages,
            final.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": RESULT},
        ]
        answer = client.chat.completions.create(model="tiny-v4", messages=again, tools=[TOOL], temperature=0)
        assert answer.choices[0].finish_reason == "stop"

    def test_an_answer_of_the_sdk_can_be_sent_back_whole(self, client: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        first = client.chat.completions.create(model="tiny-v4", messages=messages, reasoning_effort="medium")
        assert first.reasoning_effort == "high"
        again = [*messages, first.choices[0].message.to_dict(), {"role": "user", "content": QUESTION}]
        second = client.chat.completions.create(model="tiny-v4", messages=again, reasoning_effort="minimal")
        assert second.choices[0].message.reasoning_content

    def test_parse(self, client: Any, city: Any) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.parse(model="tiny-v4", messages=messages, response_format=city, temperature=0)
        assert isinstance(answer.choices[0].message.parsed, city)

    def test_parse_of_a_stream(self, client: Any, city: Any) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        asked = {"model": "tiny-v4", "messages": messages, "response_format": city, "temperature": 0}
        with client.chat.completions.stream(**asked) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, city)

    def test_parse_of_strict_tools(self, client: Any) -> None:
        openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
        arguments = pydantic.create_model("get_weather", city=(str, ...), unit=(Unit, ...))
        tool = openai.pydantic_function_tool(arguments)
        assert tool["function"]["strict"] is True
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            answer = client.chat.completions.parse(
                model="tiny-v4",
                messages=[{"role": "user", "content": WEATHER}],
                tools=[tool],
                tool_choice=choice,
                temperature=0,
            )
            calls = answer.choices[0].message.tool_calls
            assert calls
            assert all(isinstance(call.function.parsed_arguments, arguments) for call in calls)

    def test_a_coding_agents_request(self, client: Any) -> None:
        fields = {name: value for name, value in AGENT.items() if value is not None}
        raw = client.chat.completions.with_raw_response.create(**fields | {"model": "tiny-v4"})
        ignored = raw.headers["X-Ownpath-Ignored"].split(", ")
        assert {"prompt_cache_key", "metadata", "messages.tool_calls.index", "tools.cache_control"} <= set(ignored)
        assert "max_tokens=" in raw.headers["X-Ownpath-Adjusted"], "32000 tokens do not fit"
        assert "reasoning_effort=high" in raw.headers["X-Ownpath-Adjusted"]
        *_, last = raw.parse()
        assert last.usage.completion_tokens > 0


class TestLangChain:
    @pytest.fixture
    def chat(self, served: Any) -> Any:
        module = pytest.importorskip("langchain_openai")
        return module.ChatOpenAI(model="tiny-v4", base_url=served.url, api_key="x", temperature=0)

    def test_chat(self, chat: Any) -> None:
        assert chat.invoke(QUESTION).content == CAPITAL
        assert "".join(part.content for part in chat.stream(QUESTION)) == CAPITAL

    def test_bind_tools(self, chat: Any, weather: Weather) -> None:
        messages = pytest.importorskip("langchain_core.messages")
        bound = chat.bind_tools([weather.function()])
        history = [messages.HumanMessage(WEATHER)]
        answer = bound.invoke(history)
        (call,) = answer.tool_calls
        assert call["args"] == {"city": "Rome"}
        history += [answer, messages.ToolMessage(RESULT, tool_call_id=call["id"], name="get_weather")]
        assert "degrees" in bound.invoke(history).content

    @pytest.mark.parametrize("options", [{"strict": True}, {"tool_choice": "any"}, {"tool_choice": "get_weather"}])
    def test_bound_tools_are_called_as_asked(self, chat: Any, weather: Weather, options: dict[str, Any]) -> None:
        answer = chat.bind_tools([weather.function()], **options).invoke(WEATHER)
        assert not answer.invalid_tool_calls
        assert [call["name"] for call in answer.tool_calls] == ["get_weather"]
        assert [list(call["args"]) for call in answer.tool_calls] == [["city"]]

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, chat: Any, city: Any, method: str) -> None:
        """json_schema is the default."""
        options = {} if method == "json_schema" else {"method": method}
        assert isinstance(chat.with_structured_output(city, **options).invoke(QUESTION), city)


class TestLiteLLM:
    @pytest.fixture
    def complete(self, served: Any) -> Any:
        litellm = pytest.importorskip("litellm")
        litellm.suppress_debug_info = True
        return lambda **fields: litellm.completion(
            model="openai/tiny-v4", api_base=served.url, api_key="x", temperature=0, **fields
        )

    def test_chat(self, complete: Any) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        assert complete(messages=messages, metadata={"a": "b"}, user="u").choices[0].message.content == CAPITAL
        parts = complete(messages=messages, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == CAPITAL

    def test_tools(self, complete: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": WEATHER}]
        message = complete(messages=messages, tools=[TOOL]).choices[0].message
        (call,) = message.tool_calls
        again = [
            *messages,
            message,
            {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": RESULT},
        ]
        assert "degrees" in complete(messages=again, tools=[TOOL]).choices[0].message.content
        dumped = [*messages, message.model_dump(), again[-1]]
        assert "degrees" in complete(messages=dumped, tools=[TOOL]).choices[0].message.content

    def test_output_by_a_schema(self, complete: Any, city: Any) -> None:
        answer = complete(messages=[{"role": "user", "content": QUESTION}], response_format=city)
        city.model_validate_json(answer.choices[0].message.content)


class TestLlamaIndex:
    @pytest.fixture
    def llm(self, served: Any) -> Any:
        module = pytest.importorskip("llama_index.llms.openai_like")
        return lambda **fields: module.OpenAILike(model="tiny-v4", api_base=served.url, api_key="x", **fields)

    def test_complete_and_chat(self, llm: Any) -> None:
        core = pytest.importorskip("llama_index.core.llms")
        assert llm().complete("The capital of France is").text
        messages = [core.ChatMessage(role="user", content=QUESTION)]
        assert llm(is_chat_model=True, temperature=0).chat(messages).message.content == CAPITAL
        *_, last = llm(is_chat_model=True, temperature=0).stream_chat(messages)
        assert last.message.content == CAPITAL

    def test_tools(self, llm: Any, weather: Weather) -> None:
        tool = pytest.importorskip("llama_index.core.tools").FunctionTool.from_defaults(weather.function())
        model = llm(is_chat_model=True, is_function_calling_model=True, temperature=0)
        answer = model.chat_with_tools([tool], user_msg=WEATHER)
        (call,) = model.get_tool_calls_from_response(answer)
        assert set(call.tool_kwargs) == {"city"}, "the model is small: which city is not asked here"

    def test_structured_output(self, llm: Any, city: Any) -> None:
        """By a tool, called because it is required, or by a schema."""
        model = llm(is_chat_model=True, is_function_calling_model=True, temperature=0)
        assert isinstance(model.as_structured_llm(city).complete(QUESTION).raw, city)
        other = llm(is_chat_model=True, should_use_structured_outputs=True, temperature=0)
        assert isinstance(other.as_structured_llm(city).complete(QUESTION).raw, city)


class TestInstructor:
    @pytest.mark.parametrize("mode", [None, "JSON_SCHEMA", "TOOLS_STRICT"])
    def test_a_model_comes_back(self, served: Any, city: Any, mode: str | None) -> None:
        """The default is a tool whose name the request gives."""
        instructor = pytest.importorskip("instructor")
        client = pytest.importorskip("openai").OpenAI(base_url=served.url, api_key="x")
        options = {} if mode is None else {"mode": instructor.Mode[mode]}
        found = instructor.from_openai(client, **options).chat.completions.create(
            model="tiny-v4",
            messages=[{"role": "user", "content": QUESTION}],
            response_model=city,
            temperature=0,
            max_retries=0,
        )
        assert isinstance(found, city)


class TestPydanticAI:
    @pytest.fixture
    def model(self, served: Any) -> Any:
        models = pytest.importorskip("pydantic_ai.models.openai")
        provider = pytest.importorskip("pydantic_ai.providers.openai").OpenAIProvider(base_url=served.url, api_key="x")
        return lambda **fields: models.OpenAIChatModel("tiny-v4", provider=provider, **fields)

    def test_without_tools(self, model: Any) -> None:
        agent = pytest.importorskip("pydantic_ai").Agent(model(), model_settings={"temperature": 0})
        first = agent.run_sync(QUESTION)
        assert first.output == CAPITAL
        assert agent.run_sync(QUESTION, message_history=first.all_messages()).output

    def test_with_tools(self, model: Any, weather: Weather) -> None:
        pydantic_ai = pytest.importorskip("pydantic_ai")
        agent = pydantic_ai.Agent(model(), tools=[weather.function()], model_settings={"temperature": 0})
        assert "degrees" in agent.run_sync(WEATHER).output
        assert weather.cities == ["Rome"]

    def test_output_of_a_type(self, model: Any, city: Any) -> None:
        """By a tool, which is the default, and by a schema."""
        pydantic_ai = pytest.importorskip("pydantic_ai")
        for output_type in (city, pydantic_ai.NativeOutput(city)):
            agent = pydantic_ai.Agent(model(), output_type=output_type, model_settings={"temperature": 0})
            assert isinstance(agent.run_sync(QUESTION).output, city)


class TestOpenAIAgents:
    @pytest.fixture
    def run(self, served: Any) -> Any:
        agents = pytest.importorskip("agents")
        agents.set_tracing_disabled(True)
        client = pytest.importorskip("openai").AsyncOpenAI(base_url=served.url, api_key="x")
        model = agents.OpenAIChatCompletionsModel(model="tiny-v4", openai_client=client)
        settings = agents.ModelSettings(temperature=0)

        def run(question: str, **fields: Any) -> Any:
            agent = agents.Agent(name="a", instructions="Be brief.", model=model, model_settings=settings, **fields)
            return agents.Runner.run_sync(agent, question).final_output

        return run

    def test_without_tools(self, run: Any) -> None:
        assert run(QUESTION) == CAPITAL

    def test_with_tools(self, run: Any, weather: Weather) -> None:
        agents = pytest.importorskip("agents")
        assert "degrees" in run(WEATHER, tools=[agents.function_tool(weather.function())])
        assert weather.cities == ["Rome"]

    def test_output_of_a_type(self, run: Any, city: Any) -> None:
        assert isinstance(run(QUESTION, output_type=city), city)


class TestResponses:
    @pytest.fixture
    def client(self, served: Any) -> Any:
        return pytest.importorskip("openai").OpenAI(base_url=served.url, api_key="x")

    def test_parse(self, client: Any, city: Any) -> None:
        answer = client.responses.parse(model="tiny-v4", input=QUESTION, text_format=city, temperature=0)
        assert isinstance(answer.output_parsed, city)
