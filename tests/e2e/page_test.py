#!/usr/bin/env python3
"""The page in headless Chromium against the real server: python3 tests/e2e/page_test.py build/jointkv SCREENSHOTS

Exits with 77 when there is no Chromium, or no model file (JOINTKV_MODEL, or the one that `make setup` fetches).
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request

from browser import Browser, Tab, find_chromium

SKIPPED = 77
START_S = 120
KEYS = [{"key": "for-the-team", "tenant": "team", "admin": True}]
STORY = "Write a very long story about a harbour, a lighthouse and the people who live there."


def model_path():
    cache = os.environ.get("JOINTKV_CACHE") or pathlib.Path.home() / ".cache" / "jointkv"
    return pathlib.Path(os.environ.get("JOINTKV_MODEL") or
                        pathlib.Path(cache) / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")


class Server:
    def __init__(self, *options):
        self.process = subprocess.Popen([PROGRAM, "serve", "--port", "0", "--kv-bytes", "256M", *options],
                                        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8")
        self.log = []
        self.url = None
        ready = threading.Event()

        def read():
            for line in self.process.stderr:
                self.log.append(line)
                if found := re.search(r"ready: page (http://\S+?)/[, ]", line):
                    self.url = found[1]
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        if not ready.wait(START_S) or self.url is None:
            self.process.kill()
            raise RuntimeError("the server did not start: " + "".join(self.log))

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.headers, response.read().decode()

    def status(self):
        return json.loads(self.get("/jointkv/status")[1])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class PageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(lambda: cls.server.stop())
        cls.browser = Browser(CHROMIUM)
        cls.addClassCleanup(cls.browser.close)

    def open(self, **look):
        tab = Tab(self.browser)
        self.addCleanup(tab.close)
        tab.show_as(**look)
        tab.go(self.server.url)
        tab.wait("document.getElementById('connection').textContent === 'Ready'")
        tab.wait("document.getElementById('model').textContent")
        return tab

    def set(self, tab, field, value):
        tab.run(f"""(() => {{ const field = document.getElementById({json.dumps(field)});
            field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")

    def ask(self, tab, text):
        tab.click("#prompt")
        tab.type(text)
        tab.press("Enter")

    def ask_for_a_long_story(self, tab):
        """Which goes on whether or not the model would end it."""
        tab.run("""(() => { const send = window.fetch; window.fetch = (url, options) => send(url, options?.body
            ? {...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})} : options); })()""")
        self.set(tab, "max_tokens", 4000)
        self.set(tab, "temperature", 1.5)
        self.ask(tab, STORY)

    def wait_for(self, condition, what):
        """Until it holds for the server's status, which is made anew twice a second."""
        end = time.monotonic() + 60
        while not condition(self.server.status()):
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.1)

    def wait_for_idle(self):
        self.wait_for(lambda status: status["running"] + status["waiting"] == 0, "requests still run")

    def assert_no_complaints(self, tab):
        self.assertEqual(tab.complaints(), [])

    def test_files_come_with_a_strict_policy(self):
        for path in ["/", "/page/style.css", "/page/main.js"]:
            headers, body = self.server.get(path)
            self.assertTrue(body)
            self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
            self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        with self.assertRaises(urllib.error.HTTPError) as missing:
            self.server.get("/page/../serve.cc")
        self.assertEqual(missing.exception.code, 404)

    def test_a_chat_streams_and_the_map_changes(self):
        tab = self.open()
        self.assertIn("Nothing runs", tab.text("#map-empty"))
        self.set(tab, "max_tokens", 200)
        tab.run("""window.lengths = new Set(); new MutationObserver(() => {
            const text = document.querySelector('.message.assistant .text');
            if (text) window.lengths.add(text.textContent.length); })
            .observe(document.getElementById('log'), {subtree: true, childList: true})""")
        self.ask(tab, STORY)
        tab.wait("document.querySelector('#map .request canvas')?.width > 0")
        first = tab.text("#map .request h3")
        tab.wait("document.querySelector('.message.assistant .facts')")
        self.assertGreater(tab.run("window.lengths.size"), 20)
        self.assertRegex(tab.text(".message.assistant .facts"), r"^\d+ tokens · [\d.]+ tok/s · first after")
        self.assertEqual(tab.run("document.querySelectorAll('[aria-busy]').length"), 0)
        self.assertRegex(first, r"Request \d+\s+(prefill|decode) · \d+ tokens · \d+ blocks")
        tab.wait("document.querySelector('#map .request.ended')")
        self.assertNotEqual(tab.text("#map .request h3"), first)
        self.assertGreater(tab.run("document.querySelectorAll('#chart-memory polyline').length"), 0)

        # The next turn sends the first along, from the cache.
        self.ask(tab, "Shorter, please.")
        tab.wait("document.querySelectorAll('.message.assistant .facts').length === 2")
        self.assertIn("from the cache", tab.run("document.querySelectorAll('.facts')[1].textContent"))
        tab.click("#clear")
        self.assertEqual(tab.run("document.querySelectorAll('.message').length"), 0)
        self.assert_no_complaints(tab)

    def test_stop_ends_the_request(self):
        tab = self.open()
        self.ask_for_a_long_story(tab)
        tab.wait("document.querySelector('.message.assistant .text')?.textContent.length > 20")
        self.wait_for(lambda status: status["running"] > 0, "the request does not run")
        tab.click("#stop")
        tab.wait("document.querySelector('.facts')?.textContent === 'Stopped.'")
        self.wait_for_idle()
        length = tab.run("document.querySelector('.message.assistant .text').textContent.length")
        self.assertGreater(length, 20)
        self.assertFalse(tab.run("document.getElementById('send').hidden"))
        self.assert_no_complaints(tab)

    def test_text_is_never_markup(self):
        tab = self.open()
        self.set(tab, "max_tokens", 8)
        markup = "<img src=x onerror=alert(1)><b>bold</b>"
        self.ask(tab, markup)
        tab.wait("document.querySelector('.message.assistant .facts')")
        self.assertEqual(tab.text(".message.user .text"), markup)
        self.assertEqual(tab.run("document.querySelectorAll('#log img, #log b').length"), 0)

    def test_errors_are_said_and_can_be_tried_again(self):
        tab = self.open()
        tab.run("""window.realFetch = window.fetch; window.fetch = (path, options) =>
            path.includes('chat') ? Promise.reject(new TypeError('Failed to fetch')) : realFetch(path, options)""")
        self.set(tab, "max_tokens", 8)
        self.ask(tab, "Hello")
        tab.wait("document.querySelector('#log .notice')")
        self.assertIn("cannot be reached", tab.text("#log .notice"))
        tab.run("window.fetch = window.realFetch")
        tab.click("#log .notice button")
        tab.wait("document.querySelector('.message.assistant .facts')")
        self.assertEqual(tab.run("document.querySelectorAll('#log .notice').length"), 0)
        self.assertEqual(tab.run("document.querySelectorAll('.message.user').length"), 1)

        self.ask(tab, "word " * 9000)
        tab.wait("document.querySelector('#log .notice')")
        self.assertRegex(tab.text("#log .notice"), r"\d+ tokens")  # the server's own words

    def test_settings_are_checked_and_kept(self):
        tab = self.open()
        self.set(tab, "temperature", 7)
        self.ask(tab, "Hello")
        self.assertTrue(tab.run("document.getElementById('settings').open"))
        self.assertEqual(tab.run("document.querySelectorAll('.message').length"), 0)
        self.set(tab, "temperature", 0)
        self.set(tab, "seed", "17")
        tab.run("document.getElementById('kv_fusion').click()")
        self.assertIn("fusion off · seed 17", tab.text("#settings-summary"))
        tab.go(self.server.url)
        self.assertIn("temperature 0", tab.text("#settings-summary"))
        self.assertIn("fusion off · seed 17", tab.text("#settings-summary"))

    def test_the_demo_load_is_fused_and_looks_right(self):
        wide = self.open()
        dark = self.open(dark=True)
        phone = self.open(width=390, height=844, phone=True)
        wide.screenshot(OUT / "light-empty.png")
        phone.screenshot(OUT / "phone-empty.png")
        self.assertNotEqual(wide.run("getComputedStyle(document.body).backgroundColor"),
                            dark.run("getComputedStyle(document.body).backgroundColor"))
        for tab in (wide, dark, phone):
            self.set(tab, "max_tokens", 400)
            self.ask(tab, STORY)
        phone.click("#view-memory")
        wide.click("#demo")
        for tab in (wide, dark, phone):
            tab.wait("/[1-9]\\d % fused/.test(document.getElementById('map').textContent)")
        wide.screenshot(OUT / "light.png")
        dark.screenshot(OUT / "dark.png")
        phone.screenshot(OUT / "phone-memory.png")
        wide.wait("parseFloat(document.getElementById('compression').textContent) > 1")
        phone.click("#view-chat")
        phone.screenshot(OUT / "phone-chat.png")
        phone.run("document.getElementById('settings').open = true")
        phone.screenshot(OUT / "phone-settings.png")
        for tab in (wide, dark, phone):
            self.assertLessEqual(tab.run("document.documentElement.scrollWidth - innerWidth"), 0)
            self.assert_no_complaints(tab)
        if wide.text("#demo") != "Run a demo load":
            wide.click("#demo")
        wide.wait("document.getElementById('demo').textContent === 'Run a demo load'")
        for tab in (wide, dark, phone):
            tab.run("document.getElementById('stop').click()")
        self.wait_for_idle()

    def test_the_keyboard_reaches_everything(self):
        tab = self.open()
        self.set(tab, "max_tokens", 120)
        self.ask(tab, STORY)
        tab.wait("document.querySelector('#map canvas')")
        tab.wait("document.querySelector('#map .request.ended')")
        reached = []
        for _ in range(30):
            tab.press("Tab")
            reached.append(tab.run("document.activeElement.id || document.activeElement.tagName"))
        for name in ["log", "SUMMARY", "prompt", "send", "clear", "demo", "CANVAS"]:
            self.assertIn(name, reached)
        tab.run("document.querySelector('#map canvas').focus()")
        readout = tab.text("#readout")
        self.assertRegex(readout, r"layer 0, block 0 \(tokens 0 to \d+\): K \w+.*, \d+ reader")
        tab.press("ArrowDown")
        self.assertIn("layer 1, block 0", tab.text("#readout"))
        tab.press("ArrowRight")
        self.assertIn("layer 1, block 1", tab.text("#readout"))
        tab.press("End")
        self.assertNotIn("block 1 ", tab.text("#readout"))
        self.assertEqual(tab.run("""[...document.querySelectorAll('input, textarea, button')].filter((node) =>
            !(node.labels?.length || node.textContent.trim() || node.ariaLabel)).map((node) => node.id)"""), [])

    def test_escape_stops_only_where_it_is_meant(self):
        tab = self.open()
        self.ask_for_a_long_story(tab)
        tab.wait("document.querySelector('.message.assistant .text')?.textContent.length > 20")
        running = "document.querySelector('[aria-busy]') && !document.querySelector('.facts')"
        tab.run("document.getElementById('settings').open = true")
        for field in ["seed", "system"]:
            tab.run(f"document.getElementById('{field}').focus()")
            tab.press("Escape")
        tab.run("document.querySelector('#settings summary').focus()")
        tab.press("Escape")
        tab.run("document.getElementById('prompt').focus()")
        tab.call("Input.imeSetComposition", text="に", selectionStart=1, selectionEnd=1)
        tab.press("Escape")
        tab.call("Input.imeSetComposition", text="", selectionStart=0, selectionEnd=0)
        tab.run("""document.getElementById('prompt').addEventListener('keydown',
            (event) => event.preventDefault(), {once: true})""")
        tab.press("Escape")
        self.assertTrue(tab.run(running))
        tab.press("Escape")
        tab.wait("document.querySelector('.facts')?.textContent === 'Stopped.'")
        self.wait_for_idle()
        self.assert_no_complaints(tab)

    def test_the_map_tells_of_what_is_pointed_at(self):
        for look in [{}, {"width": 390, "height": 844, "phone": True}]:
            tab = self.open(**look)
            self.ask_for_a_long_story(tab)
            point = tab.tap_at if look else tab.click_at
            if look:
                tab.click("#view-memory")
            tab.wait("document.querySelector('#map canvas')?.width > 0")
            for share, layer in [(0, 0), (0.5, 15), (1, 29)]:  # of 30
                x, y = tab.run(f"""(() => {{ const node = document.querySelector('#map canvas');
                    node.scrollIntoView({{block: 'center'}}); const box = node.getBoundingClientRect();
                    return [box.x + 1, box.y + 1 + {share} * (box.height - 2)]; }})()""")
                point(x, y)
                tab.wait(f"document.getElementById('readout').textContent.includes(', layer {layer}, block 0 ')")
            self.assertRegex(tab.text("#readout"), r"^Request \d+, layer 29, block 0 \(tokens 0 to \d+\): K \w+.*, \d+ reader")
            if look:
                tab.click("#view-chat")
            tab.run("document.getElementById('stop').click()")
            self.wait_for_idle()
            self.assert_no_complaints(tab)

    def test_charts_stay_in_their_boxes(self):
        tab = self.open()
        self.set(tab, "max_tokens", 60)
        self.ask(tab, STORY)
        tab.wait("document.querySelectorAll('#chart-memory polyline').length > 0")
        outside = """(root) => { const { width, height } = root.viewBox.baseVal; return [...root.children].filter((node) => {
            const box = node.getBBox();
            return box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height; })
            .map((node) => node.outerHTML); }"""
        for chart in ["chart-memory", "chart-compression"]:
            self.assertEqual(tab.run(f"({outside})(document.getElementById('{chart}'))"), [])
        # Whatever the values: gaps, single points, less than the floor, leaps, time that goes on and starts anew.
        found = tab.run(f"""(async () => {{
            const {{ Chart }} = await import('/page/chart.js');
            const root = document.getElementById('chart-memory').cloneNode();
            document.querySelector('figure').append(root);
            const found = [];
            for (const [floor, base, values] of [[1, 10, [1, 1.001, null, 0.3, null, 9.99, 10.01, 250]],
                                                 [0, 1024, [0, null, 5, 1e12, null, 1, 1024 ** 3 * 1.0005, 999]]]) {{
                const chart = new Chart(root, String, floor, base);
                for (let time = 0; time < 400; time += 7) {{
                    const value = values[(time / 7) % values.length];
                    chart.add(time % 300, {{ 'physical-line': value, 'logical-line': value === null ? null : 2 * value }});
                    found.push(...({outside})(root));
                }}
            }}
            root.remove();
            return found;
        }})()""")
        self.assertEqual(found, [])
        self.assert_no_complaints(tab)

    def test_a_server_with_keys_asks_for_one(self):
        with tempfile.TemporaryDirectory() as scratch:
            keys = pathlib.Path(scratch) / "keys.json"
            keys.write_text(json.dumps(KEYS))
            server = Server("--api-keys", str(keys))
            self.addCleanup(server.stop)
            tab = Tab(self.browser)
            self.addCleanup(tab.close)
            tab.show_as()
            tab.go(server.url)
            tab.wait("document.getElementById('connection').textContent === 'Key needed'")
            self.assertIn("API key", tab.text("#live-problem"))
            self.ask(tab, "Hello")
            tab.wait("document.querySelector('#log .notice')")
            self.assertEqual(tab.run("document.activeElement.id"), "api_key")
            tab.screenshot(OUT / "key-needed.png")
            tab.type(KEYS[0]["key"])
            tab.press("Tab")
            tab.wait("document.getElementById('connection').textContent === 'Ready'")
            tab.click("#log .notice button")
            tab.wait("document.querySelector('.message.assistant .facts')")


if __name__ == "__main__":
    PROGRAM = sys.argv[1]
    OUT = pathlib.Path(sys.argv[2])
    OUT.mkdir(parents=True, exist_ok=True)
    CHROMIUM = find_chromium()
    if CHROMIUM is None:
        print("skipped: no Chromium on the PATH")
        sys.exit(SKIPPED)
    if not model_path().exists():
        print(f"skipped: no model {model_path()}")
        sys.exit(SKIPPED)
    unittest.main(argv=sys.argv[:1] + sys.argv[3:], verbosity=2)
