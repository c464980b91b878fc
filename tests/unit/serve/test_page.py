"""The page of the service, in headless Chromium against a stand-in service of canned answers.

CPREC_SCREENSHOTS=FOLDER keeps the pictures that `test_pictures` makes; those of docs/images are two of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydantic
import pytest

import cprec
from cprec.serve import messages
from cprec.serve.service import Service as Serving

pytestmark = pytest.mark.slow  # a browser is started, and pages are waited for

PAGE = Path(cprec.__file__).parent / "serve" / "page.html"

# ---- the stand-in service --------------------------------------------------------------------------------------------

ITEMS = {
    "books": {
        "b-01": "The Tea Road: Caravans, Clippers and Kettles",
        "b-02": "A Year of Slow Baking",
        "b-03": "Letters from a Rainy Allotment",
        "b-04": "Murder at the Orangery Tea Rooms",
        "b-05": "Herbs for Small Windowsills",
    },
    "garden": {
        "g-01": "Peppermint seeds, one packet",
        "g-02": "Terracotta herb pots, set of three",
        "g-03": "Copper watering can, 1 litre",
        "g-04": "Chamomile seeds, one packet",
    },
    "kitchen": {
        "k-01": "Cast-iron teapot, 0.8 litre",
        "k-02": "Bamboo tea strainer",
        "k-03": "Gooseneck kettle with thermometer",
        "k-04": "Stoneware mug, speckled, set of two",
        "k-05": "Linen tea towel, blue stripe",
        "k-06": "Wooden honey dipper",
        "k-07": "Sourdough proving basket",
        "k-08": "Bread lame with leather cover",
        "k-09": "Enamel loaf tin",
        "k-10": "Digital kitchen scale, 5 kg",
    },
}
TITLES = {item_id: title for items in ITEMS.values() for item_id, title in items.items()}
AFTER = [("k-02", -1.42), ("k-03", -1.97), ("k-06", -2.61), ("k-04", -2.88), ("k-05", -3.4), ("k-10", -3.95)]
BEFORE = [("k-04", -2.2), ("k-02", -2.41), ("k-10", -2.62), ("k-03", -3.1), ("k-07", -3.3), ("k-08", -3.96)]
LISTS = {
    "transition graph": [("k-03", 0.31), ("k-04", 0.22), ("k-08", 0.12), ("k-02", 0.09)],
    "popularity": [("k-10", 1204), ("k-04", 977), ("k-05", 803), ("k-07", 764)],
}
EFFECTS = {"k-01": 1.21, "b-01": 0.58, "g-01": 0.22, "b-02": -0.04, "k-09": -0.37}
DOMAIN_EFFECTS = {"kitchen": 1.02, "books": 0.51, "garden": 0.22}
HISTORY = [("books", "b-02"), ("kitchen", "k-09"), ("books", "b-01"), ("garden", "g-01"), ("kitchen", "k-01")]
LINK = "#domain=kitchen&k=6&history=" + ",".join(f"{domain}:{item_id}" for domain, item_id in HISTORY)

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and what becomes JSON."""


