"""The page at ``/`` in a browser: it chats, it shows what runs, model text stays text, and everybody can use it."""

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cpu.chat.small_tokenizer import ASSISTANT_ID
from cpu.engine.fake_model import EOS_ID, FakeModel
from cpu.server.harness import MODEL_ID, TOKENIZER, VOCAB, WAIT_S, Harness, harness, listening
from support.browser import Browser, find_browser, running_browser
from support.contrast import TEXTS, contrast, luminance

from ownpath.chat.markers import THINK_END, segments_of
from ownpath.loading import default_model_dir, plan_model
from ownpath.plan.show import plan_dict
from ownpath.runners import SwiGLU
from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules, create_app
from ownpath.server.body import Limits
from ownpath.server.debug import DebugPlan
from ownpath.trace import Ledger

API_KEY, ADMIN_KEY = "an-api-key-of-this-server", "the-admin-key-of-this-server"
LONG = 4096
HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script></div>"
    "<style>*{display:none}</style>&lt;b&gt; javascript:alert(1) \x1b[31m \u202egnp. hello 🙂\n  é"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true"><b>Zürich</b></｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
SHARE = 8.0
"""The logit of a scripted token; the others have 0."""
MANY = 10**6
Served = tuple[str, "Script"]
"""An address, and what the model there says."""


class Script:
    """The model's answer in each turn of a conversation. permits: steps it may run; None: any."""

    def __init__(self) -> None:
        self.permits: threading.Semaphore | None = None
        self.says("hello")

    def says(self, *turns: str) -> None:
        """Sets the answers, in which markers are meant."""
        self.ids = [TOKENIZER.encode_segments(segments_of(text)) for text in turns]

    def logits(self, history: tuple[int, ...]) -> torch.Tensor:
        if self.permits is not None:
            assert self.permits.acquire(timeout=WAIT_S)
        turn = history.count(ASSISTANT_ID) - 1
        opening = len(history) - history[::-1].index(ASSISTANT_ID)
        position, ids = len(history) - opening - 1, self.ids[turn % len(self.ids)]
        token_id = ids[position] if position < len(ids) else EOS_ID
        return torch.nn.functional.one_hot(torch.tensor(token_id), VOCAB).float() * SHARE


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here (.ci/run installs it)")
    with running_browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@contextlib.contextmanager
def serving(keys: tuple[str, ...] = (), admin_key: str = "") -> Iterator[Served]:
    """A server on a port; without keys and plan unless asked for."""
    script = Script()
    with harness(FakeModel(script.logits, VOCAB, LONG), max_model_len=LONG) as base:
        rules = Rules(access=AccessPolicy(keys))
        debug = DebugPlan(admin_key, facts(), ledger(), Limits()) if admin_key else None
        app = create_app(base.vitals, TOKENIZER, MODEL_ID, rules, debug=debug)
        with listening(Harness(app, base.engine, base.model, TOKENIZER, base.vitals)) as url:
            yield url, script


@pytest.fixture(scope="module")
def plain(browser: Browser) -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def planned(browser: Browser) -> Iterator[Served]:
    with serving(admin_key=ADMIN_KEY) as found:
        yield found


@cache
def the_plan() -> dict[str, Any]:
    return plan_dict(plan_model(default_model_dir(), "cpu"))


def facts() -> dict[str, object]:
    memory = {"weights_bytes": 1_230_000_000, "cache_bytes": 45_600_000, "requests": 16, "tokens_each": 4096}
    release = {"name": "v4", "told_by": "test", "is_guess": True}
    return {
        "model": MODEL_ID,
        "device": {"type": "cpu", "name": "CPU"},
        "plan": the_plan(),
        "memory": memory,
        "release": release,
    }


def ledger() -> Ledger:
    """Two of the plan's slots were called, one of them on a kernel that was not planned there."""
    first = next(op["slot"] for op in the_plan()["companions"] if op["kernel"] == "ref.swiglu")
    second = the_plan()["ops"][0]["slot"]
    made = Ledger({first: ("SwiGLU", "ref.swiglu"), second: ("Nvfp4Linear", "ref.nvfp4_linear")})
    for slot, count in ((first, 3), (second, 2)):
        watched = made.watch(slot, SwiGLU(8.0))
        for _ in range(count):
            watched(torch.zeros(1, 4))
    return made


