"""report.html: its content; it loads nothing and does not change the training."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import blosc2
import matplotlib.image
import numpy as np
import pytest
import torch
from tiny_dataset import make_plan
from torch import nn

from pcrl_nnunet import checkpoint, registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.methods import Picture, method_class
from pcrl_nnunet.plans import channel_labels
from pcrl_nnunet.pretraining.cases import PretrainingCases
from pcrl_nnunet.report import examples, html, sections
from pcrl_nnunet.report import page as report
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.pictures import slice_png
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.trainers import PCRLPretrainTrainer

VOID = {"meta", "link", "img", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ODD = '<b>&"$x^$'  # a case's name


class Page(HTMLParser):
    """A parsed report: its elements, text, and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.elements, self.open, self.text = text, [], [], ""
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.styles = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag not in ("b", "i", "code", "span"):
            self.text += " "
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "li":
            self.items.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        inside = self.open[-1] if self.open else None
        if inside == "style":
            self.styles += data
            return
        self.text += data
        if inside == "td":
            self.rows[-1][-1] += data
        if inside == "li":
            self.items[-1] += data

    def pictures(self) -> dict[str, np.ndarray]:
        """The pictures by alternative text; (Y, X, 4)."""
        sources = {a["alt"]: a["src"] for tag, a in self.elements if tag == "img"}
        return {
            alt: matplotlib.image.imread(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
            for alt, source in sources.items()
        }


@pytest.fixture
def run(tiny, monkeypatch) -> Callable[..., Path]:
    """Runs pcrl_nnunet_pretrain in this process; gives the folder of the pretraining."""
    monkeypatch.setattr(registration, "is_registered", lambda: True)
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", lambda *_: None)

    def run(*arguments: str, plan: dict | None = None) -> Path:
        if plan:
            (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
        short = ["-epochs", "2", "-iters_per_epoch", "2", "-batch_size", "4", "-device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_pretrain", "-d", "999", *short, *arguments])
        pretrain.main()
        (folder,) = tiny.results.glob("PCRLPretrainTrainer_*/fold_*")
        return folder

    return run


@pytest.fixture
def quick(monkeypatch) -> None:
    """The pictures of views are a pixel each, and there are no charts: they take the most time."""
    pixel = slice_png(np.zeros((1, 1, 1)), 0, 0, 1)
    monkeypatch.setattr(examples, "views_of_a_case", lambda *given: given[-1].write(pixel))
    monkeypatch.setattr(html, "chart_svg", lambda *_: "")


def page_of(folder: Path) -> Page:
    return Page((folder / report.NAME).read_text(encoding="utf-8"))


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("training_log_*.txt"))


def test_the_report_shows_levels_settings_cases_next_command_and_loads_nothing(run, tiny) -> None:
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (tiny.data / f"case_3{suffix}").rename(tiny.data / f"{ODD}{suffix}")
    own = {"augmentation": {"rotation_degrees": 15}}
    folder = run(plan=make_plan(features=(4, 8, 8, 8), pretrain={"momentum": 0.5, "pcrlv2": own}))
    page = page_of(folder)
    assert "WARNING" not in log_of(folder)

    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "b&"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
        assert all(place.startswith("#") for place in re.findall(r"url\((.*?)\)", str(attributes)))
    assert not re.search(r"url\(|@import|expression", page.styles)

    pictures = page.pictures()
    for case in (ODD, "case_1", "case_2"):
        assert pictures[f"Views of {case}"].shape[0] > 100
        sizes = {pictures[f"{case}, {kind}"].shape for kind in ("input", "target", "level 1", "level 2", "level 3")}
        assert len(sizes) == 1
        assert pictures[f"{case}, target"].std() > 0.1  # an image of noise
    assert page.items == [ODD, "case_0", "case_1", "case_2"]

    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["batch_size"] == ["4"]
    assert rows["momentum"] == ["0.5"]
    assert rows["rotation_degrees"] == ["15"]
    assert rows["global_input_size"][0].count("x") == 2
    assert rows["Dataset999_Tiny"] == ["nnUNetPlans_3d_fullres", "4", "100.0%"]
    text = " ".join(page.text.split())
    assert "Dataset999_Tiny finished" in text
    train = "nnUNetv2_train Dataset999_Tiny 3d_fullres 0 -tr PCRLFinetuneTrainer -p nnUNetPlans -device cpu"
    assert f"Fine-tune fold 0, and the other folds alike, with {train}" in text
    assert "4 of 4" in text
    assert re.search(r"case_1\s*global 1, (no flip|flip: ax[ei]s [012])", text)
    assert "Loss: restoration" in text
    assert "Loss: comparison" in text
    assert "16 samples so far, 4 of a case" in text
    assert len([tag for tag in page.elements if tag[0] == "svg"]) == 7
    assert list(folder.glob("draft_*")) == []