@dataclass
class Service:
    """What the stand-in was asked, and what it is told to answer."""

    address: str = ""
    models: list[str] = field(default_factory=lambda: ["CPRec-style"])
    parts: dict[str, float] = field(default_factory=lambda: {"language model": 3.1})
    """What each part of the score adds to it."""
    titles: dict[str, str] = field(default_factory=lambda: dict(TITLES))
    asked: list[tuple[str, Any]] = field(default_factory=list)
    """Path below /v1/ with its body, or its query for GET."""
    failures: dict[str, list[Answer]] = field(default_factory=dict)
    """Path below /v1/ -> answers to give first, one a request."""
    token: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    """Searches for "slow" wait for it."""
    recommended: dict[str, Any] = field(default_factory=dict)
    """Replaces fields of the answer to /v1/recommend."""

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def answer(self, path: str, body: Any, authorization: str | None) -> Answer:
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {}, {"error": {"message": "a token is needed"}}
        self.asked.append((path, body))
        if self.failures.get(path):
            return self.failures[path].pop(0)
        return 200, {}, getattr(self, path)(body)

    def about(self, _: Any) -> Any:
        domains = [{"name": name, "num_items": len(items)} for name, items in ITEMS.items()]
        return {"model": self.models[0], "models": self.models, "domains": domains, "default_domain": "kitchen"} | {
            "served": [
                {
                    "name": name,
                    "domains": ["kitchen"] if len(self.parts) > 1 else list(ITEMS),
                    "parts": list(self.parts),
                }
                for name in self.models
            ],
            "baselines": list(LISTS),
            "max_history": 12,
            "version": "1",
        }

    def items(self, query: dict[str, str]) -> Any:
        words = query.get("query", "").lower()
        if words == "slow":
            self.gate.wait(20)
        found = [
            {"item_id": item_id, "domain": domain, "title": self.titles[item_id]}
            for domain, items in ITEMS.items()
            for item_id in items
            if query.get("domain") in (None, domain) and (words in self.titles[item_id].lower() or words == item_id)
        ]
        return {"items": found[: int(query["limit"])]}

    def listed(self, items: list[tuple[str, float]]) -> Any:
        return [{"item_id": item_id, "title": self.titles[item_id], "score": score} for item_id, score in items]

    def recommend(self, body: Any) -> Any:
        items = self.listed((BEFORE if body.get("model") == "fine-tuning only" else AFTER)[: body["k"]])
        by = "query and history" if body["history"] else "query"
        told = {
            "mode": by if "query" in body else body.get("mode", "exact"),
            "degraded": False,
            "proven": True,
            "milliseconds": 12.34,
        }
        return {"items": items, "domain": body["domain"], "model": self.models[0]} | told | self.recommended

    def explain(self, body: Any) -> Any:
        events = [
            {**event, "title": self.titles[event["item_id"]], "effect": EFFECTS.get(event["item_id"], 0.0)}
            for event in body["history"]
        ]
        domains = [{"domain": name, "effect": DOMAIN_EFFECTS[name]} for name in {e["domain"]: 0 for e in events}]
        item_id = body["item_id"]
        answer = {"item_id": item_id, "title": self.titles[item_id], "score": -1.42}
        told = {"num_events_read": len(events), "milliseconds": 30.5, "domain": body["domain"], "model": self.models[0]}
        parts = [{"name": name, "weight": 2.0, "effect": effect} for name, effect in self.parts.items()]
        words = [
            {"word": word, "effect": 3.1} for word in body.get("query", "").split() if word in answer["title"].lower()
        ]
        if "query" in body:
            parts.append({"name": "query", "weight": 2.0, "effect": 2.8 * len(words)})
        return answer | told | {"parts": parts, "words": words, "events": events, "domains": domains}

    def baselines(self, body: Any) -> Any:
        return {"lists": [{"name": name, "items": self.listed(items[: body["k"]])} for name, items in LISTS.items()]}


def strict_policy() -> str:
    """The strictest policy that can serve the page: this style, this script, this origin."""
    text = PAGE.read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@pytest.fixture
