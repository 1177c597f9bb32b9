"""COVIDx CXR: radiographs of several public sources, COVID-19 or not.

Source folder: the image lists and the folders of one release; releases are not nested in one
another. A line of a list is "patient file class source", separated by spaces; patients and files of
some sources hold spaces too, so that lines are read from the right, and the file is the one that
exists. The lists have no header: a reader that takes the first line for one loses it.

COVIDx holds RSNA's images, which are NIH's, as normal and pneumonia.
"""

from collections.abc import Iterator
from pathlib import Path

from medvlp_jax.data import building, files, layouts, records, splits

WHERE = "https://github.com/lindawangg/COVID-Net (docs/COVIDx.md), Kaggle andyczhao/covidx-cxr2"
CLASSES = {"9a": ("normal", "pneumonia", "COVID-19"), "cxr4": ("negative", "positive")}
# Per variant: list -> (folder of its images, split).
LISTS = {
    "9a": {"train_COVIDx9A.txt": ("train", "train"), "test_COVIDx9A.txt": ("test", "test")},
    "cxr4": {
        "train.txt": ("train", "train"),
        "val.txt": ("val", "validation"),
        "test.txt": ("test", "test"),
    },
}


class Builder(building.Builder):
    """TFDS builder of `covidx`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with the lists, train/, test/ and, in CXR-4, val/."
    VARIANTS = {
        "9a": "V9A, three classes; MGCA's 80/20 of the training list, seed 0.",
        "cxr4": "CXR-4, positive or negative.",
    }
    PUBLISHED = {
        "9a train + validation": 29_986,
        "9a test": 400,
        "cxr4 train": 67_863,
        "cxr4 validation": 8_473,
        "cxr4 test": 8_482,
    }

    def tasks(self):
        return {"class": CLASSES[self.variant]}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        for name, (images, split) in LISTS[self.variant].items():
            rows = [
                read_line(folder, row, images, CLASSES[self.variant])
                for row in layouts.lines(folder, name, WHERE)
            ]
            held = _held(rows) if name == "train_COVIDx9A.txt" else set()
            for row in rows:
                yield building.Sample(
                    row=row,
                    path=layouts.member(folder, row, f"{images}/{row['file']}"),
                    split="validation" if row.number in held else split,
                    image_id=f"{images}/{row['file']}",
                    patient_id=row["patient"],
                    study_id=row["patient"],
                    labels={"class": records.one_hot(row["class"], CLASSES[self.variant])},
                )


def _held(rows: list[files.Row]) -> set[int]:
    """Return the line numbers that MGCA validates on."""
    numbers = [row.number for row in rows]
    return {*splits.train_and_rest(numbers, held=0.2, seed=0)[1]} if len(rows) > 1 else set()


def read_line(folder: Path, row: files.Row, images: str, classes: tuple[str, ...]) -> files.Row:
    """Return a line as patient, file, class and source.

    Raises:
      UserError: for another number of words or another class.
    """
    words = row["line"].rsplit(maxsplit=2)
    head = words[0].split(" ")
    choices = [(" ".join(head[:k]), " ".join(head[k:])) for k in range(len(head) - 1, 0, -1)]
    choices = [pair for pair in choices if all(map(str.strip, pair))]
    if len(words) != 3 or not choices or words[1] not in classes:
        raise row.error(
            f"'{row['line'][:80]}' is no line of COVIDx; accepted is 'patient file class source' "
            f"with the class {', '.join(classes)}."
        )
    exists = [p for p in choices if layouts.member(folder, row, f"{images}/{p[1]}").is_file()]
    patient, file = (exists or choices)[0]
    cells = {"patient": patient, "file": file, "class": words[1], "source": words[2]}
    return row._replace(cells=cells)
