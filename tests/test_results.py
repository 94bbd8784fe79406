"""The table of docs/results.md agrees with the files in docs/evidence/, and the pages name each of these files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

DOCS = Path(__file__).parents[1] / "docs"
HIPPOCAMPUS = "hippocampus_2d_curve.csv"
# The rows of the table, in order: file, rows of the file, column of the score, arm without and arm with pretraining.
ROWS = [
    (HIPPOCAMPUS, "labelled == 5", "dice", "scratch", "pcrlv2"),
    (HIPPOCAMPUS, "labelled == 10", "dice", "scratch", "pcrlv2"),
    (HIPPOCAMPUS, "labelled == 140", "dice", "scratch", "low"),
    ("lidc_masks_2d_10_subsets.csv", "optimizer == 'sgd' and scored == 'test'", "dice", "scratch", "low"),
    ("lidc_7_14_35_patients.csv", "labelled == 7", "auroc", "scratch", "pcrlv2"),
    ("lidc_7_14_35_patients.csv", "labelled == 35", "auroc", "scratch", "pcrlv2"),
    ("lidc_7_of_70_scored_on_63_patients.csv", "labelled == 7", "auroc", "scratch", "restoration_alone"),
    ("xrays_24_49_98_cases.csv", "labelled == 24", "auroc", "scratch", "pcrlv2"),
]


# The same of the second table: files, methods and number of labelled volumes of the control and of the method.
ONE, TWO, PASTED = "acdc_2d_semi_supervised.csv", "acdc_2d_semi_supervised_two_patients.csv", "acdc_2d_pasted.csv"
FIVE, PRETRAINED = "acdc_2d_semi_supervised_five_patients_waiting.csv", "acdc_2d_semi_supervised_pretrained.csv"
SEMI = "hippocampus_2d_semi_supervised.csv"
LATER, LATER_ONE = "acdc_2d_dense_pcrlv2.csv", "acdc_2d_dense_pcrlv2_one_patient.csv"
NODULES = "lidc_masks_2d_semi_supervised.csv"
OTHER_ROWS = [
    ("acdc_2d_pasted_one_patient.csv", "scratch_more", ONE, "semi_scratch", 2),
    (ONE, "scratch", "acdc_2d_pasted_one_patient.csv", "scratch_more", 2),
    (LATER_ONE, "scratch", ONE, "semi_scratch", 2),
    (LATER_ONE, "scratch", LATER_ONE, "dense_2000", 2),
    (LATER_ONE, "scratch", LATER_ONE, "pcrlv2_2000", 2),
    (PASTED, "scratch_more", TWO, "semi_scratch", 4),
    (TWO, "semi_scratch", PRETRAINED, "semi", 4),
    (FIVE, "scratch", FIVE, "semi_scratch", 10),
    (TWO, "scratch", PASTED, "scratch", 4),
    (PASTED, "scratch_more", PASTED, "mae", 4),
    (PASTED, "scratch_more", LATER, "dense_2000", 4),
    (PASTED, "scratch_more", LATER, "pcrlv2_2000", 4),
    (SEMI, "scratch_longer", SEMI, "semi_scratch", 5),
    (NODULES, "scratch_pasted", NODULES, "semi_scratch", 5),
]


def table(number: int = 0) -> list[list[str]]:
    """The cells of a table, without its two rows of heading."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?:^\|.*\n)+", page, re.M)[number].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def test_every_row_of_the_second_table_follows_from_its_files() -> None:
    assert len(table(1)) == len(OTHER_ROWS)
    for cells, (of_control, control, of_method, method, labelled) in zip(table(1), OTHER_ROWS, strict=True):
        task, _, scored, subsets, stated_control, stated_method, difference = cells
        without, given = (
            pd.read_csv(DOCS / "evidence" / file).query(f"method == '{name}' and labelled == {labelled}")
            for file, name in ((of_control, control), (of_method, method))
        )
        assert f"`{method}`" in task
        assert f"against `{control}`" in task
        assert {without["case"].nunique(), given["case"].nunique()} == {int(scored.split()[0])}
        without, given = (100 * frame.groupby("seed")["dice"].mean() for frame in (without, given))
        assert len(without) == len(given) == int(subsets)
        found = [without.median(), given.median(), (given - without).mean()]
        mean = re.fullmatch(r"([+-]\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)\)", difference)
        assert mean is not None
        stated, low, high = map(float, mean.groups())
        assert [float(stated_control), float(stated_method), stated] == pytest.approx(found, abs=0.06), task
        assert low < stated < high


