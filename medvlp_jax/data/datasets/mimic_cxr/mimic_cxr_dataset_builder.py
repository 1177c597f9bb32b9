"""MIMIC-CXR-JPG with the reports of MIMIC-CXR, versions 2.0.0 and 2.1.0.

Source folder, as PhysioNet lays both out:

  mimic-cxr-jpg/  files/p10/p10000032/s50414267/<dicom_id>.jpg
                  mimic-cxr-2.0.0-metadata.csv.gz   -split.csv.gz   -chexpert.csv.gz
  mimic-cxr/      mimic-cxr-reports.zip, or unpacked files/p10/p10000032/s50414267.txt

Sections are taken by MIMIC-CXR's own rules, see data/sections.py; the 54 studies that its sectioned
table lacks are in, with their text as impression. Labels are CheXpert's, in CheXpert's order. The
split is the official one; patients are apart.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.data import building, cxr_labels, files, layouts, sections

WHERE = "https://physionet.org/content/mimic-cxr-jpg/ (credentialed, data use agreement)"
REPORTS_WHERE = "https://physionet.org/content/mimic-cxr/ (credentialed, data use agreement)"
JPG, REPORTS = "mimic-cxr-jpg", "mimic-cxr"
IDS = ("dicom_id", "subject_id", "study_id")
LABELS = ",".join(("subject_id", "study_id", *sorted(cxr_labels.CHEXPERT)))


def _table(name: str, *headers: str, ordered: bool = True) -> layouts.Table:
    path = f"{JPG}/mimic-cxr-2.0.0-{name}.csv"
    return layouts.Table((f"{path}.gz", path), headers, WHERE, ordered=ordered)


METADATA = _table(
    "metadata",
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning",
)
SPLIT = _table("split", "dicom_id,study_id,subject_id,split", ordered=False)
CHEXPERT = _table("chexpert", LABELS)
SPLITS = {"train": "train", "validate": "validation", "test": "test"}
FRONTAL = ("PA", "AP")
# Others are unpacked in one go, to any length, whatever the archive says of it.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
NO_REPORT = "no report file"
MAX_MISSING = 0.01  # of the studies; the releases lack none, so that more is another folder


class Builder(building.Builder):
    """TFDS builder of `mimic_cxr`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {JPG}/ and {REPORTS}/ as PhysioNet has them."
    VARIANTS = {
        "frontal": "Frontal views (PA, AP) of studies with findings or an impression.",
        "pairs": "All views of studies with findings or an impression.",
        "images": "All views of all studies; the text may be missing.",
    }
    PUBLISHED = {"train": 368_960, "validation": 2_991, "test": 5_159}

    def tasks(self):
        return cxr_labels.CHEXPERT_TASKS

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        rows = METADATA.rows(folder, filled=IDS, unique="dicom_id")
        split = {row["dicom_id"]: row for row in SPLIT.rows(folder, filled=(*IDS, "split"))}
        labels = {row["study_id"]: row for row in CHEXPERT.rows(folder, unique="study_id")}
        reports = Reports(folder)
        reports.check(rows)
        for row in rows:
            has_report = reports.holds(row)
            if self.variant == "frontal" and row["ViewPosition"] not in FRONTAL:
                self.left_out("not frontal (PA, AP)")
            elif self.variant != "images" and not has_report:
                self.left_out(NO_REPORT)
            elif self.variant != "images" and not any(reports.sections(row)):
                self.left_out("neither findings nor impression")
            else:
                if not has_report:
                    self.noted(f"with {NO_REPORT}")
                yield _sample(folder, row, split, labels, reports)


class Reports:
    """The reports of a source folder, read from its archive or its files, a study once."""

    def __init__(self, folder: Path):
        self.folder = folder / REPORTS
        self.path = self.folder / "mimic-cxr-reports.zip"
        self.members: dict[str, zipfile.ZipInfo] = {}
        if self.path.is_file():
            self.archive = _open(self.path)
            members = self.archive.infolist()
            self.members = {m.filename.removeprefix("mimic-cxr-reports/"): m for m in members}
        elif not (self.folder / "files").is_dir():
            raise UserError(
                f"{self.path} is missing, and so is {self.folder / 'files'}; get it from "
                f"{REPORTS_WHERE}."
            )
        self.found: dict[str, tuple[str, str]] = {}
        self.missing: set[str] = set()

    def check(self, rows: Sequence[files.Row]) -> None:
        """Look for the report of every study.

        Raises:
          UserError: where more than MAX_MISSING of them have none.
        """
        studies = {row["study_id"]: row for row in rows}
        lacking = [row for row in studies.values() if not self._is_there(row)]
        self.missing = {row["study_id"] for row in lacking}
        if len(lacking) > MAX_MISSING * len(studies):
            raise UserError(
                f"{self.path if self.path.is_file() else self.folder} has no report for "
                f"{len(lacking):,} of {len(studies):,} studies: there is no {_name(lacking[0])}, "
                f"but such as {self._shown()}; get the reports from {REPORTS_WHERE}."
            )

    def holds(self, row: files.Row) -> bool:
        """Say whether the study of a row has a report, once `check` has looked for all."""
        return row["study_id"] not in self.missing

    def _is_there(self, row: files.Row) -> bool:
        if self.members:
            return _name(row) in self.members
        return layouts.member(self.folder, row, _name(row)).is_file()

    def _shown(self) -> str:
        """Return the first name of what is there."""
        if self.members:
            named = (m.filename for m in self.members.values() if not m.is_dir())
            return min(named, default="empty folders")
        path = self.folder / "files"
        while path.is_dir() and (inside := sorted(path.iterdir())):
            path = inside[0]
        return path.relative_to(self.folder).as_posix()

    def sections(self, row: files.Row) -> tuple[str, str]:
        """Return (findings, impression) of the study of a row; empty where it has no report.

        Raises:
          UserError: for a report that cannot be read.
        """
        study = f"s{row['study_id']}"
        if study not in self.found:
            text = self._read(row, _name(row))
            parts = sections.of_study(text, study)
            self.found[study] = " ".join(parts.findings.split()), " ".join(parts.impression.split())
        return self.found[study]

    def _read(self, row: files.Row, name: str) -> str:
        if not self.members:
            path = layouts.member(self.folder, row, name)
            content = path.read_bytes() if path.is_file() else b""
        elif member := self.members.get(name):
            if member.file_size > files.MAX_REPORT:
                raise row.error(f"{name} in {self.path} has {member.file_size:,} bytes: no report.")
            if member.compress_type not in COMPRESSIONS:
                raise row.error(f"{name} in {self.path} is neither stored nor deflated.")
            try:
                with self.archive.open(member) as file:
                    content = file.read(files.MAX_REPORT + 1)
            except Exception as error:  # a damaged archive raises any of a dozen types
                raise row.error(f"{name} in {self.path} cannot be read ({error}).") from error
        else:
            content = b""
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise row.error(f"report {name} is not UTF-8 text ({error}).") from error


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # as above
        raise UserError(
            f"{path} is no whole zip archive ({error}); get it from {REPORTS_WHERE}."
        ) from error


def _patient_folder(row: files.Row) -> str:
    subject = row["subject_id"]
    return f"files/p{subject[:2]}/p{subject}"


def _name(row: files.Row) -> str:
    """Return where the report of a row lies."""
    return f"{_patient_folder(row)}/s{row['study_id']}.txt"


def _sample(folder: Path, row: files.Row, split, labels, reports: Reports) -> building.Sample:
    image, study = row["dicom_id"], row["study_id"]
    if image not in split:
        raise row.error(f"dicom_id {image} has no row in {SPLIT.names[0]}.")
    part = split[image]
    if (part["subject_id"], part["study_id"]) != (row["subject_id"], study):
        raise part.error(f"dicom_id {image} has another subject or study than in {row.path.name}.")
    # Some studies could not be labelled: the label table has 227,827 of 227,835.
    known = labels.get(study)
    tasks = cxr_labels.CHEXPERT_TASKS
    name = f"{JPG}/{_patient_folder(row)}/s{study}/{image}.jpg"
    return building.Sample(
        row=row,
        path=layouts.member(folder, row, name),
        split=SPLITS[part.choice("split", tuple(SPLITS))],
        image_id=image,
        patient_id=f"p{row['subject_id']}",
        study_id=f"s{study}",
        sections=reports.sections(row),
        labels=cxr_labels.four_valued(known) if known else cxr_labels.unknown(tasks),
    )