def test_every_channel_is_shown_with_its_name(run, quick, tiny, monkeypatch) -> None:
    for path in tiny.data.glob("case_?.b2nd"):
        image = blosc2.open(str(path))[:]
        blosc2.asarray(np.concatenate([image, image[:, ::-1] ** 2]), urlpath=str(path), mode="w")
    names = {"0": "T1", "1": "<T2>"}
    (tiny.folder / "dataset.json").write_text(json.dumps({**tiny.dataset_json, "channel_names": names}))
    plan = make_plan()
    plan["configurations"]["3d_fullres"] |= {
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [False] * 2,
    }
    given = []
    draw = examples.views_of_a_case
    monkeypatch.setattr(examples, "views_of_a_case", lambda *arguments: given.append(arguments) or draw(*arguments))
    page = page_of(run(plan=plan))
    assert [arguments[-2] for arguments in given] == [["T1 (0000)", "<T2> (0001)"]] * 3
    assert given[0][0] == "Dataset999_Tiny/case_0"
    pictures = page.pictures()
    for kind in ("input", "target", "level 1", "level 2"):
        first, second = (pictures[f"case_0, {kind}, {name}"] for name in ("T1 (0000)", "<T2> (0001)"))
        assert first.shape == second.shape
        assert (first != second).any()
    assert page.text.count("<T2> (0001)") == 3
    assert re.search(r"Background: \d+ % of global views \(more than 85 % in \d+ %\), \d+ % of local views ", page.text)


@pytest.mark.parametrize(
    ("case", "description", "expected"),
    [
        ("a", {"channel_names": {"0": "T1", "1": "T2"}}, ["T1 (0000)", "T2 (0001)"]),
        ("a", {"modality": {"0": "T1", "1": "T2"}}, ["T1 (0000)", "T2 (0001)"]),
        ("Dataset002_B/a", {"channel_names": {"0": "T1", "1": "T2"}}, ["channel (0000)", "channel (0001)"]),
        ("a", {"channel_names": {"0": "T1"}}, ["channel (0000)", "channel (0001)"]),
    ],
)
def test_channels_have_the_names_of_their_dataset_where_these_are_known(case, description, expected) -> None:
    assert channel_labels(case, description, 2) == expected


@pytest.mark.parametrize("description", [{}, {"channel_names": {}}])
def test_a_dataset_whose_channels_have_no_names_is_refused(description) -> None:
    with pytest.raises(UserError, match=r"^dataset\.json has no channel_names; add them"):
        channel_labels("a", description, 2)


