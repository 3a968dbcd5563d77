"""`make screenshots`: pictures of MLflow, a report and `dvc plots`, in docs/images.

They show what the MLflow store and the DVC experiments of this checkout hold, so run `make demo`
first. Two experiments are compared: those of the two newest runs of MLflow. Needs Chromium.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from cifarlab import files, pipeline
from cifarlab.errors import UserError

FOLDER = Path("docs/images")
SIZE, COLOURS = {"width": 1280, "height": 720}, 64  # pixels; few colours keep the files small
PORT, REPORT = "5055", Path(".cache/report.html")


def main() -> None:
    """Take all pictures."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    names = [revision.name for revision in pipeline.experiments()][:2]
    if not chromium or len(names) < 2:
        raise UserError("this needs Chromium and two experiments; `make demo` makes two")
    subprocess.run(["dvc", "plots", "diff", "--quiet", *reversed(names)], check=True)
    report = ["report", "--output", str(REPORT), *reversed(names)]
    subprocess.run([sys.executable, "-m", "cifarlab.cli", *report], check=True)
    command = [sys.executable, "-m", "cifarlab.cli", "ui", "--port", PORT]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = next((line for line in server.stdout or () if line.startswith("open http")), "")
        if not address:
            raise UserError("MLflow's server did not start; `make ui` says why")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--allow-file-access-from-files"]
            )
            take(browser, address.split()[1], names)
    finally:
        server.terminate()
        server.wait()


def take(browser: Browser, address: str, names: list[str]) -> None:
    """Take the pictures of MLflow at an address, of the report, and of the page of `dvc plots`."""
    page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]  # a dictionary will do
    page.goto(address)
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for()
    for name in ("Close", "Hide banner"):  # MLflow's assistant, a notice about the shared view
        page.get_by_role("button", name=name, exact=True).first.click()
    save(page, "mlflow-runs")
    page.set_viewport_size({"width": 1000, "height": 880})
    page.goto(REPORT.absolute().as_uri())
    page.get_by_text("Loss by epoch").evaluate("element => element.scrollIntoView()")
    save(page, "report")
    page.set_viewport_size({"width": 900, "height": 800})
    page.goto((Path.cwd() / "dvc_plots/index.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.vega-embed canvas, svg').length >= 4")
    save(page, "dvc-plots")


def save(page: Any, name: str) -> None:
    """Write a picture of what the page shows."""
    page.wait_for_timeout(3000)  # charts are still drawn and panels still move
    with files.atomic(FOLDER / f"{name}.png") as path:
        page.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{FOLDER / name}.png, {(FOLDER / f'{name}.png').stat().st_size // 1000} kB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
