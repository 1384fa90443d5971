"""Public clients against a real server, at their defaults; with the setting that turns ``strict`` off where tools need
it. A client that is not installed is skipped, by name."""

import contextlib
import json
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


def refusal(error: BaseException) -> str:
    """Returns the words of the server, wherever the client keeps them."""
    return f"{error} {getattr(error, 'body', '')}"


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

    def test_parse_is_refused_with_a_way_around(self, client: Any) -> None:
        pydantic = pytest.importorskip("pydantic")
        city = pydantic.create_model("City", city=(str, ...))
        messages = [{"role": "user", "content": QUESTION}]
        with pytest.raises(pytest.importorskip("openai").BadRequestError, match="create instead of parse"):
            client.chat.completions.parse(model="tiny-v4", messages=messages, response_format=city)

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

    def test_bind_tools_with_the_setting_that_the_refusal_names(self, chat: Any, weather: Weather) -> None:
        with pytest.raises(Exception, match=r"strict=False \(LangChain"):
            chat.bind_tools([weather.function()], strict=True).invoke(WEATHER)
        assert chat.bind_tools([weather.function()], strict=False).invoke(WEATHER).tool_calls

    def test_output_in_json_by_the_setting_that_the_refusal_names(self, chat: Any) -> None:
        city = pytest.importorskip("pydantic").create_model("City", capital=(str, ...))
        for method in ("json_schema", "function_calling"):
            with pytest.raises(Exception, match="method='json_mode'"):
                chat.with_structured_output(city, method=method).invoke(QUESTION)
        assert chat.with_structured_output(city, method="json_mode", include_raw=True).invoke(QUESTION)["raw"].content


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

    def test_with_tools_by_the_setting_that_the_refusal_names(self, model: Any, weather: Weather) -> None:
        pydantic_ai = pytest.importorskip("pydantic_ai")
        profile = pytest.importorskip("pydantic_ai.profiles.openai").OpenAIModelProfile(
            openai_supports_strict_tool_definition=False
        )
        settings = {"temperature": 0}
        tools = [weather.function()]
        with pytest.raises(Exception, match="strict") as refused:
            pydantic_ai.Agent(model(), tools=tools, model_settings=settings).run_sync(WEATHER)
        assert "openai_supports_strict_tool_definition=False" in refusal(refused.value)
        agent = pydantic_ai.Agent(model(profile=profile), tools=tools, model_settings=settings)
        assert "degrees" in agent.run_sync(WEATHER).output
        assert weather.cities == ["Rome"]

    def test_output_in_json_by_the_setting_that_the_refusal_names(self, model: Any) -> None:
        pydantic_ai = pytest.importorskip("pydantic_ai")
        city = pytest.importorskip("pydantic").create_model("City", capital=(str, ...))
        agent = pydantic_ai.Agent(
            model(), output_type=pydantic_ai.PromptedOutput(city), model_settings={"temperature": 0}
        )
        with contextlib.suppress(pydantic_ai.UnexpectedModelBehavior):  # the model is small: its JSON may not be one
            agent.run_sync(QUESTION)


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

    def test_with_tools_by_the_setting_that_the_refusal_names(self, run: Any, weather: Weather) -> None:
        agents = pytest.importorskip("agents")
        with pytest.raises(Exception, match="strict_mode=False"):
            run(WEATHER, tools=[agents.function_tool(weather.function())])
        assert "degrees" in run(WEATHER, tools=[agents.function_tool(weather.function(), strict_mode=False)])
        assert weather.cities == ["Rome"]

    def test_output_in_json_by_the_setting_that_the_refusal_names(self, run: Any) -> None:
        agents = pytest.importorskip("agents")
        city = pytest.importorskip("pydantic").create_model("City", capital=(str, ...))
        with pytest.raises(Exception, match="strict_json_schema=False"):
            run(QUESTION, output_type=city)
        with contextlib.suppress(agents.ModelBehaviorError):  # the model is small: its JSON may not be one
            run(QUESTION, output_type=agents.AgentOutputSchema(city, strict_json_schema=False))
