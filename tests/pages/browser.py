"""A headless Chromium, driven through the pipe of its DevTools protocol: no package is needed for it."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `events` holds the messages of the console and the errors of scripts and of the network."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.mkdtemp()
        read, self.commands = os.pipe()
        self.answers, write = os.pipe()

        def set_up():  # the browser reads from descriptor 3 and writes to 4
            os.dup2(read, 10)
            os.dup2(write, 11)
            os.dup2(10, 3)
            os.dup2(11, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self.profile}", "--no-first-run"]
        options += ["--disable-background-networking", "--force-color-profile=srgb"]
        self.process = subprocess.Popen(
            [found(), *options],
            preexec_fn=set_up,
            close_fds=False,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.rest, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def next_message(self):
        while b"\0" not in self.rest:
            part = os.read(self.answers, 1 << 20)
            assert part, "the browser ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        end = time.monotonic() + 60
        while self.value("document.readyState") != "complete" and time.monotonic() < end:
            time.sleep(0.05)

    def value(self, expression: str):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, of scripts and of the network; requests that left the file."""
        found = []
        for event in self.events:
            name, about = event["method"], event["params"]
            if name == "Runtime.exceptionThrown" or (name == "Log.entryAdded" and about["entry"]["level"] != "verbose"):
                found.append(json.dumps(about))
            if name == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
                found.append(json.dumps(about))
            if name == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
                found.append(about["request"]["url"])
        return found

    def screenshot(self, file: Path, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))