def service() -> Iterator[Service]:
    told = Service()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # the page gave this request up

        def respond(self, body: Any) -> None:
            path = urlsplit(self.path).path.removeprefix("/v1/")
            status, headers, answer = told.answer(path, body, self.headers.get("Authorization"))
            self.reply(status, {"Content-Type": "application/json", **headers}, json.dumps(answer).encode())

        def do_GET(self) -> None:
            if urlsplit(self.path).path == "/":
                headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": strict_policy()}
                self.reply(200, headers, PAGE.read_bytes())
            else:
                self.respond({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.address = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield told
    told.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


# ---- the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def new_page(browser: Any, service: Service) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh browser session. In the end nothing may have broken, and nothing left the service."""
    contexts, broken, requested, addresses = [], [], [], set()

    def open_page(hash: str = "", address: str = service.address, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.on("console", lambda line: broken.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda request: requested.append(request.url))
        addresses.add(address)
        page.goto(address + hash)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not broken
    assert all(url.startswith((*addresses, "data:")) for url in requested)


def texts(page: Any, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def events(page: Any) -> list[str]:
    return texts(page, "#events .title")


def loaded(page: Any) -> None:
    """Waits until the page knows what the service has. The fieldset tells: its fields are not disabled themselves. (A
    function to wait for would be evaluated in the page, which its security policy forbids.)"""
    page.locator("#ask-fields:not([disabled])").wait_for()


def ranked(page: Any) -> list[str]:
    page.locator("#lists .ranked > li").first.wait_for()
    return texts(page, "#lists .ranked > li > .title")


def fill(page: Any, words: str) -> None:
    """Types into the search and waits for what is found."""
    page.fill("#query", words)
    page.locator("#found-list li").first.wait_for()


# ---- the file itself -------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself_and_writes_no_markup() -> None:
    text = PAGE.read_text(encoding="utf-8")
    outside = set(re.findall(r"https?://[^\s'\"<>)]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # the name of a format, never fetched
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    markup = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.findall(r"\s(?:on[a-z]+|style)=", markup)
    assert text.count("<script") == text.count("<style") == 1
    for name in re.findall(r'\$\("([a-z-]+)"\)', text):
        assert f'id="{name}"' in markup, name


# ---- load, search, history -------------------------------------------------------------------------------------------


def test_it_loads_and_says_what_is_there(new_page: Any) -> None:
    page = new_page()
    loaded(page)
    assert page.inner_text("#model") == "CPRec-style: 19 items in 3 domains"
    assert texts(page, "#domain option") == ["books (5 items)", "garden (4 items)", "kitchen (10 items)"]
    assert page.input_value("#domain") == "kitchen"
    assert page.is_visible("#no-events") and page.is_visible("#empty") and page.is_hidden("#answer")


def test_a_history_is_put_together_by_keyboard(new_page: Any, service: Service) -> None:
    page = new_page()
    fill(page, "tea")
    assert texts(page, "#found-list .title") == [t for t in TITLES.values() if "tea" in t.lower()]
    option = page.get_attribute("#query", "aria-activedescendant")
    assert page.get_attribute(f"#{option}", "aria-selected") == "true"
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#query", "aria-activedescendant") == "found-1"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # from the first to the last
    page.keyboard.press("Enter")
    assert events(page) == [TITLES["k-05"]]
    assert page.is_hidden("#found") and page.input_value("#query") == ""
    assert page.evaluate("document.activeElement.id") == "query"

    page.keyboard.press("ArrowDown")  # shows what there is
    page.locator("#found-list li").nth(4).wait_for()
    page.keyboard.press("Escape")
    assert page.is_hidden("#found") and page.get_attribute("#query", "aria-expanded") == "false"

    page.select_option("#search-domain", "garden")
    fill(page, "seeds")
    page.keyboard.press("Enter")
    assert events(page) == [TITLES["k-05"], TITLES["g-01"]]
    page.keyboard.press("Control+Enter")
    assert ranked(page)[0] == TITLES["k-02"]
    wanted = [{"item_id": "k-05", "domain": "kitchen"}, {"item_id": "g-01", "domain": "garden"}]
    assert service.bodies("recommend") == [{"history": wanted, "domain": "kitchen", "k": 10, "exclude_seen": True}]


def test_events_move_and_go_and_the_focus_stays_near(new_page: Any) -> None:
    page = new_page(LINK)
    ranked(page)
    page.click("[aria-label^='Move A Year of Slow Baking down']")
    assert events(page)[:2] == [TITLES["k-09"], TITLES["b-02"]]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "Move A Year of Slow Baking down"
    )
    page.click("[aria-label^='Take Enamel']")
    assert events(page) == [TITLES[item] for item in ("b-02", "b-01", "g-01", "k-01")]
    assert "A Year of Slow Baking" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert page.is_visible("#outdated")
    page.click("#clear")
    assert events(page) == [] and page.is_hidden("#answer") and page.is_visible("#no-events")


def test_a_late_answer_to_an_earlier_search_is_not_shown(new_page: Any, service: Service) -> None:
    page = new_page()
    loaded(page)
    with page.expect_request("**/v1/items?query=slow*"):
        page.fill("#query", "slow")
    fill(page, "mug")
    service.gate.set()
    page.fill("#query", "nothing like it")
    page.locator("#found-note", has_text="Nothing found for “nothing like it”.").wait_for()
    assert texts(page, "#found-list .title") == []


def test_an_example_is_drawn_from_several_domains_and_ranked(new_page: Any) -> None:
    page = new_page()
    page.click("#example")
    assert len(ranked(page)) == 6
    assert len(events(page)) == 7
    assert set(texts(page, "#events .domain")) == set(ITEMS)
    assert set(events(page)) <= set(TITLES.values())


def test_events_that_the_model_does_not_read_are_marked(new_page: Any) -> None:
    page = new_page("#history=" + ",".join(["books:b-01"] * 12))
    ranked(page)
    assert page.is_hidden("#unread") and page.locator("#events .unread").count() == 0
    fill(page, "mug")
    page.keyboard.press("Enter")
    assert "The model reads the latest 12 events" in page.inner_text("#unread")
    assert page.locator("#events .unread").count() == 1
    assert len(events(page)) == 13


# ---- rank, why, beside -----------------------------------------------------------------------------------------------


def test_the_list_has_scores_mode_timing_and_the_baselines_beside_it(new_page: Any, service: Service) -> None:
    page = new_page(LINK)
    assert ranked(page) == [TITLES[item_id] for item_id, _ in AFTER]
    assert [text.split() for text in texts(page, "#lists .score")] == [
        ["log-probability", f"−{-score:.2f}"] for _, score in AFTER
    ]
    assert texts(page, "#lists .facts span") == ["exact", "proven", "12.3 ms"]
    page.locator("#baseline-lists .ranked").nth(1).wait_for()
    assert texts(page, "#baseline-lists h3") == list(LISTS)
    assert "no. 2 of the model" in page.locator("#baseline-lists article").first.inner_text()
    assert "1,204" in page.locator("#baseline-lists article").nth(1).inner_text()
    assert page.inner_text("#status") == f"6 items ranked in 12.3 milliseconds, exact. First: {TITLES['k-02']}."
    page.select_option("#mode", "beam")
    page.fill("#k", "3")
    page.uncheck("#seen")
    with page.expect_response("**/v1/baselines"):  # asked after the list is there
        page.locator("#again").click()
    page.locator("#lists .facts", has_text="beam").wait_for()
    body = service.bodies("recommend")[-1]
    assert (body["mode"], body["k"], body["exclude_seen"]) == ("beam", 3, False)
    assert service.bodies("baselines")[-1] == {name: body[name] for name in ("history", "domain", "k", "exclude_seen")}
    assert page.is_hidden("#outdated")


def test_a_stand_in_is_called_one(new_page: Any, service: Service) -> None:
    service.recommended = {
        "mode": "transition graph",
        "degraded": True,
        "proven": False,
        "items": service.listed([("k-03", 0.31)]),
    }
    page = new_page(LINK)
    ranked(page)
    assert page.inner_text("#lists .columnhead span:last-child") == "score"
    facts = texts(page, "#lists .facts span")
    assert facts[0] == "transition graph" and facts[-1].startswith("stand-in") and "not proven" not in facts


def test_why_shows_what_each_event_and_domain_did(new_page: Any, service: Service) -> None:
    page = new_page(LINK)
    ranked(page)
    page.get_by_role("button", name="Why Bamboo tea strainer").press("Enter")
    page.locator(".effects").nth(1).wait_for()
    rows = page.locator(".effects").first
    assert rows.locator(".title").all_inner_texts() == [TITLES[i] for i in ("k-01", "b-01", "k-09", "g-01", "b-02")]
    amounts = [text.split("\n") for text in rows.locator(".amount").all_inner_texts()]
    assert amounts[0] == ["+1.21", "3.4 × as likely"] and amounts[2] == ["−0.37", "0.7 × as likely"]
    assert page.locator(".effects").nth(1).locator(".domain").all_inner_texts() == ["kitchen", "books", "garden"]
    assert "Most of all Cast-iron teapot, 0.8 litre spoke for it" in page.inner_text(".why")
    wanted = [{"item_id": item_id, "domain": domain} for domain, item_id in HISTORY]
    assert service.bodies("explain") == [{"history": wanted, "domain": "kitchen", "item_id": "k-02"}]
    button = page.get_by_role("button", name="Why Bamboo tea strainer")
    assert button.get_attribute("aria-expanded") == "true"
    button.press("Enter")
    assert page.locator(".why").count() == 0 and button.get_attribute("aria-expanded") == "false"


def test_why_shows_what_each_part_of_a_blend_says(new_page: Any, service: Service) -> None:
    service.parts = {"language model": 3.2, "EASE": 5.0, "popularity": -0.4}
    page = new_page(LINK)
    ranked(page)
    assert "blended with EASE, popularity" in page.inner_text("#model")
    assert page.locator("#domain option").all_inner_texts() == ["kitchen (10 items)"]
    assert page.inner_text("#lists .columnhead span:last-child") == "score"
    page.locator(".ranked button", has_text="Why?").first.click()
    page.locator(".effects").nth(2).wait_for()
    parts = page.locator(".effects").first
    assert parts.locator(".title").all_inner_texts() == ["EASE", "language model", "popularity"]
    amounts = [text.split("\n") for text in parts.locator(".amount").all_inner_texts()]
    assert amounts == [["+5.00", "12 × average"], ["+3.20", "5.0 × average"], ["−0.40", "0.8 × average"]]
    why = page.inner_text(".why")
    assert (
        "EASE speaks most for it: 12 × what it gives an average item" in why and "+7.80 against an average item" in why
    )
    assert "as likely" not in why and "Cast-iron teapot, 0.8 litre did most" in why


def test_many_events_are_shown_in_two_steps(new_page: Any) -> None:
    page = new_page("#history=" + ",".join(f"kitchen:k-{number:02}" for number in range(1, 11)))
    ranked(page)
    page.locator(".ranked button", has_text="Why?").first.click()
    page.locator(".why button", has_text="Show 2 more events").click()
    assert page.locator(".effects").first.locator("li").count() == 10


def test_two_models_rank_the_same_history_side_by_side(new_page: Any, service: Service) -> None:
    service.models = ["CPRec-style", "fine-tuning only"]
    page = new_page(LINK)
    ranked(page)
    assert texts(page, "#lists h3") == service.models
    first, second = (page.locator("#lists article").nth(place) for place in (0, 1))
    assert first.locator(".under .quiet").all_inner_texts()[:3] == [
        "▲ no. 2 in the other list",
        "▲ no. 4 in the other list",
        "not in the other list",
    ]
    assert second.locator(".under .quiet").first.inner_text() == "▲ no. 4 in the other list"
    assert sorted(body["model"] for body in service.bodies("recommend")) == service.models
    second.get_by_role("button", name="Why Bamboo tea strainer").click()
    page.locator(".effects").first.wait_for()
    assert service.bodies("explain")[0]["model"] == "fine-tuning only"


def test_a_recommended_item_can_join_the_history(new_page: Any) -> None:
    page = new_page(LINK)
    ranked(page)
    page.get_by_role("button", name="Add Wooden honey dipper to the history").click()
    assert events(page)[-1] == TITLES["k-06"]
    assert page.is_visible("#outdated")


# ---- the address -----------------------------------------------------------------------------------------------------


def test_the_address_holds_the_question(new_page: Any, service: Service) -> None:
    page = new_page(LINK + "&mode=beam&seen=in")
    ranked(page)
    page.locator("#events .title").first.filter(has_text="A Year of Slow Baking").wait_for()
    page.locator("#events", has_text=TITLES["k-01"]).wait_for()
    assert events(page) == [TITLES[item_id] for _, item_id in HISTORY]  # found by their ids
    assert page.input_value("#mode") == "beam" and not page.is_checked("#seen") and page.input_value("#k") == "6"
    page.get_by_role("button", name="Take A Year").click()
    num_searches = len(service.bodies("items"))
    page.reload()
    ranked(page)
    assert events(page) == [TITLES[item_id] for _, item_id in HISTORY[1:]]
    assert len(service.bodies("items")) == num_searches  # the tab remembers titles
    page.evaluate("location.hash = 'domain=books&k=2&history=garden:g-03'")
    page.locator("#lists-heading", has_text="Next in books").wait_for()
    page.locator("#events", has_text=TITLES["g-03"]).wait_for()
    assert events(page) == [TITLES["g-03"]]


@pytest.mark.parametrize(
    "hash", ["#", "#domain=none&k=-3&mode=x&history=", "#k=1e9&history=%E0%A4%A,x", "#&&=&history"]
)
def test_a_broken_address_opens_the_page_all_the_same(new_page: Any, hash: str) -> None:
    page = new_page(hash)
    loaded(page)
    assert events(page) == [] and page.input_value("#domain") == "kitchen" and page.input_value("#k") == "10"


def test_titles_are_text_and_never_markup(new_page: Any, service: Service) -> None:
    evil = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> \"'&amp; \u202eabc"
    service.titles = dict.fromkeys(TITLES, evil)
    page = new_page(LINK)
    assert ranked(page)[0].startswith("<img src=x")
    page.locator(".ranked button", has_text="Why?").first.click()
    page.locator(".effects").first.wait_for()
    page.locator("#baseline-lists .ranked").first.wait_for()
    fill(page, "img")
    page.keyboard.press("Enter")
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.broken") is None


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {"detail": {"message": "2 items are not known", "unknown": ["k-09", "g-01"]}},
        {"error": "2 items are not known", "unknown": ["k-09", "g-01"]},
        {
            "error": {
                "message": "2 items are not known",
                "unknown": [{"item_id": i, "domain": d} for d, i in HISTORY if i in ("k-09", "g-01")],
            }
        },
    ],
)
def test_unknown_items_are_named_and_can_be_taken_out(new_page: Any, service: Service, answer: Any) -> None:
    service.failures["recommend"] = [(422, {}, answer)]
    page = new_page(LINK)
    page.locator(".trouble").wait_for()
    assert "does not know" in page.inner_text(".trouble")
    assert [text.split(" ")[0] for text in texts(page, ".trouble li")] == ["k-09", "g-01"]
    assert page.locator("#events .wrong").count() == 2
    page.click("text=Take them out of the history")
    assert len(ranked(page)) == 6
    assert len(events(page)) == 3 and page.locator(".trouble").count() == 0


def test_what_the_service_refuses_is_said_in_its_words(new_page: Any, service: Service) -> None:
    service.failures["recommend"] = [
        (422, {}, {"detail": [{"loc": ["body", "k"], "msg": "must be at most 50"}]}),
        (500, {}, {"detail": "out of memory"}),
        (502, {}, "<html>"),
    ]
    page = new_page(LINK)
    page.locator(".trouble", has_text="k: must be at most 50").wait_for()
    page.click("#rank")
    page.locator(".trouble", has_text="out of memory").wait_for()
    page.click("text=Try again")
    page.locator(".trouble", has_text="Something went wrong in the service").wait_for()
    page.click("text=Try again")
    assert len(ranked(page)) == 6 and page.locator(".trouble").count() == 0


def test_a_busy_service_is_asked_again_when_it_says(new_page: Any, service: Service) -> None:
    service.failures["recommend"] = [(503, {"Retry-After": "3"}, {"error": {"message": "The queue is full."}})]
    page = new_page()
    loaded(page)
    page.clock.install()
    page.evaluate(f"location.hash = {LINK!r}")
    button = page.locator(".trouble button")
    button.wait_for()
    assert "The service is busy. The queue is full." in page.inner_text(".trouble")
    assert re.fullmatch("Try again in [123] seconds?", button.inner_text()) and button.is_disabled()
    page.clock.run_for(3_000)
    assert button.inner_text() == "Try again" and button.is_enabled()
    button.click()
    assert len(ranked(page)) == 6


def test_a_token_is_asked_for_kept_in_the_tab_and_forgotten(new_page: Any, service: Service) -> None:
    service.token = "sesame"
    page = new_page(LINK)
    page.locator("#token-dialog").wait_for()
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.press("Enter")
    assert page.inner_text("#token-hint") == "Type the token first."
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.locator("#token-hint", has_text="not accepted").wait_for()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    assert len(ranked(page)) == 6
    assert "sesame" not in page.content() and "sesame" not in page.url
    assert "Authorization: Bearer $TOKEN" in page.locator("#request-text").text_content()
    page.reload()
    assert len(ranked(page)) == 6  # not asked again in this tab
    assert page.evaluate("localStorage.length") == 0
    page.click("#forget")
    page.click("#rank")
    page.locator("#token-dialog").wait_for()
    page.keyboard.press("Escape")
    page.locator(".trouble", has_text="asks for an access token").wait_for()
    page.click("text=Try again")
    page.locator("#token-dialog").wait_for()


def test_a_service_that_cannot_be_reached_is_tried_again(new_page: Any, service: Service) -> None:
    service.failures["about"] = [(503, {}, {})]
    page = new_page()
    page.locator(".trouble", has_text="The service is busy").wait_for()
    assert page.is_disabled("#query") and page.is_disabled("#rank")
    page.click("text=Try again")
    loaded(page)
    page.context.set_offline(True)
    page.fill("#query", "tea")
    page.locator(".trouble", has_text="The service cannot be reached").wait_for()
    page.context.set_offline(False)
    page.click("text=Try again")
    page.locator("#found-list li").first.wait_for()


def test_trouble_with_a_part_leaves_the_rest(new_page: Any, service: Service) -> None:
    service.models = ["CPRec-style", "fine-tuning only"]
    busy = (503, {"Retry-After": "0"}, {"error": {"message": "no time"}})
    service.failures = {"baselines": [busy], "explain": [busy]}
    page = new_page(LINK)
    assert len(ranked(page)) == 12
    page.locator("#baseline-lists .trouble").wait_for()
    page.get_by_role("button", name="Why Bamboo tea strainer").first.click()
    page.locator(".why .trouble button").click()
    page.locator(".effects").first.wait_for()
    page.click("#baseline-lists button")
    page.locator("#baseline-lists .ranked").first.wait_for()


def test_what_is_missing_is_asked_for_before_the_service_is(new_page: Any, service: Service) -> None:
    page = new_page()
    page.click("#rank")
    assert "The history is empty" in page.inner_text("#history-hint")
    assert page.evaluate("document.activeElement.id") == "query"
    fill(page, "mug")
    page.keyboard.press("Enter")
    for wrong in ("0", "101", "2.5", ""):
        page.fill("#k", wrong)
        page.click("#rank")
        assert page.is_visible("#k-hint") and page.evaluate("document.activeElement.id") == "k"
    assert service.bodies("recommend") == []


# ---- the service itself ----------------------------------------------------------------------------------------------


def test_the_stand_in_speaks_as_the_service_does(service: Service) -> None:
    def fields(kind: type) -> set[str]:
        return set(kind.model_fields) if issubclass(kind, pydantic.BaseModel) else set(kind.__annotations__)

    ask = {"history": [{"item_id": i, "domain": d} for d, i in HISTORY], "domain": "kitchen", "query": "tea"}
    full = {**ask, "k": 6, "exclude_seen": True, "mode": "beam", "model": "CPRec-style"}
    messages.RecommendRequest(**full)
    messages.ExplainRequest(**ask, item_id="k-02", model="CPRec-style")
    found, listed = service.items({"limit": "5"}), service.recommend(full)
    why, beside = service.explain({**ask, "item_id": "k-02"}), service.baselines(full)
    for answer, kind in (
        (service.about(None), messages.About),
        (service.about(None)["domains"][0], messages.DomainSize),
        (service.about(None)["served"][0], messages.Served),
        (found, messages.FoundItems),
        (found["items"][0], messages.FoundItem),
        (listed, messages.RecommendResponse),
        (listed["items"][0], messages.ScoredItem),
        (why, messages.ExplainResponse),
        (why["parts"][0], messages.PartEffect),
        (why["events"][0], messages.EventEffect),
        (why["words"][0], messages.WordEffect),
        (why["domains"][0], messages.DomainEffect),
        (beside, messages.BaselinesResponse),
        (beside["lists"][0], messages.BaselineList),
        ({"error": "", "unknown": []}, messages.Problem),
    ):
        assert set(answer) == fields(kind), kind


def test_words_are_asked_for_without_a_history_and_beside_one(
    new_page: Any, served: Callable[..., Any], engine: Any, last_first: Any
) -> None:
    with served(Serving([engine], [last_first])) as client:
        page = new_page(address=f"{client.base_url}/")
        loaded(page)
        page.fill("#text", "dune messiah")
        page.keyboard.press("Enter")
        assert ranked(page) == ["Dune Messiah", "Dune"]
        assert texts(page, "#lists .facts span")[:2] == ["query", "proven"]
        assert page.inner_text("#lists-heading") == "“dune messiah” in books"
        page.locator("#baseline-lists .ranked").first.wait_for()
        assert texts(page, "#baseline-lists h3") == ["words", "last first"]
        page.get_by_role("button", name="Why Dune Messiah").click()
        page.locator(".effects").nth(1).wait_for()
        assert texts(page, ".effects .title") == ["model", "graph", "query", "messiah", "dune"]
        assert "It has “messiah”, “dune”." in page.inner_text(".why p")
        page.reload()
        assert page.input_value("#text") == "dune messiah" and ranked(page) == ["Dune Messiah", "Dune"]
        fill(page, "ulys")
        page.keyboard.press("Enter")
        assert page.is_visible("#outdated")
        page.click("#rank")
        page.locator("#lists .facts", has_text="query and history").wait_for()
        assert len(ranked(page)) == 6
        page.fill("#text", "quidditch")
        page.click("#rank")
        page.locator(".trouble", has_text="has any of its words").wait_for()


def test_the_page_and_the_service_understand_each_other(
    new_page: Any, served: Callable[..., Any], engine: Any, last_first: Any
) -> None:
    with served(Serving([engine], [last_first]), token="sesame") as client:
        page = new_page(address=f"{client.base_url}/")
        page.locator("#token-dialog").wait_for()
        page.keyboard.type("sesame")
        page.keyboard.press("Enter")
        loaded(page)
        for words in ("dune mess", "lud"):
            fill(page, words)
            page.keyboard.press("Enter")
        assert events(page) == ["Dune Messiah", "Ludo"]
        page.keyboard.press("Control+Enter")
        assert ranked(page)[:2] == ["Dune", "Emma"]
        assert texts(page, "#lists .facts span")[:2] == ["exact", "proven"]
        page.locator("#baseline-lists .ranked").first.wait_for()
        assert texts(page, "#baseline-lists h3") == ["last first"]
        page.get_by_role("button", name="Why Emma").click()
        page.locator(".effects").nth(1).wait_for()
        assert texts(page, ".effects .title") == ["model", "graph", "Ludo", "Dune Messiah"]
        page.reload()
        assert ranked(page)[:2] == ["Dune", "Emma"]
        page.evaluate("location.hash = 'domain=books&history=books:b0,games:none,games:g2'")
        page.locator(".trouble", has_text="does not know").wait_for()
        assert texts(page, ".trouble li") == ["none"]
        page.click("text=Take them out of the history")
        page.locator("#events", has_text="Go deluxe").wait_for()
        assert ranked(page)[0] == "Dune Messiah" and events(page) == ["Dune", "Go deluxe"]
        page.click("#clear")
        page.click("#example")
        assert ranked(page) and len(events(page)) == 5


# ---- how it looks ----------------------------------------------------------------------------------------------------

CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > .99) return colour;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()
      && !e.closest('.unseen, .skip, :disabled')
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 30)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_schemes(new_page: Any, service: Service, scheme: str) -> None:
    service.recommended = {"degraded": True}
    service.failures["baselines"] = [(500, {}, {"detail": "no baselines"})]
    page = new_page(LINK, color_scheme=scheme)
    ranked(page)
    page.locator(".ranked button", has_text="Why?").first.click()
    page.locator(".effects").first.wait_for()
    page.locator("footer summary").click()
    page.fill("#k", "4")
    page.dispatch_event("#k", "change")
    fill(page, "tea")
    assert page.evaluate(CONTRASTS) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 390, 700, 1000])