def opened(browser: Browser, url: str, width: int = 1280) -> None:
    """Opens the page, whose model then answers with its likeliest tokens."""
    browser.prefer("light")
    browser.open(url, width)
    browser.until(f"document.querySelector('#model').textContent === '{MODEL_ID}'")
    set_field(browser, "temperature", "0")


def open_plan(browser: Browser) -> None:
    browser.until("!document.querySelector('#admin').hidden")
    browser.evaluate("document.querySelector('#admin-key').focus()")
    browser.type(ADMIN_KEY)
    browser.press("Enter", "\r")
    browser.until("!document.querySelector('#modules').hidden")


def say(browser: Browser, text: str) -> None:
    """Types a message and sends it by the keyboard."""
    browser.evaluate("document.querySelector('#message').focus()")
    browser.type(text)
    browser.press("Enter", "\r")


def set_field(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(f"document.querySelector('#{name}').value = {json.dumps(value)}")


def text_of(browser: Browser, place: str) -> str:
    """The texts at a place; of several, one after the other."""
    found: str = browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(place)})].map(e => e.textContent).join('')"
    )
    return found


def is_shown(browser: Browser, place: str) -> bool:
    return bool(browser.evaluate(f"document.querySelector('{place}').checkVisibility()"))


def answered(browser: Browser, count: int) -> None:
    browser.until(
        f"document.querySelectorAll('article.assistant').length === {count} && document.querySelector('#stop').hidden"
    )


def test_an_answer_streams_and_its_text_stays_text(browser: Browser, plain: Served) -> None:
    url, script = plain
    script.says(HOSTILE)
    script.permits = gate = threading.Semaphore(20)
    opened(browser, url)
    say(browser, "<b>hello</b>")
    browser.until("document.querySelector('article.assistant > .text')?.textContent.length > 5")
    assert is_shown(browser, "#stop")
    begun = text_of(browser, "article.assistant > .text")
    assert begun != HOSTILE
    assert HOSTILE.startswith(begun)
    gate.release(MANY)
    answered(browser, 1)
    assert text_of(browser, "article.assistant > .text") == HOSTILE
    assert text_of(browser, "article.user .text") == "<b>hello</b>"
    assert browser.evaluate("document.querySelectorAll('#log :is(img, script, style, b)').length") == 0
    assert browser.evaluate("document.title") == "ownpath"
    assert text_of(browser, "#status") == "answer complete"


def test_without_an_admin_key_it_says_how_the_plan_opens_and_its_policy_holds(browser: Browser, plain: Served) -> None:
    url, _ = plain
    opened(browser, url)
    browser.until("document.querySelector('#plan-state').textContent.includes('no admin key')")
    assert "OWNPATH_ADMIN_KEY" in text_of(browser, "#plan-state")
    assert not is_shown(browser, "#admin")
    assert "running" in text_of(browser, "#facts"), "what needs no admin key is there"
    tries = "try { document.body.innerHTML = '<p>x'; return 'done'; } catch (error) { return error.name; }"
    assert browser.evaluate(f"(() => {{ {tries} }})()") == "TypeError"
    elsewhere = url.replace("127.0.0.1", "localhost") + "/health"
    asks = f"fetch('{elsewhere}', {{mode: 'no-cors'}}).then(() => go('sent'), () => 0)"
    refused = "document.addEventListener('securitypolicyviolation', event => go(event.effectiveDirective))"
    assert browser.evaluate(f"new Promise(go => {{ {refused}; {asks}; }})") == "connect-src"


