"""The page in a real browser, where there is one: Debian's chromium, headless."""

import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.openai_server import serving_engines
from tests.support.turns import held_steps

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

expect.set_options(timeout=60_000)  # a machine that does much else
NARROW, WIDE = {"width": 360, "height": 640}, {"width": 1200, "height": 700}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    return page


@pytest.fixture(scope="module")
def one(chat_engine):
    """A model whose answers are greedy: none is drawn that ends before it has been looked at."""
    with serving_engines({"example": chat_engine}) as (url, [model]):
        model.defaults = {"temperature": 0.0}
        yield url, model.llm


@pytest.fixture
def open_page(browser):
    """Open the page; it may ask nobody but its server, and log nothing."""
    pages = []

    def open_(url, size=WIDE, scheme="light"):
        page = new_page(browser, viewport=size, color_scheme=scheme)
        problems = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((url, "data:")) else None)
        page.goto(url)
        pages.append((page, problems))
        return page

    yield open_
    for page, problems in pages:
        page.close()
        assert problems == []


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_a_person_talks_by_the_keyboard_alone(one, open_page, size, scheme):
    url, llm = one
    page = open_page(url, size, scheme)
    expect(page.locator("#models")).to_contain_text("(3.76x)")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("write a class")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_have_text("write a class")
    expect(page.locator(".text")).not_to_be_empty()
    page.keyboard.press("Escape")  # stops it
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".numbers")).to_have_text(re.compile(r"tokens/s, first after \d+ ms"))
    with held_steps(llm, first=20):  # some tokens come, and no more until the person has stopped it
        page.keyboard.type("and another")
        page.keyboard.press("Enter")
        expect(page.locator(".text").nth(1)).not_to_be_empty()
        page.keyboard.press("Tab")
        expect(page.locator("#stop")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_be_enabled()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 22, 20)"
    assert dark == (scheme == "dark")


def test_two_engines_answer_side_by_side_and_what_differs_is_marked(engine, open_page):
    with serving_engines({"fp16": engine("fp16"), "int4": engine("int4")}) as (url, _):
        page = open_page(url)
        page.fill("#input", "class Node:\n    def __init__(self, name, children=()):\n")
        page.click("#send")
        expect(page.locator("#send")).to_be_enabled()
        texts = page.locator(".text").all_text_contents()
        marks = [text.locator("mark").all_text_contents() for text in page.locator(".text").all()]
    assert len(texts) == 2
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), None)
    assert same is not None, "an example that 4 bits change was wanted"
    assert [text[same:] for text in texts] == ["".join(mark) for mark in marks]


def test_a_key_and_errors_are_asked_for_and_shown(engine, browser):
    with serving_engines({"example": engine("saw_int4")}, ["secret"]) as (url, _):
        page = new_page(browser)
        page.on("dialog", lambda dialog: dialog.accept("secret"))
        page.goto(url)
        expect(page.locator("#models")).to_contain_text("example")
        page.fill("#input", "x" * 60000)
        page.press("#input", "Enter")
        expect(page.locator(".failed")).to_contain_text("the prompt has")
        page.close()