def test_nothing_is_wider_than_the_screen_and_fingers_find_the_buttons(
    new_page: Any, service: Service, width: int
) -> None:
    service.models = ["CPRec-style", "fine-tuning only"]
    service.titles["k-02"] = "Unbreakable" * 30
    page = new_page(LINK, viewport={"width": width, "height": 700}, has_touch=True)
    ranked(page)
    page.locator(".ranked button", has_text="Why?").first.click()
    page.locator(".effects").first.wait_for()
    page.locator("footer summary").click()
    fill(page, "e")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input, summary, [role=option]')].filter(e => "
        "e.checkVisibility() && !e.matches('.skip, [type=checkbox]'))"
        ".map(e => [e.getBoundingClientRect(), e.outerHTML.slice(0, 60)])"
        ".filter(([box]) => box.width < 28 || box.height < 28).map(([box, text]) => text)"
    )
    assert small == []


def test_every_control_has_a_name_and_nothing_turns_where_motion_is_unwanted(new_page: Any) -> None:
    page = new_page(LINK, reduced_motion="reduce")
    ranked(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter(e => !e.getAttribute('aria-label') && "
        "!e.textContent.trim() && !(e.labels && e.labels.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    turning = page.evaluate(
        "(() => { const e = document.createElement('div'); e.className = 'waiting'; document.body.append(e); "
        "return getComputedStyle(e, '::before').animationName; })()"
    )
    assert turning == "none"
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    assert headings[0] == 1 and all(after - before <= 1 for before, after in zip(headings, headings[1:], strict=False))


def test_pictures(new_page: Any, service: Service, tmp_path: Path) -> None:
    folder = Path(os.environ.get("CPREC_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    service.parts = {"language model": 3.2, "transition graph (titles)": 2.6, "EASE": 1.1, "popularity": -0.4}

    def picture(name: str, width: int, models: int, whole: bool = True, **options: Any) -> None:
        service.models = ["CPRec-style", "fine-tuning only"][:models]
        page = new_page(LINK.replace("k=6", "k=4"), viewport={"width": width, "height": 844}, **options)
        ranked(page)
        page.locator("#baseline-lists .ranked").first.wait_for()
        page.locator("#events", has_text=TITLES["k-01"]).wait_for()
        page.get_by_role("button", name="Why Bamboo tea strainer").first.click()
        page.locator(".effects").first.wait_for()
        top = "0" if whole else "document.getElementById('results').offsetTop - 8"
        page.evaluate(f"document.activeElement.blur(); window.scrollTo(0, {top})")
        page.mouse.move(0, 0)
        page.screenshot(path=folder / f"{name}.png", full_page=whole, animations="disabled")

    picture("serve", 1180, 1)
    picture("serve-dark", 1180, 1, color_scheme="dark")
    picture("serve-two", 1280, 2)
    picture("serve-phone", 390, 1, whole=False, device_scale_factor=2, is_mobile=True, has_touch=True)
    picture("serve-phone-dark", 390, 2, color_scheme="dark")

    service.models = ["CPRec-style"]
    page = new_page("#domain=kitchen&k=4&query=bamboo%20tea", viewport={"width": 1180, "height": 844})
    ranked(page)
    page.get_by_role("button", name="Why Bamboo tea strainer").first.click()
    page.locator(".effects").first.wait_for()
    page.screenshot(path=folder / "query.png", full_page=True, animations="disabled")

    page = new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    loaded(page)
    page.screenshot(path=folder / "first.png")
    fill(page, "tea")
    page.screenshot(path=folder / "search.png")
    page.keyboard.press("Enter")
    service.failures["recommend"] = [(503, {"Retry-After": "30"}, {"error": "64 requests wait already", "unknown": []})]
    page.click("#rank")
    page.locator(".trouble").wait_for()
    page.screenshot(path=folder / "busy.png", full_page=True)
    service.token = "sesame"
    page.click("#rank")
    page.locator("#token-dialog").wait_for()
    page.screenshot(path=folder / "token.png")
