"""A headless browser, where one is installed: what it logs, draws and makes of a page."""

import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser():
    """The path of a browser; None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def visit(page: Path, *flags: str):
    """Opens a page; returns the lines of its console, and what the browser prints."""
    profile = page.parent / "profile"
    command = [
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--hide-scrollbars"),
        *(*flags, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout
