"""The page in a browser: what it shows, what it asks, and that anybody can use it. Screenshots go to build/page/."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, open_browser, open_page
from mock_worker import Script
from playwright.async_api import Browser, Page, expect
from router_stack import Stack, StartStack, until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.keys import new_key, write_keys
from tokenrelay.services.router.mesh_feed import FEED
from tokenrelay.services.router.trails import Trails

SHOTS = Path(__file__).resolve().parents[2] / "build/page"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 * (20 + 1)"}}\n</tool_call>'
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> & <b>bold</b>"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with open_browser() as browser:
        yield browser


@pytest.fixture
async def quick(stack: Stack) -> Stack:
    """A stack whose snapshots come faster than a test has patience for."""
    stack.service._runner.app[FEED]._every_s = 0.2
    return stack


def answers(stack: Stack, *texts: str) -> None:
    """One answer after the other; the last one for good."""
    left = list(texts)

    def answer(submit: worker_pb2.Submit) -> Script:
        text = left.pop(0) if len(left) > 1 else left[0]
        return Script([*stack.worker.ids(text), stack.worker.eos])

    stack.worker.host.answer = answer


async def hand_over(trails: Trails) -> None:
    """Requests with two legs, as legs.py notes them."""
    for number, last in enumerate(("prefill", "offered", "handed_over", "ended", "handover_failed")):
        arrived_s = time.monotonic() - 0.002
        trail = trails.begin(f"req-two-legs-{number}", prompt_tokens=5000 + number, arrived_s=arrived_s)
        trail.note("prefill", worker="unix:/run/prefill-0.sock", to="unix:/run/decode-1.sock", detail="4096 tokens")
        await asyncio.sleep(0.02)
        if last == "handover_failed":
            trail.note("handover_failed", worker="unix:/run/prefill-0.sock", detail="the lease ended")
            trail.note("moved", worker="unix:/run/prefill-0.sock", detail="handover")
            trail.note("submitted", worker="unix:/run/decode-1.sock")
        elif last != "prefill":
            trail.note("offered", worker="unix:/run/prefill-0.sock", to="unix:/run/decode-1.sock")
        if last in ("handed_over", "ended"):
            await asyncio.sleep(0.03)
            trail.first_token(512, 0)
            await asyncio.sleep(0.01)
            trail.note("handed_over", worker="unix:/run/prefill-0.sock", to="unix:/run/decode-1.sock")
            await asyncio.sleep(0.04)
        if last == "ended":
            trail.end("stop", 37)


async def settled(page: Page) -> None:
    await expect(page.locator("#link")).to_have_attribute("data-state", "live")
    await expect(page.locator("#workers li")).not_to_have_count(0)


async def fits(page: Page) -> bool:
    """Nothing is wider than the window."""
    return bool(await page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


async def test_the_mesh_is_shown_on_a_desk_and_on_a_phone(quick: Stack, browser: Browser) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    quick.worker.host.step_s = 0.01
    answers(quick, "one two three four five six seven eight nine ten")
    for _ in range(3):
        await quick.chat()
    await hand_over(quick.service.pool.trails)
    async with open_page(browser, quick.url) as page:
        await settled(page)
        await expect(page.locator("#model")).to_have_text("mock")
        worker = page.locator("#workers li").first
        await expect(worker.locator(".state")).to_contain_text("ready")
        await expect(worker.locator(".legend")).to_contain_text("free 1,024")
        await expect(page.locator("#handovers li")).to_have_count(5)
        stages = await page.locator("#handovers li").evaluate_all("rows => rows.map((row) => row.dataset.stage)")
        assert stages == ["failed", "done", "decoding", "pulling", "computing"]
        await expect(page.locator("#requests tr")).to_have_count(8)
        await page.get_by_role("button", name="Timeline of req-two-legs-3").click()
        await expect(page.locator("#timeline-lanes .lane")).to_have_count(4)
        await expect(page.locator("#timeline-notes")).to_contain_text("decode-1 has the KV of prefill-0 and decodes")
        await expect(page.locator(".chart path.line")).not_to_have_count(0)
        await page.screenshot(path=SHOTS / "light.png", full_page=True)
        assert await fits(page)
    async with open_page(browser, quick.url, dark=True) as page:
        await settled(page)
        await page.screenshot(path=SHOTS / "dark.png", full_page=True)
    async with open_page(browser, quick.url, viewport=PHONE) as page:
        await settled(page)
        await page.locator("#requests button").first.click()
        assert await fits(page), "no sideways scrolling at 360 px"
        await page.screenshot(path=SHOTS / "phone.png", full_page=True)


async def test_a_chat_with_a_tool_call(quick: Stack, browser: Browser) -> None:
    answers(quick, f"<think>\nI use the tool.\n</think>\nLet me see.\n{CALL}", "It is 42.")
    async with open_page(browser, quick.url) as page:
        await settled(page)
        await page.get_by_label("Offer demo tools").check()
        await page.get_by_label("Message").fill("What is 2 * (20 + 1)?")
        await page.keyboard.press("Enter")
        log = page.get_by_role("log")
        await expect(log).to_contain_text("It is 42.")
        await expect(log.locator(".call")).to_contain_text("calculator")
        await expect(log.locator(".call .result")).to_contain_text("42")
        await expect(log.locator("details")).to_contain_text("I use the tool.")
        await expect(log.locator('[aria-busy="true"]')).to_have_count(0)
        await expect(page.get_by_label("Message")).to_have_value("")
        first, second = quick.worker.submits
        prompt = quick.worker.tokenizer.decode(
            [int.from_bytes(second.token_ids[at : at + 4], "little") for at in range(0, len(second.token_ids), 4)],
            skip_special_tokens=False,
        )
        assert first.tools and "tool\n42" in prompt and "Let me see." in prompt
        await log.get_by_role("button", name="Timeline").first.click()
        await expect(page.locator("#timeline-title")).to_be_focused()
        SHOTS.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=SHOTS / "chat.png", full_page=True)


async def test_text_of_a_model_and_of_an_error_is_text(quick: Stack, browser: Browser) -> None:
    answers(quick, HOSTILE)
    async with open_page(browser, quick.url, expect="400") as page:
        await settled(page)
        await page.get_by_label("Message").fill(HOSTILE)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".turn.assistant")).to_have_text(HOSTILE)
        await expect(page.locator(".turn.user")).to_have_text(HOSTILE)
        await page.evaluate("document.getElementById('chat-tools').checked = false")
        await page.get_by_label("Message").fill("long " * 19_000)
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_role("alert")).to_contain_text("context")
        assert await page.locator(".turn img, .turn script, .turn b").count() == 0
        assert await page.title() != "taken"


async def test_a_stopped_answer_ends_at_the_worker(quick: Stack, browser: Browser) -> None:
    ids = quick.worker.ids("words that never end")
    quick.worker.host.answer = lambda submit: Script(ids, finish=worker_pb2.FINISH_NONE)
    async with open_page(browser, quick.url) as page:
        await settled(page)
        await page.get_by_label("Message").fill("Go on")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".turn.assistant")).to_contain_text("never end")
        await page.get_by_role("button", name="Stop").click()
        await until(lambda: quick.worker.running == 0)
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        await expect(page.locator(".turn.error")).to_have_count(0)


async def test_a_key_is_asked_for_and_kept_in_the_tab(
    start_stack: StartStack, browser: Browser, tmp_path: Path
) -> None:
    plain, record = new_key("plain")
    admin, boss = new_key("boss", admin=True)
    write_keys(tmp_path / "keys.json", [record, boss])
    stack = await start_stack(keys=str(tmp_path / "keys.json"))
    async with open_page(browser, stack.url, expect="the server responded with a status of 40") as page:
        dialog = page.get_by_role("dialog", name="API key")
        await expect(dialog).to_contain_text("key")
        await page.get_by_label("Key", exact=True).fill("tr-nobodys")
        await dialog.get_by_role("button", name="Use").click()
        await expect(dialog).to_be_visible()
        await expect(page.locator("#key-input")).to_have_value("tr-nobodys")
        await page.get_by_label("Key", exact=True).fill(plain)
        await dialog.get_by_role("button", name="Use").click()
        await expect(page.locator("#link-text")).to_contain_text("may chat")
        await expect(dialog).to_be_hidden()
        await page.get_by_label("Message").fill("Hi")
        await page.keyboard.press("Enter")
        await expect(page.locator(".turn.assistant")).to_have_text("Hello world!")
        await page.get_by_role("button", name="API key").click()
        await page.get_by_label("Key", exact=True).fill(admin)
        await dialog.get_by_role("button", name="Use").click()
        await settled(page)
        assert await page.evaluate("sessionStorage.getItem('tokenrelay.key')") == admin
        elsewhere = json.dumps(await page.evaluate("({...localStorage})")) + await page.evaluate("document.cookie")
        assert admin not in elsewhere and plain not in elsewhere
        await page.get_by_role("button", name="API key").click()
        await dialog.get_by_role("button", name="Forget").click()
        assert await page.evaluate("sessionStorage.getItem('tokenrelay.key')") is None


async def test_it_comes_back_and_says_what_changed(quick: Stack, browser: Browser) -> None:
    async with open_page(browser, quick.url) as page:
        await settled(page)
        await quick.worker.stop()
        await expect(page.locator("#workers .state")).to_contain_text("away")
        await expect(page.locator("#workers .why")).not_to_be_empty()
        await expect(page.locator("#announce")).to_contain_text("is away")
        await quick.worker.start()
        await expect(page.locator("#announce")).to_contain_text("is ready")
        await page.route("**/mesh/events", lambda route: route.abort())
        quick.service.state.handing_over = True  # the stream ends
        await expect(page.locator("#link")).to_have_attribute("data-state", "lost")
        quick.service.state.handing_over = False
        await page.unroute("**/mesh/events")
        await expect(page.locator("#link")).to_have_attribute("data-state", "live")


async def test_it_can_be_used_with_the_keyboard(quick: Stack, browser: Browser) -> None:
    await quick.chat()
    async with open_page(browser, quick.url) as page:
        await settled(page)
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the mesh")).to_be_focused()
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        button = page.locator("#requests button").first
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#timeline-title")).to_be_focused()
        await expect(button).to_have_attribute("aria-expanded", "true")
        await page.keyboard.press("Escape")
        await expect(button).to_be_focused()
        await expect(page.locator("#timeline")).to_be_hidden()
        await page.locator("#chart-ttft svg").focus()
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#chart-ttft .readout")).to_contain_text("s ago")
        theme = page.get_by_role("button", name="Theme")
        await theme.click()
        await theme.click()
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
        await page.reload()
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"


# Elements with text of their own whose contrast on what lies behind them is too low, and controls without a name.
AUDIT = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(node).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility() || node.closest("[aria-hidden], .sr, .skip")) continue;
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || node.closest("button:disabled")) continue;
    const svg = node.namespaceURI.endsWith("svg");
    const ink = rgb(svg ? getComputedStyle(node).fill : getComputedStyle(node).color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${node.tagName} ${node.className?.baseVal ?? node.className}: ${ratio.toFixed(2)}`);
  }
  for (const node of document.querySelectorAll("button, input, textarea, [tabindex='0'], dialog, aside, section")) {
    const by = node.getAttribute("aria-labelledby");
    const name = node.getAttribute("aria-label") || (by && document.getElementById(by)?.textContent)
      || node.labels?.[0]?.textContent || node.textContent;
    if (!name?.trim()) bad.push(`${node.tagName} ${node.id} has no name`);
  }
  if (document.querySelectorAll("h1, main, header, aside, footer").length < 5) bad.push("a landmark is missing");
  return bad;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_can_be_read(quick: Stack, browser: Browser, dark: bool) -> None:
    answers(quick, f"Let me see.\n{CALL}", "It is 42.")
    await hand_over(quick.service.pool.trails)
    async with open_page(browser, quick.url, dark=dark, viewport=DESKTOP) as page:
        await settled(page)
        await page.get_by_label("Offer demo tools").check()
        await page.get_by_label("Message").fill("What is 2 * 21?")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("log")).to_contain_text("It is 42.")
        await page.locator("#requests button").first.click()
        assert await page.evaluate(AUDIT) == []


UNITS = (Path(__file__).parent / "page_units.js").read_text()


async def test_the_logic_of_the_page(quick: Stack, browser: Browser) -> None:
    async with open_page(browser, quick.url) as page:
        found: dict[str, Any] = await page.evaluate(UNITS)
    assert found["plain"] == [["queued", 0, 1, ""], ["prefill", 1, 20, "a"], ["decode", 20, 90, "a"]]
    assert found["legs"][1:] == [["prefill", 1, 20, "p"], ["transfer", 20, 30, "d"], ["decode", 30, 100, "d"]]
    assert [bar[0] for bar in found["moved"]] == ["queued", "prefill", "decode", "moved", "queued", "decode"]
    assert found["moved"][-1] == ["decode", 60, 100, "b"]
    assert found["waited"][1:3] == [["waiting", 1, 10, "a"], ["prefill", 10, 20, "a"]]
    assert found["other"] == [["queued", 0, 100, ""]] and found["fresh"] == [["queued", 0, 0, ""]]
    assert found["states"] == [["prompt", False], ["unavailable", True], ["stop", False]]
    assert found["words"] == "leaves w-1 (drain) and goes on elsewhere"
    events = [(event["event"], event["data"]) for event in found["events"]]
    assert events == [("a", "1"), ("message", " two\n2"), ("message", "3")] and found["splits"] == 0
    bad = "error: not an arithmetic expression"
    assert found["sums"] == ["14", "3.5", "-2", "error: division by zero", *[bad] * 7]
    assert found["tools"][0].startswith("Meeting") and found["tools"][1] == "error: no such file"
    assert found["tools"][2:4] == ["notes.txt\nsrc/\ntodo.txt", "app.py"]
    assert found["tools"][4:] == ["error: no tool nothing", *["error: wrong arguments"] * 3]
    assert found["names"] == ["calculator", "list_files", "read_file"]
    assert found["tops"] == [1, 1, 1, 5, 20, 100, 200, 50000]
    assert [(call["id"], call["function"]["arguments"]) for call in found["calls"]] == [("a", "{}"), ("b", "")]
    assert found["durations"] == ["0.8 ms", "850 ms", "2.40 s", "3 min 5 s", "–"]
    assert found["workers"] == ["w-0", "10.0.0.1:70"]
