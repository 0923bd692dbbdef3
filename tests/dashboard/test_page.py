"""The web page, used in a real browser against the real service: ``make test-browser``."""

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.dashboard.conftest import Site
from tests.engine.models import english
from tests.patience import PATIENCE, wait_for

pytestmark = pytest.mark.browser

TEXT = {"texts": english("calibration"), "samples": 8, "sequence_length": 64}
EVALUATION = {**TEXT, "texts": english("evaluation"), "latency": True, "prompts": ["The river <b>"]}


def api(site: Site) -> httpx2.Client:
    return httpx2.Client(
        base_url=site.url, headers={"Authorization": f"Bearer {site.key}"}, timeout=PATIENCE, trust_env=False
    )


def submit(site: Site, **changes: Any) -> str:
    request = {
        "model_id": "local:tiny",
        "target_ratio": 0.3,
        "method": "piem-lsps",
        "rounds": 2,
        "calibration": TEXT,
        "evaluation": EVALUATION,
    }
    with api(site) as client:
        made = client.post("/v1/jobs", json={**request, **changes})
    assert made.status_code == 202, made.text
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def succeeded(site: Site) -> list[str]:
    """Three jobs: with labels that look like HTML, of several targets, with training."""
    wanted: list[dict[str, Any]] = [
        {"labels": {"team": "<img src=x onerror=alert(1)>"}},
        {"target_ratio": [0.2, 0.5], "method": "magnitude", "rounds": 1},
        {
            "method": "magnitude",
            "rounds": 1,
            "recovery": {"training": {"kind": "lora", "epochs": 2.0, "batch_size": 4}},
        },
    ]
    jobs = [submit(site, **changes) for changes in wanted]
    with api(site) as client:
        for job_id in jobs:
            wait_for(lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] == "succeeded")  # noqa: B023
    return jobs


def picture(page: Page, pictures: Path | None, name: str) -> None:
    if pictures is not None:
        page.screenshot(path=pictures / f"{name}.png", full_page=True)


def test_submitting_by_keyboard_and_watching_to_the_end(page: Page, site: Site, pictures: Path | None) -> None:
    page.get_by_role("link", name="New job").first.focus()
    page.keyboard.press("Enter")
    page.get_by_label("Model", exact=True).focus()
    page.keyboard.type("local:tiny")
    expect(page.get_by_text("3 layers of 6 heads")).to_be_visible()
    for value in ("", "0.3, 0.5"):
        page.keyboard.press("Tab")
        if value:
            page.keyboard.press("Control+A")
            page.keyboard.type(value)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.labels[0].textContent") == "Method"
    page.keyboard.type("piem-lsps")
    expect(page.get_by_text("needs gradients")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.type("3")
    picture(page, pictures, "form")
    page.get_by_role("button", name="Plan").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="The plan")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"#/jobs/[0-9a-f-]{36}$"))
    expect(page.get_by_role("progressbar")).to_be_visible()
    shown: set[str] = set()
    state = page.locator(".facts .badge").first
    while "succeeded" not in shown:
        shown.add(state.inner_text())
        if shown <= {"queued", "running"}:
            picture(page, pictures, "running")
        page.wait_for_timeout(50)
    assert "running" in shown, "live, with nothing pressed"
    expect(page.get_by_role("heading", name="Pruned by")).to_have_count(2)
    expect(page.get_by_role("img", name="Perplexity by step")).to_be_visible()
    expect(page.get_by_role("img", name="Sensitivity of the layers")).to_be_visible()


def test_what_a_job_has_come_to(page: Page, site: Site, succeeded: list[str], pictures: Path | None) -> None:
    page.goto(f"{site.url}/#/jobs/{succeeded[0]}")
    with api(site) as client:
        report = client.get(f"/v1/jobs/{succeeded[0]}/report").json()
        rounds = client.get(f"/v1/jobs/{succeeded[0]}/steps").json()["items"]
    table = page.get_by_role("region", name="before and after")
    row = table.get_by_role("row", name="perplexity")
    after, before = report["perplexity"]["after"], report["perplexity"]["before"]
    assert row.get_by_role("cell").all_inner_texts()[:2] == [f"{before:.2f}", f"{after:.2f}"]
    expect(page.get_by_text("team=<img src=x onerror=alert(1)>")).to_be_visible()
    expect(page.locator("main img")).to_have_count(0)
    expect(page.get_by_text("The river <b>", exact=True)).to_be_visible()
    expect(page.locator("blockquote").nth(1)).to_have_text(report["generations"][0]["after"])
    bars = page.get_by_role("img", name="Feed-forward channels by layer").locator("rect.series-1")
    assert bars.count() == len(report["widths"]["after"])
    heights = [float(bar.get_attribute("height") or 0) for bar in bars.all()]
    widths = [layer["channels"] for layer in report["widths"]["after"]]
    assert [height / heights[0] for height in heights] == pytest.approx([width / widths[0] for width in widths])
    dots = page.get_by_role("img", name="Perplexity by step").locator("circle")
    assert dots.count() == len(rounds)
    page.get_by_text("The request, to repeat it").click()
    body = page.locator("pre").first.inner_text()
    with api(site) as client:
        again = client.post(
            "/v1/jobs?validate_only=true", json=json.loads(body) | {"calibration": {}, "evaluation": {}}
        )
    assert again.status_code == 200, again.text
    page.get_by_text("Files (").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="config.json", exact=True).click()
    assert json.loads(download.value.path().read_text())["model_type"] == "llama"
    page.get_by_text("Events (").click()
    expect(page.get_by_text("publishing → succeeded")).to_be_visible()
    picture(page, pictures, "job")
    page.goto(f"{site.url}/#/jobs/{succeeded[2]}")
    expect(page.get_by_role("img", name="Loss while training")).to_be_visible()


