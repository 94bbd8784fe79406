"""Small trees in the published layouts of NIH ChestX-ray14 and CheXpert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# the first line of Data_Entry_2017.csv, with the comma at its end, and of the version of 2020
NIH_HEADERS = {
    "Data_Entry_2017.csv": (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    ),
    "Data_Entry_2017_v2020.csv": (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    ),
}
CHEXPERT_LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
CHEXPERT_HEADER = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT_LABELS}"


def write_xray(path: Path, mode: str = "L", size: tuple[int, int] = (64, 48), bright: bool = False) -> np.ndarray:
    """Write an image of smooth noise, of width and height `size`, in a mode of PIL. Return its values, 0 to 255.

    `bright` adds a bright disc, which a network can find.
    """
    rng = np.random.default_rng(sum(path.name.encode()))
    small = Image.fromarray(rng.integers(60, 140, (size[1] // 8 + 2, size[0] // 8 + 2), dtype=np.uint8))
    values = np.array(small.resize(size, Image.Resampling.BICUBIC))
    if bright:
        y, x = np.ogrid[: size[1], : size[0]]
        values[(y - size[1] / 2) ** 2 + (x - size[0] / 2) ** 2 < (min(size) / 4) ** 2] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16) * 257).save(path)
    elif mode == "P":
        image = Image.fromarray(255 - values).convert("P")
        image.putpalette([255 - i // 3 for i in range(3 * 256)])  # the palette inverts
        image.save(path)
    else:
        Image.fromarray(values).convert(mode).save(path)
    return values


def write_nih(
    root: Path,
    findings: Mapping[str, str],
    test: Sequence[str] = (),
    table: str = "Data_Entry_2017.csv",
    folders: int = 12,
    size: tuple[int, int] = (64, 48),
) -> dict[str, Path]:
    """Write images, table and lists.

    Args:
        findings: findings with | between them, by name of the image without ending, such as 00000001_000. The part
            before the underscore is the patient. Images with a Mass have a bright disc.
        test: patients of the test list.
        folders: number of folders images_001/images and so on; 0: one folder.

    Returns:
        The images by name.
    """
    images, lines = {}, [NIH_HEADERS[table]]
    for i, (name, found) in enumerate(findings.items()):
        folder = root / f"images_{1 + i % folders:03d}" / "images" if folders else root / "images"
        images[name] = folder / f"{name}.png"
        write_xray(images[name], size=size, bright="Mass" in found)
        end = "," * lines[0].endswith(",")
        lines.append(f"{name}.png,{found},0,{int(name.split('_')[0])},58,M,PA,2682,2749,0.143,0.143{end}")
    (root / table).write_text("\n".join(lines) + "\n")
    of_test = [name for name in findings if name.split("_")[0] in test]
    others = [name for name in findings if name not in of_test]
    for file, names in (("test_list", of_test or ["00099999_000"]), ("train_val_list", others)):
        (root / f"{file}.txt").write_text("\n".join(f"{name}.png" for name in names))  # no newline at the end
    return images


def write_chexpert(
    root: Path,
    labels: Mapping[str, Mapping[str, str]],
    top: str = "CheXpert-v1.0-small",
    size: tuple[int, int] = (64, 48),
) -> dict[str, Path]:
    """Write images and tables below `root`/`top`.

    Args:
        labels: the cells of an image by label, such as {"Edema": "-1.0"}, by its path below `top`, such as
            train/patient00001/study1/view1_frontal.jpg. The first part of the path names the table. Images with Edema
            have a bright disc.

    Returns:
        The images by path.
    """
    images = {}
    lines: dict[str, list[str]] = {}
    for path, cells in labels.items():
        images[path] = root / top / path
        write_xray(images[path], size=size, bright=cells.get("Edema") == "1.0")
        part = path.split("/")[0]
        view = "Frontal,AP" if "frontal" in path else "Lateral,"
        values = ",".join(cells.get(label, "") for label in CHEXPERT_LABELS.split(","))
        lines.setdefault(part, [CHEXPERT_HEADER if part != "test" else f"Path,{CHEXPERT_LABELS}"])
        before = f"{top}/{path},Female,68,{view}" if part != "test" else path
        lines[part].append(f"{before},{values}")
    for part, of_part in lines.items():
        (root / top / f"{part}.csv").write_text("\n".join(of_part) + "\n")
    return images