def test_a_killed_pretraining_has_a_report_with_the_command_to_continue(run, quick, tiny, monkeypatch) -> None:
    train_step = PCRLPretrainTrainer.train_step

    def step(self, batch, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return train_step(self, batch, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run("-f", "0")
    (folder,) = tiny.results.glob("PCRLPretrainTrainer_*/fold_0")
    text = " ".join(page_of(folder).text.split())
    assert "not finished" in text
    assert "2 of 4" in text
    assert "The validation cases of fold 0 are left out" in text
    assert "Go on with pcrl_nnunet_pretrain -d 999 -epochs 2" in text
    assert "-f 0 --c Fine-tune" in text
    monkeypatch.setattr(Report, "is_due", lambda self: False)
    charts = []
    monkeypatch.setattr(html, "chart_svg", lambda *given: charts.append(given[0]) or "")
    run("-f", "0", "--c")
    assert "not finished" not in page_of(folder).text
    assert {epoch for curve in charts[0].values() for epoch in curve[0]} == {1, 2}  # also the epoch before


def test_the_report_names_the_initial_checkpoint_and_its_cases(run, quick, tiny) -> None:
    first = run("-f", "1") / checkpoint.FINAL
    started = first.rename(tiny.folder.parent / "first.pth")
    shutil.rmtree(first.parent)
    page = page_of(run("-f", "1", "-init", str(started)))
    assert f"Started from {started}" in " ".join(page.text.split())
    assert page.items == [*tiny.splits[1]["train"], *tiny.splits[1]["train"]]


def test_a_pretraining_is_bit_identical_with_and_without_reports(run, monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(examples, "NUM_EXAMPLES", 1)
    plan = make_plan()
    network = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network |= {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}

    def trained() -> tuple[dict, dict, torch.Tensor, tuple]:
        np.random.seed(0)
        folder = run(plan=plan)
        content = checkpoint.read(str(folder / checkpoint.FINAL))
        shutil.rmtree(folder)
        return content["network_weights"], content["method_weights"], torch.get_rng_state(), np.random.get_state()

    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", lambda *_: None)
        without = trained()
    monkeypatch.setattr(Report, "is_due", lambda self: True)
    written = []
    monkeypatch.setattr(report, "write_text", lambda path, content: written.append(content))
    reported = trained()
    assert len(written) == 3
    assert "could not be made" not in "".join(written)
    for expected, actual in zip(without[:2], reported[:2], strict=True):  # the second holds the running statistics
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert torch.equal(without[2], reported[2])
    assert str(without[3]) == str(reported[3])


@pytest.mark.parametrize("part", [False, True])
def test_pictures_are_made_in_evaluation_and_leave_the_network_as_it_was(part) -> None:
    torch.manual_seed(0)
    norm, seen = nn.BatchNorm1d(2), []
    network = nn.Sequential(norm, nn.Dropout(0.5))
    norm.train(not part)  # modules in evaluation mode stay there

    def pictures(batch: dict[str, torch.Tensor]) -> list[Picture]:
        seen.append((torch.is_grad_enabled(), norm.training, network.training))
        return [Picture("input", network(batch["x"])[:, :, None, None])]

    network.pictures = pictures
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    of_cases = [SimpleNamespace(sample={"x": np.full(2, number, np.float32)}) for number in range(3)]
    (made,) = examples.pictures_of(SimpleNamespace(network=network, device=torch.device("cpu")), of_cases)
    assert seen == [(False, False, False)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert (network.training, norm.training) == (True, not part)
    torch.testing.assert_close(made.images[:, 0, 0, 0], torch.arange(3.0), rtol=1e-4, atol=1e-4)


def test_a_failed_picture_is_named_and_loses_only_its_section(run, quick, monkeypatch) -> None:
    def fails(*_):
        raise ZeroDivisionError("an odd picture")

    monkeypatch.setattr(examples, "slice_png", fails)
    folder = run()
    log = log_of(folder)
    lacking = "the report lacks its section 'What the network does'"
    assert f"WARNING: {lacking} (ZeroDivisionError: an odd picture, in " in log
    assert "Pretraining done" in log
    page = page_of(folder)
    assert "This section could not be made (ZeroDivisionError: an odd picture" in page.text
    assert {row[0] for row in page.rows if row} >= {"batch_size", "Dataset999_Tiny"}


def test_on_a_full_disk_the_earlier_report_stays_and_training_continues(run, quick, monkeypatch) -> None:
    replace = os.replace

    def full(source, target):
        if str(target).endswith(report.NAME):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "on_train_end", lambda self: None)
        folder = run()  # leaves a state, but no result
    before = (folder / report.NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        run("--c")
    assert (folder / report.NAME).read_bytes() == before
    assert f"WARNING: {folder / report.NAME} could not be written (OSError: [Errno 28] No space left" in log_of(folder)
    assert checkpoint.read(str(folder / checkpoint.FINAL))["epochs"] == 2
    assert list(folder.glob("draft_*")) == []


def test_a_report_is_due_after_a_hundred_times_its_writing_time(monkeypatch, tmp_path) -> None:
    now = [1000.0]
    monkeypatch.setattr(report, "monotonic", lambda: now[0])
    made = Report()
    assert made.is_due()
    facts = SimpleNamespace(folder=str(tmp_path))

    def page(*_):
        now[0] += 2
        return "page"

    monkeypatch.setattr(made, "_page", page)
    made.write(facts, [], False)
    assert (tmp_path / report.NAME).read_text() == "page"
    for passed, due in ((0, False), (199.5, False), (200, True)):
        now[0] = 1002 + passed
        assert made.is_due() is due


def test_a_hundred_thousand_cases_are_counted_and_the_first_of_them_listed() -> None:
    own = [Case(f"a_{i}", "/pre/Dataset001_A/plan/x.b2nd") for i in range(100_000)]
    others = {"Dataset002_B": [Case(f"b_{i}", "/pre/Dataset002_B/plan/y.b2nd") for i in range(1000)]}
    data = PretrainingCases("Dataset001_A", own, [], others, 0, [Case("case_0", "x.b2nd")], {"<scan>": "case_0"})
    request = SimpleNamespace(settings=SimpleNamespace(batch_size=10), cases=data)
    facts = SimpleNamespace(request=request, cases=data.used, init=None, steps=1010)
    text = sections.cases(facts)
    assert "The validation cases of fold 0 are left out, and 1 copy of them." in text
    assert "1 cases: left out as copies of validation cases" in text
    assert "&lt;scan&gt;, which has the voxels of case_0" in text
    page = Page(text)
    assert len(text) < 50_000
    assert [row for row in page.rows if row] == [
        ["Dataset001_A", "plan", "100,000", "90.9%"],
        ["Dataset002_B", "plan", "1,000", "9.1%"],
    ]
    assert page.items[:-1] == [*(f"a_{i}" for i in range(200)), *(f"Dataset002_B/b_{i}" for i in range(200))]
    assert page.text.count("The first 200 are listed") == 2
    assert "10,100 samples so far, 0.1 of a case" in page.text


def of_pcrlv2(steps: int) -> SimpleNamespace:
    """The facts that the section on learning needs, for a pretraining with the given steps per epoch."""
    request = SimpleNamespace(settings=SimpleNamespace(iters_per_epoch=steps))
    return SimpleNamespace(network=method_class("pcrlv2"), request=request)


def test_the_values_of_every_level_and_the_alarms_are_shown(monkeypatch) -> None:
    charts = []
    monkeypatch.setattr(html, "chart_svg", lambda *given: charts.append(given) or "")
    made = Report()
    names = ("restoration_error", "margin", "spread", "rank")
    for epoch in range(1, 61):
        values = {
            name: {"level 1": epoch + i, "level 2": 0.5 if i == 0 else -0.0001 if i == 1 else 5.0}
            for i, name in enumerate(names)
        }
        if epoch == 2:
            for name in ("restoration_error", "spread", "rank"):
                del values[name]["level 2"]  # not drawn
        made.add(epoch, values)
    page = Page(made._learning(of_pcrlv2(500)))
    assert [row for row in page.rows if row][:2] == [
        ["level 1", "60.0", "61.0", "62.0", "63.0"],
        ["level 2", "0.500", "0.000", "5.00", "5.00"],
    ]
    assert "No: 2 alarms in the last epoch" in page.text
    assert "Alarm: restoration of level 1 is far off: its error is 60.00" in page.text
    assert "Alarm: features of level 2 do not tell scans apart" in page.text
    assert "115 alarms in earlier epochs, the last 50 of them" in page.text
    epochs = [row[0] for row in page.rows if row and len(row) == 2]
    assert epochs == [str(epoch) for epoch in range(35, 60) for _ in range(2)]
    curves = charts[2][0]
    assert curves["level 1"] == (list(range(1, 61)), list(range(3, 63)))
    assert 2 not in curves["level 2"][0]


@pytest.mark.parametrize(
    ("error", "steps", "shown"),
    [
        (1.05, 40, ("open", "Too early to tell: 40 steps are done, 500 or more are needed.")),
        (4.07, 40, ("open", "Too early to tell: 40 steps are done, 200 or more are needed.")),
        (4.07, 250, ("bad", "No: 1 alarm in the last epoch.")),
        (0.5, 250, ("good", "Yes: no alarm in the last epoch.")),
    ],
)
def test_the_verdict_is_green_only_if_restoration_works_after_enough_steps(monkeypatch, error, steps, shown) -> None:
    monkeypatch.setattr(html, "chart_svg", lambda *_: "")
    made = Report()
    others = {"margin": 0.3, "spread": 0.9, "rank": 9.0}
    made.add(1, {name: {"level 1": value} for name, value in {"restoration_error": error, **others}.items()})
    page = made._learning(of_pcrlv2(steps))
    colour, text = shown
    assert page.startswith(f'<p class="{colour}">{text}</p>')
    assert (colour == "good") == ('class="good"' in page)


WIDTHS = (1300, 420)
HARNESS = """<body>{frames}<pre id="found">not done</pre><script>
onload = () => {{  // the frames and their pictures have loaded, or failed to
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, width = frame.clientWidth;
    page.querySelectorAll("details").forEach(details => details.open = true);
    const images = [...page.images];
    const outside = [...page.querySelectorAll("body *")].filter(element =>
      element.getBoundingClientRect().right > width + 1 && !element.closest(".wide > *"));
    found.push({{
      width, images: images.length, loaded: images.filter(image => image.naturalWidth > 0).length,
      scrolls: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      outside: outside.map(element => element.outerHTML.slice(0, 200)),
      resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    }});
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""


def in_chromium(text: str, folder: Path) -> list[dict]:
    """Measure the page in a browser without network, in one frame for each width."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(text)}"></iframe>' for width in WIDTHS
    )
    (folder / "harness.html").write_text(HARNESS.format(frames=frames), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --window-size=1400,1900"
    command = [CHROMIUM, *options.split(), "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "harness.html").as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(unescape(found))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_chromium_shows_all_pictures_offline_within_the_page_width(run, tmp_path) -> None:
    plan = make_plan(features=(4, 8, 8, 8))
    text = (run("-f", "0", plan=plan) / report.NAME).read_text(encoding="utf-8")
    for of_width, width in zip(in_chromium(text, tmp_path), WIDTHS, strict=True):
        assert of_width == {
            "width": width, "images": 18, "loaded": 18, "scrolls": 0, "outside": [], "resources": [],
        }  # fmt: skip
    broken = text.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    broken = broken.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1 style="width:2000px">', 1)
    for of_width in in_chromium(broken, tmp_path):  # the harness notices the fault
        assert of_width["images"] - of_width["loaded"] == 2
        assert of_width["scrolls"] > 0
        assert any("<h1" in element for element in of_width["outside"])
