"""``moka diagnose``: files, resumption, processes, and the page in a browser."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest

OPTIONS = ("--size", "24", "--ablate", "tokens,adapter,blank", "--noise", "visual")
FILES = ("report.html", "report.json", "samples.jsonl", "plots/shapley.png", "plots/attention_per_token.png")


def numbers(folder):
    """The figures of a report, without times."""
    report = json.loads((folder / "report.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for one in (report, *samples):
        one.pop("seconds")
    return report, samples


@pytest.fixture(scope="module")
def diagnosed(trained_run, tmp_path_factory):
    from moka.cli.main import main

    folder = tmp_path_factory.mktemp("diagnosed")
    main(["diagnose", str(trained_run), "--output", str(folder), *OPTIONS])
    return folder


def test_all_files_and_the_tables_are_made(moka, trained_run, tmp_path):
    done = moka("diagnose", trained_run, "--size", "5", "--output", tmp_path / "new", "--batch-size", "2")
    assert done.code == 0, done.err[-800:]
    assert all((tmp_path / "new" / name).stat().st_size > 0 for name in FILES)
    report, samples = numbers(tmp_path / "new")
    assert report["n"] == len(samples) == 5
    assert report["contributions"]["tokens"]["all"]["n"] == 5
    for word in ("Shapley", "synergistic", "Fisher", "left out: adapter use", "report.html"):
        assert word in " ".join(done.out.split())


def test_finished_samples_are_not_measured_again(moka, trained_run, diagnosed, tmp_path, monkeypatch):
    from moka.diagnosis import diagnose

    shutil.copytree(diagnosed, tmp_path / "half")
    lines = (diagnosed / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half/samples.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "half/samples.jsonl.part-0").write_text(lines[5] + lines[4][:40])  # cut by the kill
    measured, measure = [], diagnose.measure
    monkeypatch.setattr(diagnose, "measure", lambda *a: (measured.append(one[0]) or one for one in measure(*a)))
    done = moka("diagnose", trained_run, "--output", tmp_path / "half", *OPTIONS)
    assert done.code == 0, done.err[-800:]
    assert sorted(measured) == [k for k in range(len(lines)) if k not in (0, 1, 2, 5)]
    (report, samples), (expected, all_samples) = numbers(tmp_path / "half"), numbers(diagnosed)
    assert [one["id"] for one in samples] == [one["id"] for one in all_samples]
    for ablate, groups in expected["contributions"].items():
        for name, figure in groups["all"]["shapley"].items():
            found = report["contributions"][ablate]["all"]["shapley"][name]["value"]
            assert found == pytest.approx(figure["value"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(trained_run, launch, tmp_path):
    options = ("--batch-size", "3", "--size", "20")
    for launcher, name in (("one", "one"), ("accelerate", "two")):
        done = launch(launcher, "diagnose", trained_run, "--output", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr[-2000:]
    (one, one_samples), (two, two_samples) = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert one_samples == two_samples
    assert one == two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--value", "likelihod"], ["value", "likelihod", "log_likelihood"]),
        (["--ablate", "tokens,adaptr"], ["ablate", "adaptr", "adapter"]),
        (["--noise", "smell"], ["noise", "smell", "visual"]),
        (["--size", "0"], ["size", "0"]),
        (["--data", "absent.jsonl"], ["absent.jsonl"]),
        (["--output", "FILE/x"], ["--output", "FILE"]),
    ],
)
def test_bad_options_are_one_line(refused, trained_run, tmp_path, options, words):
    (tmp_path / "FILE").write_text("")
    options = [option.replace("FILE", str(tmp_path / "FILE")) for option in options]
    if "--output" not in options:
        options += ["--output", str(tmp_path / "out")]
    message = refused("diagnose", trained_run, *options)
    assert all(word.replace("FILE", str(tmp_path / "FILE")) in message for word in words), message


def test_a_folder_that_is_no_model_is_named(refused, tmp_path):
    assert str(tmp_path) in refused("diagnose", tmp_path, "--data", "embedded:audio-visual-text")


def test_text_of_samples_is_escaped_and_nothing_is_loaded(diagnosed):
    page = (diagnosed / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)', page)
    assert "Content-Security-Policy" in page


PROBE = """<!doctype html><body><iframe id="page" src="report.html" width="{width}" height="800"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = () => {{
  const inner = document.getElementById("page").contentDocument;
  const charts = [...inner.querySelectorAll("[data-chart]")].map(one => {{
    const box = one.querySelector("svg").getBoundingClientRect();
    return [one.dataset.chart, box.width, box.height, box.right];
  }});
  const cut = [...inner.querySelectorAll("h1, h2, h3, p, dd, figure, article")]
    .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent.slice(0, 60));
  const images = [...inner.images].map(one => one.complete && one.naturalWidth > 0);
  document.getElementById("found").textContent = "FOUND" + JSON.stringify({{charts, cut, images,
    width: inner.documentElement.scrollWidth}}) + "FOUND";
}};
</script></body>"""


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_in_a_browser(diagnosed, tmp_path, width):
    """No console error, every chart present and visible, and nothing wider than a phone."""
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    shutil.copy(diagnosed / "report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.format(width=width))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
        command = [
            *(
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                *quiet,
                f"--user-data-dir={tmp_path / 'profile'}",
            ),
            *("--enable-logging=stderr", "--virtual-time-budget=8000", f"--window-size={max(width, 500) + 40},900"),
            *("--dump-dom", f"http://127.0.0.1:{server.server_port}/probe.html"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        server.shutdown()
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line and "favicon" not in line]
    found = json.loads(done.stdout.split("FOUND")[1])
    assert found["width"] <= width
    assert not found["cut"]
    assert found["images"]
    assert all(found["images"])
    names = [name for name, *_ in found["charts"]]
    assert {"accuracy", "shapley", "shares", "uses", "gradients", "vulnerability", "attention_total"} <= set(names)
    assert all(w > 100 and h > 50 and right <= width for _, w, h, right in found["charts"])
