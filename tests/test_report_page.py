"""The report in a real browser: Debian's Chromium, headless, driven by Playwright, which downloads nothing here."""

import re
import shutil

import pytest

from trl_quietstar.evaluation.page import render_page

from .pages import HOSTILE, hostile_texts


playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (`apt-get install chromium`)")

HISTORY = [
    {"step": step, "rl/reward": 0.01 * step, "rl/nll_with": 3 / (step + 1), "rl/nll_without": 2.0, "rl/entropy": 1.5}
    for step in range(5)
]
GAINS = (0.5, -0.5, 0.2, -0.2, 0.05, -0.05, 0.02, -0.02, 0.0, None)


def thought(gain: float | None, name: str) -> dict:
    """A thought as the page gets it."""
    return {"text": f"thought {name}", "gain": gain, "weight": 0.25, "nll_with": [1.5, 0.25]}


def example_texts() -> list[dict]:
    """Two texts of thirty tokens on several lines, with every shade; the second starts with a prompt."""
    texts = []
    for t in range(2):
        tokens = []
        for i in range(30):
            thoughts = [thought(GAINS[i % 10], f"{t}-{i}"), thought(0.001, f"{t}-{i} b")]
            quiet = i > 27 or (t == 1 and i < 3)
            piece = f" word{i}" + ("\n" if i % 10 == 9 else "")
            nll = {"nll_without": 2.0 + i, "nll_with": 1.5}
            tokens.append({"piece": piece, **nll, "thoughts": [] if quiet else thoughts})
        texts.append({"tokens": tokens})
    return texts


@pytest.fixture(scope="module")
def browser():
    """Chromium, once for all tests."""
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page; it must load nothing else and complain about nothing."""
    contexts, requests, complaints = [], [], []

    def opened(texts=None, title="Thoughts", notes=(), anchor="", **options):
        file = tmp_path / "report.html"
        texts = example_texts() if texts is None else texts
        file.write_text(render_page(title, texts, notes, HISTORY), encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(file.as_uri() + anchor)
        return page

    opened.complaints = complaints
    yield opened
    for context in contexts:
        context.close()
    assert all(url.startswith("file:") or url == "data:," for url in requests) and len(requests) >= 1
    assert complaints == []


def focused(page) -> str:
    """Id of the element that has the focus."""
    return page.evaluate("document.activeElement.id")


def details(page) -> str:
    """What the page says of the chosen token."""
    return page.inner_text("#details")


def contrast(page, selector: str) -> float:
    """The least contrast of text and background among the elements, by WCAG's formula."""
    return page.evaluate(
        """(selector) => {
        const rgb = (colour) => colour.match(/[\\d.]+/g).slice(0, 4).map(Number);
        const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        const light = (colour) => rgb(colour).slice(0, 3).map(linear).reduce((s, c, i) => s + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (node) => {
            for (let at = node; at; at = at.parentElement) {
                const colour = getComputedStyle(at).backgroundColor;
                if (rgb(colour)[3] !== 0) return colour;
            }
        };
        return Math.min(...[...document.querySelectorAll(selector)].map((node) => {
            const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        }));
    }""",
        selector,
    )


def test_the_text_is_all_there(show):
    """Every piece, in order, spaces and line ends as they are."""
    page = show()
    shown = page.eval_on_selector_all(".text", "boxes => boxes.map((box) => box.textContent)")
    assert shown == ["".join(token["piece"] for token in text["tokens"]) for text in example_texts()]


def test_hostile_text_is_inert(show):
    """In tokens, thoughts, excerpts, title and notes: no element is made of it, nothing runs, all of it can be read."""
    page = show(hostile_texts(), HOSTILE, [HOSTILE])
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    page.focus("#t0-0")
    assert page.text_content("#details .thoughts .quote") == HOSTILE
    assert page.text_content("#extremes bdi") == HOSTILE
    assert page.text_content("h1") == HOSTILE and page.text_content("header p") == HOSTILE
    assert page.text_content(".text") == HOSTILE * 2


def test_nothing_else_may_run(show):
    """Were markup to get in all the same, the policy would stop its scripts."""
    page = show()
    page.evaluate(
        """() => { const made = document.createElement("script"); made.textContent = "window.ran = true";
        document.body.append(made); }"""
    )
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in show.complaints.pop()


def test_the_colour_is_not_alone(show):
    """Each token says its gain to those who see no colours, and the colour has its sign and its size."""
    page = show()
    labels = page.eval_on_selector_all("#texts .thinks", "all => all.map((x) => [x.className, x.ariaLabel])")
    expected = ["helped-4", "hurt-4", "helped-3", "hurt-3", "helped-2", "hurt-2", "helped-1", "hurt-1", "neutral"]
    for (classes, label), shade, gain in zip(labels, expected, GAINS, strict=False):
        assert shade in classes.split()
        assert f"{abs(gain):.3f}" in label and ("−" in label) == (gain < 0)
    assert "undefined" in labels[9][1]


def test_keys_move_and_the_details_follow(show):
    """Tab enters each text once; arrows, Home and End move; the panel shows the thoughts of where the focus is."""
    page = show()
    page.keyboard.press("Tab")
    assert focused(page) == "t0-0" and "thought 0-0" in details(page)
    for key, token in [
        *(("ArrowRight", "t0-1"), ("ArrowRight", "t0-2"), ("ArrowLeft", "t0-1"), ("ArrowDown", "t0-11")),
        *(("ArrowUp", "t0-1"), ("End", "t0-27"), ("ArrowRight", "t0-27"), ("Home", "t0-0"), ("ArrowUp", "t0-0")),
    ]:
        page.keyboard.press(key)
        assert focused(page) == token, key
        name = token.removeprefix("t")
        assert f"thought {name}\n" in details(page) and f"thought {name} b" in details(page)
    page.keyboard.press("Tab")
    assert focused(page) == "t1-3"  # the prompt's tokens have no thoughts
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "t0-0"


def test_escape_clears(show):
    """The panel is empty again, the place is kept, and Enter brings the details back."""
    page = show()
    page.focus("#t0-4")
    assert page.get_attribute("#t0-4", "aria-current") == "true"
    page.keyboard.press("Escape")
    assert "thought 0-4" not in details(page) and page.locator("[aria-current]").count() == 0
    page.keyboard.press("Enter")
    assert "thought 0-4" in details(page)
    page.keyboard.press("ArrowRight")
    assert focused(page) == "t0-5"


def test_hovering_shows_and_leaving_brings_back(show):
    """What the pointer is on is shown for as long; what was chosen stays chosen."""
    page = show()
    page.hover("#t0-7")
    assert "thought 0-7" in details(page)
    page.mouse.move(1, 1)
    assert "Choose a token" in details(page)
    page.click("#t0-2")
    page.hover("#t0-7")
    assert "thought 0-7" in details(page)
    page.mouse.move(1, 1)
    assert "thought 0-2" in details(page)


def test_the_details_are_the_data(show):
    """Gain, weight, and the NLL of each following token without and after each thought."""
    page = show()
    page.focus("#t0-1")
    assert "3.000 nats without a thought before it, 1.500 with" in details(page)
    assert "−0.500 nats" in details(page) and "weight 0.25" in details(page)
    rows = page.eval_on_selector_all("#details tr", "rows => rows.map((r) => [...r.cells].map((c) => c.textContent))")
    assert rows[1:] == [[" word2", "4.00", "1.50", "1.50"], [" word3", "5.00", "0.25", "0.25"]]


def test_links_of_the_summary_lead_to_their_tokens(show):
    """By mouse and by keyboard; the token has the focus, is in view, and its thought is shown."""
    page = show(viewport={"width": 800, "height": 400})
    links = page.locator("#extremes a")
    assert links.count() == 10
    for n in (0, 9):
        target = links.nth(n).get_attribute("href").removeprefix("#")
        for act in (lambda link: link.click(), lambda link: link.press("Enter")):
            page.evaluate("document.activeElement.blur()")
            act(links.nth(n))
            assert focused(page) == target and f"thought {target[1:]}" in details(page)
            box = page.locator(f"#{target}").bounding_box()
            assert 0 <= box["y"] and box["y"] + box["height"] <= page.locator("#details").bounding_box()["y"]


def test_an_address_leads_to_a_token(show):
    """`report.html#t1-5` opens with that token chosen."""
    page = show(anchor="#t1-5")
    assert focused(page) == "t1-5" and "thought 1-5" in details(page)


def test_light_and_dark(show):
    """Both schemes, legible: text on every shade has WCAG's 4.5 to 1 or more."""
    seen = []
    for scheme in ("light", "dark"):
        page = show(color_scheme=scheme)
        page.focus("#t0-0")
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (".scale li", ".token", "#details *", "#extremes a *", "header *", "figure li"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_nothing_is_cut_at_any_width(width, show):
    """No sideways scrolling."""
    page = show(viewport={"width": width, "height": 700})
    page.focus("#t0-9")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_plots_have_names_and_numbers(show):
    """Reward, NLL and entropy over steps; each says in words what it shows."""
    page = show()
    names = page.eval_on_selector_all("figure > svg", "all => all.map((x) => x.getAttribute('aria-label'))")
    assert [re.split(r"[ ,]", name)[0] for name in names] == ["Reward", "NLL", "Entropy"]
    assert page.locator("figure circle.with").count() == 15
    assert "step 4: 0.04" in page.locator("figure circle.with title").nth(4).text_content()
