"""A headless Chromium for tests, driven through a pipe by its DevTools protocol; no package is needed.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
]
ON_PIPES = """
import os, sys
ends = [os.dup(int(end)) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
    os.set_inheritable(number, True)  # dup2 leaves it as it is where the two are one
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from file 3 and answers on file 4."""

BROKEN = r"""(() => {
  const broken = [], range = document.createRange();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const parent = node.parentElement;
    if (parent.closest('script, style, noscript, svg, [hidden], .text, .heat') || !parent.offsetParent) continue;
    for (const word of node.data.matchAll(/\S+/g)) {
      if (word[0].length > 24 || !/^[\p{L}\p{N}_.,:/+\u2212%-]+$/u.test(word[0])) continue;  // a path, or markup
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) broken.push(word[0]);
    }
  }
  const isOver = (box) => box.scrollWidth > box.clientWidth + 1;
  const over = [...document.querySelectorAll(".stacked td, .rank, .figure")].filter(isOver);
  const cut = [...document.querySelectorAll(".stacked")].filter(isOver);
  const wide = document.documentElement.scrollWidth > innerWidth ? ['the page'] : [];
  const words = broken.map((word) => `breaks ${word}`);
  const named = (what, boxes) => boxes.map((box) => `${what} ${box.innerText.slice(0, 60)}`);
  return [...words, ...named('runs over', over), ...named('cuts', cut), ...wide];
})()"""
"""Words that stand on two lines, tables that are cut, and a page that is wider than the window."""


class Browser:
    """One tab of a headless Chromium, with a profile directory of its own."""

    def __init__(self, profile):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        launch = [sys.executable, "-c", ON_PIPES, str(commands), str(answers), CHROMIUM]
        self.process = subprocess.Popen(
            [*launch, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.number, self.unread, self.events, self.session = 0, b"", [], None
        pages = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """One command of the DevTools protocol; `events` gains what is told meanwhile."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.commands, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode())
        os.write(self.commands, b"\0")
        while (told := self._message()).get("id") != self.number:
            self.events.append(told)
        assert "error" not in told, told
        return told["result"]

    def _message(self):
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], 30)[0], "Chromium has not answered for 30 seconds"
            more = os.read(self.answers, 1 << 20)
            assert more, "Chromium has ended"
            self.unread += more
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, file, fragment="", width=1200):
        """Show a page; `events` are then those since."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        for address in ("about:blank", file.as_uri() + fragment):
            self.events.clear()
            self.call("Page.navigate", url=address)
            until = time.monotonic() + 30
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                assert time.monotonic() < until, f"{address} has not loaded"
                self.call("Runtime.evaluate", expression="0")
        self.settle()

    def value(self, script):
        """What an expression gives in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def settle(self):
        """Wait until the page has been drawn twice."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def point(self, selector, number=0, *, click=False):
        """Move the mouse to the middle of an element, and perhaps click."""
        x, y = self.value(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelectorAll({json.dumps(selector)})[{number}].getBoundingClientRect())"
        )
        kinds = ["mouseMoved", "mousePressed", "mouseReleased"] if click else ["mouseMoved"]
        for kind in kinds:
            pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)
        self.settle()

    def broken(self):
        """Words of 24 letters at most that stand on two lines, cells and tables that are cut, a page that is wider."""
        return self.value(BROKEN)

    def press(self, key):
        """One key, as from a keyboard."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        self.settle()

    def errors(self):
        """What went wrong in the page: exceptions, and what the policy forbade."""
        return [event for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def close(self):
        """End the browser."""
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self.commands)
        os.close(self.answers)
