"""Headless Chromium through chromedriver's W3C protocol: what the page's tests need, no more."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c"}
WITHIN_S = 600.0


class Page:
    def __init__(self, client: httpx.AsyncClient, session: str) -> None:
        self._client, self._session = client, session

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = await self._client.post(f"/session/{self._session}/{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    async def open(self, url: str) -> None:
        await self._post("url", {"url": url})

    async def run(self, script: str, *arguments: object) -> Any:
        return await self._post("execute/sync", {"script": script, "args": list(arguments)})

    async def text(self, selector: str) -> str:
        """Of the first match; empty where there is none."""
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return str(await self.run(script, selector))

    async def press(self, key: str) -> None:
        actions = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        await self._post("actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    async def devtools(self, command: str, **parameters: object) -> Any:
        return await self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    async def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The window and the colours that the page is seen in."""
        await self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self) -> bytes:
        """The whole page, beyond the window, as PNG."""
        shot = await self.devtools(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True
        )
        return base64.b64decode(shot["data"])

    async def complaints(self) -> list[str]:
        """What the console holds against the page."""
        answer = await self._client.post(
            f"/session/{self._session}/se/log", json={"type": "browser"}
        )
        return [entry["message"] for entry in answer.json()["value"]]

    async def until(self, selector: str, holds: Callable[[str], bool]) -> str:
        """Waits for the element's text."""
        try:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    text = await self.text(selector)
                    if holds(text):
                        return text
        except TimeoutError:
            raise AssertionError(f"{selector} stayed {await self.text(selector)!r}") from None


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    driver = await asyncio.create_subprocess_exec(
        CHROMEDRIVER, "--port=0", stdout=asyncio.subprocess.PIPE
    )
    try:
        port = await _port(driver)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=WITHIN_S
        ) as client:
            with TemporaryDirectory() as profile:
                page = await _session(client, CHROMIUM, profile)
                try:
                    yield page
                finally:
                    await client.delete(f"/session/{page._session}")
    finally:
        driver.terminate()
        await driver.wait()


async def _port(driver: asyncio.subprocess.Process) -> int:
    assert driver.stdout is not None
    async for line in driver.stdout:
        found = re.search(rb"started successfully on port (\d+)", line)
        if found is not None:
            return int(found.group(1))
    raise AssertionError("chromedriver did not start")


async def _session(client: httpx.AsyncClient, binary: str, profile: str) -> Page:
    options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    answer = await client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
    value = answer.json()["value"]
    assert answer.status_code == 200, value
    return Page(client, value["sessionId"])