def test_every_row_of_the_table_is_checked() -> None:
    assert len(table()) == len(ROWS)


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_a_row_has_the_medians_and_the_mean_difference_of_its_file(place: int) -> None:
    file, rows, column, control, arm = ROWS[place]
    task, labelled, scored, subsets, scratch, pretrained, difference = table()[place]
    scores = pd.read_csv(DOCS / "evidence" / file).query(rows)
    of_subsets = 100 * scores.groupby(["method", "seed"])[column].mean().unstack("method")[[control, arm]]
    assert of_subsets.notna().all(axis=None)
    assert len(of_subsets) == int(subsets)
    assert {labelled.split()[0]} == {str(number) for number in scores["labelled"]}
    if "case" in scores and column == "dice":
        assert scores["case"].nunique() == int(scored.split()[0])
    found = [*of_subsets.median(), (of_subsets[arm] - of_subsets[control]).mean()]
    mean = re.fullmatch(r"\**([+-]\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)\)\**", difference)
    assert mean is not None
    stated, low, high = map(float, mean.groups())
    assert [float(scratch), float(pretrained), stated] == pytest.approx(found, abs=0.06), task
    assert low < stated < high


def test_the_first_look_at_semi_supervised_training_agrees_with_its_files() -> None:
    scores, of_first = (
        pd.read_csv(DOCS / "evidence" / f"acdc_2d_semi_supervised{name}.csv") for name in ("", "_first_version")
    )
    assert list(scores) == list(of_first)
    assert scores.groupby("seed")["case"].nunique().tolist() == [28] * 5
    assert of_first.groupby("seed")["case"].nunique().tolist() == [28] * 3
    of_subsets, first = (
        100 * frame.groupby(["seed", "method"])["dice"].mean().unstack("method") for frame in (scores, of_first)
    )
    page = (DOCS / "semi_supervised.md").read_text(encoding="utf-8")
    columns = ["Subset", "`scratch`", "`scratch_longer`", "`semi_scratch`", "`semi_scratch`, first version"]
    heading = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    lines = page.split(heading)[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "mean"]
    stated = [[float(cell) for cell in row[1:4]] for row in rows]
    assert stated[:5] == [pytest.approx(list(row), abs=0.06) for row in of_subsets.to_numpy()]
    assert [float(row[4]) for row in rows[:3]] == pytest.approx(list(first["semi_scratch"]), abs=0.06)
    assert [row[4] for row in rows[3:]] == [""] * 3
    controls = ["scratch", "scratch_longer"]
    assert first[controls].equals(of_subsets.loc[:2, controls])  # only `semi_scratch` was trained again
    means = of_subsets.mean()
    assert stated[5] == pytest.approx(list(means), abs=0.06)
    assert means["scratch"] > means["scratch_longer"]
    gain = means["semi_scratch"] - means["scratch"]
    assert f"gains {gain:.1f} points over `scratch`, the better control" in page
    alone = (of_subsets["semi_scratch"] - of_subsets[controls].max(axis=1)).loc[3:]
    text = " ".join(page.split())
    assert f"`semi_scratch` gains {alone[3]:.1f} and {alone[4]:.1f} points over the better control" in text
    largest = (of_subsets["semi_scratch"] - first["semi_scratch"]).abs().max()
    assert f"differ by up to {largest:.0f} points" in text