def test_comparing(page: Page, site: Site, succeeded: list[str], pictures: Path | None) -> None:
    page.goto(f"{site.url}/#/jobs?state=succeeded")
    boxes = page.get_by_role("checkbox")
    expect(boxes.first).to_be_visible()
    picture(page, pictures, "list")
    page.goto(f"{site.url}/#/compare?jobs={succeeded[0]},{succeeded[1]}")
    chart = page.get_by_role("img", name="perplexity against parameters")
    expect(chart.locator("circle")).to_have_count(4)
    page.get_by_role("checkbox", checked=False).last.check()
    expect(chart.locator("circle")).not_to_have_count(4)
    page.get_by_text("Numbers").click()
    points = [
        (float(size.rstrip("kM")), float(quality), front)
        for size, quality, front in (
            row.get_by_role("cell").all_inner_texts() for row in page.locator("figure tbody tr").all()
        )
    ]
    for size, quality, front in points:
        beaten = any(s <= size and q <= quality and (s, q) != (size, quality) for s, q, _ in points)
        assert front == ("no" if beaten else "yes")
    picture(page, pictures, "compare")
    page.get_by_label("Quality").select_option("accuracy")
    expect(page.get_by_text("None of these was measured so")).to_be_visible()


def test_cancelling(page: Page, site: Site) -> None:
    job_id = submit(site, rounds=64)
    page.goto(f"{site.url}/#/jobs/{job_id}")
    page.get_by_role("button", name="cancel").click()
    expect(page.locator(".facts .badge").first).to_have_text("cancelled")
    expect(page.get_by_role("button", name="retry")).to_be_visible()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="delete").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    with api(site) as client:
        assert client.get(f"/v1/jobs/{job_id}").status_code == 404


def test_errors_stand_beside_their_fields(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/#/new")
    page.get_by_label("Model", exact=True).fill("local:tinny")
    expect(page.get_by_text("There is no local model 'tinny'")).to_contain_text("did you mean tiny?")
    page.get_by_label("Model", exact=True).fill("local:tiny")
    page.get_by_label("Target ratio").fill("7")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Zero-shot tasks").fill("piqa, pica")
    page.get_by_role("button", name="Submit").click()
    ratio = page.locator("[data-field=target_ratio] .error")
    expect(ratio).to_contain_text("at most 0.9")
    expect(page.get_by_label("Target ratio")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Target ratio").fill("0.3")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("[data-field='evaluation.zero_shot'] .error")).to_contain_text("boolq")
    expect(ratio).to_be_empty()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(
    context: BrowserContext, page: Page, site: Site, succeeded: list[str], scheme: Any, pictures: Path | None
) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for name, address in (
        ("list", "/jobs"),
        ("form", "/new"),
        ("job", f"/jobs/{succeeded[0]}"),
        ("compare", f"/compare?jobs={succeeded[0]}"),
    ):
        page.goto(f"{site.url}/#{address}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        page.wait_for_load_state("networkidle") if name != "job" else page.get_by_role("region").first.wait_for()
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 361).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, (address, wide)
        picture(page, pictures, f"phone-{name}-{scheme}")
        contrasts = page.evaluate(CONTRASTS)
        assert not contrasts, (address, contrasts)


CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const element of document.querySelectorAll("main *, header *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color)), light(ground(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(`${element.tagName} ${element.className} ${element.textContent.slice(0, 20)}`);
  }
  return weak;
}"""
"""Texts of less contrast than WCAG 2's AA asks (4.5 to 1)."""


def test_without_a_key(context: BrowserContext, site: Site) -> None:
    page = context.new_page()
    page.goto(f"{site.url}/")
    page.get_by_label("API key").fill("sk-secateur-wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("API key").fill(site.key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert site.key not in page.url
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(f"{site.url}/#key={site.key}")
    page.reload()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert site.key not in page.url and "key" not in page.url