def test_the_log_prob_of_a_token_is_told_under_the_pointer_and_the_keys(browser: Browser, plain: Served) -> None:
    """As the API tells it; the character of two tokens tells both."""
    logprob = SHARE - math.log(math.exp(SHARE) + TOKENIZER.num_tokens - 1)
    url, script = plain
    script.says("hello é")
    opened(browser, url)
    say(browser, "hello")
    answered(browser, 1)
    spans = "document.querySelectorAll('article.assistant > .text .token')"
    assert browser.evaluate(f"[...{spans}].map(e => e.textContent)") == ["hello", " ", "é"]
    x, y = browser.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({spans}[0].getBoundingClientRect())")
    browser.point(x, y)
    browser.until("!document.querySelector('#token').hidden")
    told = text_of(browser, "#token p")
    assert told == f"“hello”: log-prob {logprob:.3f}, {100 * math.exp(logprob):.1f} %"
    assert browser.evaluate("document.querySelectorAll('#token tr').length") == 4
    browser.evaluate("document.querySelector('article.assistant > .text').focus()")
    browser.press("ArrowLeft")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    told = text_of(browser, "#token-told")
    assert told.count(f"log-prob {logprob:.3f}") == 2, "a character of two tokens"
    browser.press("Escape")
    assert not is_shown(browser, "#token")


def test_reasoning_is_folded_and_calls_are_shown_and_answered(browser: Browser, plain: Served) -> None:
    url, script = plain
    script.says(f"<hm>{THINK_END}I ask.{CALL}", f"{THINK_END}It is <i>warm</i>.")
    opened(browser, url)
    set_field(browser, "effort", "high")
    set_field(browser, "tools", json.dumps([WEATHER]))
    say(browser, "weather?")
    answered(browser, 1)
    assert text_of(browser, ".thought") == "<hm>"
    assert is_shown(browser, "article details summary")
    assert not browser.evaluate("document.querySelector('article details').open")
    assert text_of(browser, "article.assistant > .text").strip() == "I ask."
    assert text_of(browser, ".call code") == "weather"
    assert json.loads(text_of(browser, ".call pre")) == {"city": "<b>Zürich</b>"}
    browser.evaluate("document.querySelector('.call textarea').value = '<u>25</u>'")
    browser.evaluate("document.querySelector('.call ~ button').click()")
    answered(browser, 2)
    texts = "[...document.querySelectorAll('article.assistant > .text')].map(e => e.textContent)"
    assert browser.evaluate(texts)[1].endswith("It is <i>warm</i>.")


def test_a_stopped_answer_stays_in_the_chat_and_failures_are_told(browser: Browser, plain: Served) -> None:
    url, script = plain
    script.says("hello " * 100, "stop")
    opened(browser, url)
    script.permits = gate = threading.Semaphore(20)
    say(browser, "one")
    browser.until("document.querySelector('article.assistant > .text')?.textContent.length > 5")
    browser.evaluate("document.querySelector('#stop').click()")
    gate.release(MANY)
    answered(browser, 1)
    assert "stopped" in text_of(browser, "article.assistant .end")
    say(browser, "two")
    answered(browser, 2)
    set_field(browser, "tools", "no JSON")
    say(browser, "three")
    browser.until("!document.querySelector('#trouble').hidden")
    assert browser.evaluate("document.querySelector('#message').value") == "three"
    set_field(browser, "tools", '[{"type": "<b>nonsense</b>"}]')
    browser.press("Enter", "\r")
    browser.until("document.querySelector('#trouble').textContent.includes('tools')")
    assert browser.evaluate("document.querySelectorAll('article').length") == 4
    browser.evaluate("document.querySelector('#clear').click()")
    assert browser.evaluate("document.querySelectorAll('article').length") == 0


def test_keys_open_it_and_are_kept_nowhere(browser: Browser) -> None:
    with serving((API_KEY,), ADMIN_KEY) as (url, _):
        browser.open(url, 1280)
        browser.until("!document.querySelector('#login').hidden")
        assert MODEL_ID not in text_of(browser, "body > :not(script)").split()
        browser.type("a-wrong-key-for-this-server")
        browser.press("Enter", "\r")
        browser.until("document.querySelector('#trouble').textContent.includes('does not know this key')")
        browser.type(API_KEY)
        browser.press("Enter", "\r")
        browser.until(f"document.querySelector('#model').textContent === '{MODEL_ID}'")
        assert not is_shown(browser, "#login")
        browser.until("!document.querySelector('#admin').hidden")
        for key, hint in ((API_KEY, "not the admin"), (ADMIN_KEY, "")):
            browser.evaluate("document.querySelector('#admin-key').focus()")
            browser.type(key)
            browser.press("Enter", "\r")
            browser.until(f"document.querySelector('#plan-state').textContent.includes('{hint}')")
        browser.until("!document.querySelector('#modules').hidden")
        say(browser, "hello")
        answered(browser, 1)
        found = browser.evaluate(
            "[location.href, document.documentElement.outerHTML, document.cookie, localStorage.length, "
            "sessionStorage.length, [...document.querySelectorAll('input')].map(e => e.value).join()]"
        )
        assert found[0] == f"{url}/"
        assert found[3:5] == [0, 0]
        assert not any(key in text for key in (API_KEY, ADMIN_KEY) for text in (*found[:3], found[5]))


def test_the_plan_says_which_kernel_runs_each_module(browser: Browser, planned: Served) -> None:
    url, _ = planned
    opened(browser, url)
    browser.until("!document.querySelector('#admin').hidden")
    assert "OWNPATH_ADMIN_KEY" in text_of(browser, "#plan-state")
    open_plan(browser)
    rows = browser.evaluate(
        "[...document.querySelectorAll('#modules tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    ops = [*the_plan()["ops"], *the_plan()["companions"]]
    slots = {op["slot"] for op in ops}
    assert sum(count_of(name) for name, _, _ in rows) == len(slots), "each slot is in one row"
    kernels = {kernel for _, kernel, _ in rows}
    assert all(any(told.startswith(op["kernel"]) for told in kernels) for op in ops)
    assert sum(int(calls) for _, _, calls in rows) == 5
    ((wrong, told, calls),) = [row for row in rows if "not planned" in row[1]]
    assert (calls, told.startswith("ref.swiglu")) == ("2", True)
    assert "ref.nvfp4_linear was" in told
    assert wrong.startswith(ops[0]["slot"])


def count_of(name: str) -> int:
    """Counts the slots that a row stands for, by the layers in its name."""
    found = re.match(r"\w+\.\{([\d,-]+)\}", name)
    runs = [run.split("-") for run in found[1].split(",")] if found else [["0"]]
    return sum(int(run[-1]) - int(run[0]) + 1 for run in runs)


@pytest.mark.parametrize("width", [1280, 480])
def test_it_fits_can_be_read_and_can_be_used_without_a_pointer(width: int, browser: Browser, planned: Served) -> None:
    """No horizontal scrolling with everything open, WCAG 2's contrast, a name for all that takes the focus."""
    long_word = "hello" * 60
    url, script = planned
    script.says(f"{long_word}{THINK_END}{long_word}{CALL}")
    opened(browser, url, width)
    open_plan(browser)
    set_field(browser, "effort", "high")
    set_field(browser, "tools", json.dumps([WEATHER]))
    say(browser, long_word)
    answered(browser, 1)
    browser.evaluate("document.querySelector('article.assistant > .text').focus()")
    browser.press("ArrowRight")
    browser.evaluate(
        "document.querySelectorAll('[hidden]').forEach(e => { if (e.id !== 'trouble') e.hidden = false; })"
    )
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        pairs = browser.evaluate(TEXTS)
        assert len(pairs) > 8
        hints = browser.evaluate("getComputedStyle(document.querySelector('#message'), '::placeholder').color")
        fields = browser.evaluate("getComputedStyle(document.querySelector('#message')).backgroundColor")
        for pair, text in (pairs | {f"{hints}|{fields}": "placeholder"}).items():
            assert contrast(*map(luminance, pair.split("|"))) >= 4.5, (scheme, pair, text)
    wide, shown = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= shown == width
    assert width < 1000 or browser.evaluate("document.documentElement.scrollHeight <= innerHeight")
    over = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.evaluate(f"{over}.map(e => e.outerHTML.slice(0, 80))") == []
    focusable = browser.focusable()
    assert all(name for role, name in focusable if role != "RootWebArea"), focusable
    assert {"textbox", "button", "log", "group"} <= {role for role, _ in focusable}
    browser.evaluate("document.querySelector('#message').focus()")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "send"