def test_the_table_of_two_labelled_patients_agrees_with_its_file() -> None:
    scores = pd.read_csv(DOCS / "evidence" / "acdc_2d_semi_supervised_two_patients.csv")
    assert scores.groupby(["seed", "method"])["case"].nunique().tolist() == [28] * 15
    found = 100 * scores.groupby(["seed", "method"])["dice"].mean().unstack("method")
    page = (DOCS / "semi_supervised.md").read_text(encoding="utf-8")
    lines = page.split("| Subset, two patients |")[1].split("\n\n")[0].splitlines()[2:]
    stated = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in lines]
    assert stated == [pytest.approx(list(row), abs=0.06) for row in [*found.to_numpy(), found.mean().to_numpy()]]
    gains = found["semi_scratch"] - found["scratch_longer"]
    assert f"gains {gains.mean():.1f} points over `scratch_longer`, the better control" in page
    assert f"{', '.join(f'{gain:.1f}' for gain in gains[:4])} and {gains[4]:.1f} points over `scratch_longer`" in page
    assert f"it gains {(found['semi_scratch'] - found['scratch']).mean():.1f} points" in page
    assert found["scratch_longer"].mean() > found["scratch"].mean()


def test_the_comparison_with_pasting_agrees_with_its_files() -> None:
    pasted, plain = (
        100
        * pd.read_csv(DOCS / "evidence" / f"acdc_2d_{name}.csv").groupby(["seed", "method"])["dice"].mean().unstack()
        for name in ("pasted", "semi_supervised_two_patients")
    )
    found = pasted.assign(plain=plain["scratch"])[["mae", "scratch", "scratch_more", "plain"]]
    page = (DOCS / "evidence" / "acdc_pretraining.md").read_text(encoding="utf-8")
    lines = page.split("| Subset | `mae` |")[1].split("\n\n")[0].splitlines()[2:]
    stated = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in lines]
    assert stated == [pytest.approx(list(row), abs=0.06) for row in [*found.to_numpy(), found.mean().to_numpy()]]
    mean, semi = found.mean(), plain["semi_scratch"].loc[found.index].mean()
    for sentence in (
        f"loses {mean['scratch_more'] - mean['mae']:.1f} points against `scratch_more`",
        f"and {mean['scratch'] - mean['mae']:.1f} against `scratch`",
        f"gains {mean['scratch'] - mean['plain']:.1f} points over `scratch` without it",
        f"`semi_scratch` has a mean of {semi:.1f}",
        f"{semi - mean['scratch_more']:.1f} points above `scratch_more`",
        f"and {semi - plain['scratch_longer'].loc[found.index].mean():.1f} above `scratch_longer`",
    ):
        assert sentence in " ".join(page.split())
    assert (found["mae"] < found[["scratch", "scratch_more"]].min(axis=1)).tolist() == [True] * 4 + [False]


# Files without scores of cases: curves, probes, and facts about pretrainings.
WITHOUT_CASES = {
    "h100_dice_while_training.csv",
    "hippocampus_2d_curve_pretrainings.csv",
    "hippocampus_2d_curve_while_training.csv",
    "hippocampus_2d_no_augmentation_while_training.csv",
    "hippocampus_2d_probe.csv",
    "hippocampus_2d_probe_settings.csv",
    "hippocampus_2d_probe_together.csv",
}


@pytest.mark.parametrize("path", sorted((DOCS / "evidence").glob("*.csv")), ids=lambda path: path.stem)
def test_kept_scores_have_the_columns_of_a_comparison(path: Path) -> None:
    scores = pd.read_csv(path)
    if path.name in WITHOUT_CASES:
        assert "case" not in scores
        return
    score = "auroc" if "auroc" in scores else "dice"
    wanted = ["method", "labelled", "seed", "case", "label", score]
    assert [name for name in scores if name in wanted] == wanted  # settings may stand before them
    assert scores[score].dropna().between(0, 1).all()
    is_acdc = scores["case"].astype(str).str.fullmatch(r"patient\d+_\d\d").any()
    assert is_acdc == path.name.startswith("acdc")


def of_subsets(file: str) -> pd.DataFrame:
    """Mean Dice, in points, by (labelled, subset) and method."""
    scores = pd.read_csv(DOCS / "evidence" / file)
    assert list(scores) == ["method", "labelled", "seed", "case", "label", "dice"]
    return 100 * scores.groupby(["labelled", "seed", "method"])["dice"].mean().unstack("method")


def test_the_later_comparisons_of_semi_supervised_training_agree_with_their_files() -> None:
    page = " ".join((DOCS / "semi_supervised.md").read_text(encoding="utf-8").split())
    pasted = of_subsets("acdc_2d_pasted_one_patient.csv")["scratch_more"].loc[2]
    semi = of_subsets("acdc_2d_semi_supervised.csv").loc[2]
    appendix = " ".join((DOCS / "evidence" / "acdc_pretraining.md").read_text(encoding="utf-8").split())
    assert (
        f"{', '.join(f'{dice:.1f}' for dice in pasted[:4])} and {pasted[4]:.1f}, with a mean of {pasted.mean():.1f}"
        in appendix
    )
    assert f"{(pasted - semi['scratch_longer']).mean():.1f} points above `scratch_longer`" in appendix
    assert f"{(pasted - semi['scratch']).mean():.1f} points above `scratch` without pasting" in appendix
    assert semi["scratch"].mean() > semi["scratch_longer"].mean()
    assert f"gains {(semi['semi_scratch'] - pasted).mean():.1f} points over it" in page
    assert (semi["semi_scratch"] > pasted).all()
    ten = of_subsets("hippocampus_2d_semi_supervised_10_labels.csv").loc[(10, 0)]
    assert f"8,000 steps: {ten['semi_scratch']:.1f} against {ten['scratch']:.1f} of `scratch`" in page


def stated_below(heading: str) -> list[list[float]]:
    """The scores of a table in docs/semi_supervised.md, by the beginning of its heading; NaN where a cell is empty."""
    page = (DOCS / "semi_supervised.md").read_text(encoding="utf-8")
    lines = page.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [[float(cell.strip() or "nan") for cell in line.strip("|").split("|")[1:]] for line in lines]


def with_mean(found: pd.DataFrame) -> list[Any]:
    """The rows of a table and their mean, to compare with the rounded scores on a page."""
    return [pytest.approx(list(row), abs=0.06) for row in [*found.to_numpy(), found.mean().to_numpy()]]


def test_the_table_of_nodules_agrees_with_its_file() -> None:
    found = of_subsets("lidc_masks_2d_semi_supervised.csv").loc[5]
    assert stated_below("| Subset, nodules |") == with_mean(found)


def test_the_table_of_five_labelled_patients_agrees_with_its_files() -> None:
    found, before = (
        of_subsets(f"acdc_2d_semi_supervised_five_patients{name}.csv").loc[10] for name in ("_waiting", "")
    )
    assert stated_below("| Subset, five patients |") == with_mean(found)
    page = " ".join((DOCS / "semi_supervised.md").read_text(encoding="utf-8").split())
    assert f"{(found['semi_scratch'] - found['scratch']).mean():.1f} points more than `scratch`" in page
    first, second, third = before["semi_scratch"]
    assert f"with an earlier version: {first:.1f}, {second:.1f} and {third:.1f}" in page
    assert before["scratch"].equals(found["scratch"].loc[:2])  # only `semi_scratch` was trained again
    longer = before["scratch_longer"]
    assert f"`scratch_longer` has {longer[0]:.1f} and {longer[1]:.1f}" in page
    scores = pd.read_csv(DOCS / "evidence" / "acdc_2d_semi_supervised_five_patients.csv")
    lost = scores.query("seed == 1 and label == 'RV' and method == 'semi_scratch'")["dice"]
    assert f"{100 * lost.mean():.1f} Dice" in page


def test_what_the_pretraining_adds_agrees_with_its_files() -> None:
    without = of_subsets("acdc_2d_semi_supervised_two_patients.csv").loc[4]["semi_scratch"]
    found = pd.DataFrame(
        {"without": without, "with": of_subsets("acdc_2d_semi_supervised_pretrained.csv").loc[4]["semi"]}
    )
    assert stated_below("| Subset, pretrained |") == with_mean(found)
    added = (found["with"] - found["without"]).mean()
    assert f"The pretraining adds {added:.1f} points" in (DOCS / "semi_supervised.md").read_text(encoding="utf-8")


def test_the_table_of_many_labels_agrees_with_its_file() -> None:
    found = of_subsets("hippocampus_2d_semi_supervised_70_126_labels.csv")
    columns = found[["scratch", "semi_scratch", "semi_scratch_all_steps"]].to_numpy()
    assert stated_below("| Labelled, subset |") == [pytest.approx(list(row), abs=0.06, nan_ok=True) for row in columns]
    first, second, third = found["semi_scratch"] - found["scratch"]
    page = " ".join((DOCS / "semi_supervised.md").read_text(encoding="utf-8").split())
    assert f"the differences are {first:+.1f}, {second:+.1f} and {third:+.1f}" in page
    lost = (found["scratch"] - found["semi_scratch_all_steps"]).dropna()
    assert [round(loss) for loss in lost] == [9, 5]  # as the page says


def test_the_loss_on_the_hippocampus_agrees_with_its_file() -> None:
    scores = pd.read_csv(DOCS / "evidence" / "hippocampus_2d_semi_supervised.csv")
    assert scores.groupby(["seed", "method"])["case"].nunique().tolist() == [40] * 15
    found = 100 * scores.groupby(["seed", "method"])["dice"].mean().unstack("method")
    assert stated_below("| Subset, hippocampus |") == with_mean(found)
    page = (DOCS / "semi_supervised.md").read_text(encoding="utf-8")
    for control in ("scratch_longer", "scratch"):
        lost = (found[control] - found["semi_scratch"]).mean()
        assert f"{lost:.1f} points against `{control}`" in " ".join(page.split())


def test_the_frozen_look_and_its_fine_tuning_agree_with_their_files() -> None:
    frozen, tuned = (
        100
        * pd.read_csv(DOCS / "evidence" / f"acdc_2d_{name}.csv")
        .fillna({"dice": 1.0})
        .groupby(["method", "seed", "case"])["dice"]
        .mean()
        .groupby(["method", "seed"])
        .mean()
        .unstack("seed")
        for name in ("frozen", "methods")
    )
    page = (DOCS / "compare.md").read_text(encoding="utf-8")
    lines = page.split("| Method | Frozen, subset 0 |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    stated = pd.DataFrame(cells).replace("", "nan").set_index(0)
    stated = stated.set_axis(stated.index.str.strip("`")).astype(float)
    expected = pd.concat([frozen, tuned], axis=1).reindex(stated.index)
    assert set(stated.index) == {*frozen.index, *tuned.index}
    np.testing.assert_allclose(stated.to_numpy(), expected.to_numpy(), atol=0.051)
    both = frozen.index.intersection(tuned.index)
    ranks = [spearmanr(frozen.loc[both, seed], tuned.loc[both, seed]).statistic for seed in (0, 1)]
    assert f"is {ranks[0]:.2f} in subset 0 and\n  {ranks[1]:.2f} in subset 1" in page
    assert f"is {spearmanr(frozen[0], frozen[1]).statistic:.2f}, over eleven rows" in page
    assert (
        f"the rank correlation of the two subsets is {spearmanr(*tuned.loc[both].T.to_numpy()).statistic:.2f}." in page
    )


def test_the_frozen_look_at_x_rays_agrees_with_its_file() -> None:
    scores = pd.read_csv(DOCS / "evidence" / "xrays_frozen.csv")
    found = 100 * scores.groupby(["method", "labelled", "seed"])["auroc"].mean().unstack(["labelled", "seed"])
    means = found.T.groupby("labelled").mean().T
    page = (DOCS / "evidence" / "classification.md").read_text(encoding="utf-8")
    lines = page.split("| Frozen features |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in lines]
    assert {row[0].strip(" `") for row in rows} == set(found.index)
    for name, *cells in rows:
        stated = np.array([[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in cells[:3]])
        np.testing.assert_allclose(stated[:, 0], means.loc[name.strip(" `")], atol=0.051)
        assert (stated[:, 1] < stated[:, 0]).all()
        assert (stated[:, 0] < stated[:, 2]).all()
    assert set(means.idxmax()) == {"thumbnail"}
    apart = found.T.groupby("labelled").agg(np.ptp).drop(columns=["thumbnail", "mean_intensity"]).max().max()
    assert f"differ by up to {apart:.0f} points" in page


def test_the_pages_name_every_file_of_the_results() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    files = [file.name for file in (DOCS / "evidence").iterdir() if file.suffix in {".csv", ".png", ".txt"}]
    assert len(files) >= 20
    assert [file for file in files if f"{file})" not in text] == []
