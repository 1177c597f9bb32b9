"""Small source folders in the published layouts: exact headers, noise images, a few rows each.

Headers are written out here a second time, from the reference page, so that a builder whose header
is changed by mistake no longer reads its fixture.
"""

import gzip
import json
import zipfile

import numpy as np
from conftest import write_image
from PIL import Image
from test_dicom import write_dicom

FINDINGS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
    "Support Devices"
)
ALPHABETICAL = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
SHAPE = (40, 60)


def table(path, header, *rows):
    """Write a CSV table as text; a name that ends in .gz is packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join((header, *rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def image(path, seed=0, shape=SHAPE):
    """Write a noise image: DICOM, JPEG or PNG by its name."""
    if path.suffix in (".dcm", ".dicom"):
        pixels = np.random.default_rng(seed).integers(0, 256, shape)
        write_dicom(path, pixels.astype(np.uint8), bits=8)
    else:
        write_image(path, seed, shape)


def report(findings, impression):
    """Return a report as MIMIC-CXR writes it; a section that is None has no heading."""
    parts = ["                                 FINAL REPORT", " INDICATION:  cough", " "]
    parts += [f" FINDINGS: \n \n {findings}\n "] if findings is not None else []
    parts += [f" IMPRESSION: \n \n {impression}"] if impression is not None else []
    return "\n".join(parts)


MIMIC_ROWS = (  # dicom, subject, study, view, split
    ("a-1", "10000032", "50414267", "PA", "train"),
    ("a-2", "10000032", "50414267", "LATERAL", "train"),
    ("b-1", "10000764", "57375967", "AP", "validate"),
    ("c-1", "11000898", "50771383", "", "test"),
    ("d-1", "11000999", "50058765", "AP", "test"),  # one of the 54 exceptions
)


def mimic_cxr(folder, *, zipped=False):
    """Five images of four studies; the third study has no sections at all."""
    jpg, reports = folder / "mimic-cxr-jpg", folder / "mimic-cxr"
    table(
        jpg / "mimic-cxr-2.0.0-metadata.csv.gz",
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
        "PatientOrientationCodeSequence_CodeMeaning",
        *(
            f'{d},{p},{s},"CHEST (PA AND LAT)",{v},40,60,21800506,213014.531,x,postero,Erect'
            for d, p, s, v, _ in MIMIC_ROWS
        ),
    )
    table(
        jpg / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split",
        *(f"{d},{s},{p},{part}" for d, p, s, _, part in MIMIC_ROWS),
    )
    table(
        jpg / "mimic-cxr-2.0.0-chexpert.csv.gz",
        f"subject_id,study_id,{ALPHABETICAL}",
        "10000032,50414267,1.0,0.0,-1.0,,,,,,,,,,,",
    )
    texts = {
        "10000032/s50414267": report("The lungs\n are clear.", "Normal."),
        "10000764/s57375967": report(None, "Pneumonia."),
        "11000898/s50771383": "No heading.",
        "11000999/s50058765": report(None, "see above"),
    }
    reports.mkdir(parents=True, exist_ok=True)
    if zipped:
        with zipfile.ZipFile(reports / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in texts.items():
                archive.writestr(f"mimic-cxr-reports/files/p{name[:2]}/p{name}.txt", text)
    else:
        for name, text in texts.items():
            path = reports / f"files/p{name[:2]}/p{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for k, (d, p, s, _, _) in enumerate(MIMIC_ROWS):
        image(jpg / f"files/p{p[:2]}/p{p}/s{s}/{d}.jpg", k)


def chexpert(folder):
    """Three training views of two patients, a validation and a test study."""
    header = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FINDINGS}"
    release = "CheXpert-v1.0-small"
    names = {
        "train": [
            ("patient00001/study1/view1_frontal.jpg", "Frontal,AP", "1.0,,,,-1.0,0.0,,,,,,,,"),
            ("patient00001/study1/view2_lateral.jpg", "Lateral,", "1.0,,,,-1.0,0.0,,,,,,,,"),
            ("patient00002/study2/view1_frontal.jpg", "Frontal,PA", ",,,,,,,,1.0,,,,,"),
        ],
        "valid": [
            ("patient64541/study1/view1_frontal.jpg", "Frontal,AP", ",".join(["0.0"] * 14)),
        ],
    }
    for part, rows in names.items():
        lines = [f"{release}/{part}/{name},Male,60,{view},{values}" for name, view, values in rows]
        table(folder / f"{part}.csv", header, *lines)
        for k, (name, _, _) in enumerate(rows):
            image(folder / part / name, k)
    table(
        folder / "groundtruth.csv",
        f"Study,{FINDINGS}",
        f"CheXpert-v1.0/test/patient64741/study1,{','.join(['0', '1'] * 7)}",
    )
    image(folder / "test/patient64741/study1/view1_frontal.jpg")


def chexpert_plus(folder):
    """A JPEG with a report and labels, a PNG without findings, a study without text."""
    header = (
        "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,"
        "patient_report_date_order,report,section_narrative,section_clinical_history,"
        "section_history,section_comparison,section_technique,section_procedure_comments,"
        "section_findings,section_impression,section_end_of_impression,section_summary,"
        "section_accession_number,age,sex,race,ethnicity,interpreter_needed,insurance_type,"
        "recent_bmi,deceased,split"
    )
    names = [f"train/patient4214{k}/study5/view1_frontal.jpg" for k in range(3)]
    texts = ['"Clear lungs,\nno effusion.",Normal.', ",Edema.", ","]
    lines = [
        f'{name},{name}.dcm,Frontal,AP,p{k},1,"all",{"," * 6}{text}{"," * 12}'
        f"{'valid' if k == 1 else 'train'}"
        for k, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    table(folder / "df_chexpert_plus_240401.csv", header, *lines)
    image(folder / names[0])
    image(folder / "PNG" / names[1].replace(".jpg", ".png"))
    image(folder / names[2])
    label = dict.fromkeys(FINDINGS.split(",")) | {"Edema": 1.0, "Fracture": -1.0, "Pneumonia": 0}
    labels = folder / "chexbert_labels/report_fixed.json"
    labels.parent.mkdir()
    labels.write_text(json.dumps({"path_to_image": names[0], **label}) + "\n")


PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,"
    "PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,PixelAspectRatio_DICOM,"
    "SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
    "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)


def padchest(folder):
    """Four views, one lateral, one on the skip list; one row without labels."""
    broken = "216840111366964012819207061112010307142602253_04-014-084.png"
    rows = [
        ("one.png", "PA", "Physician", "\"['normal', ' Pleural Effusion ']\""),
        ("two.png", "L", "Physician", "['normal']"),
        (broken, "AP", "RNN_model", "['normal']"),
        ("three.png", "AP_horizontal", "RNN_model", "nan"),
    ]
    lines = [
        f"{k},{name},0,20140915,s{k},p{k},1930.0,F,POST,{view},auto,No,CR,X,MONOCHROME2,"
        f"{','.join(['0'] * 13)},47,sin hallazg .,{method},{labels},[],[],[],[]"
        for k, (name, view, method, labels) in enumerate(rows)
    ]
    table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", PADCHEST, *lines)
    (folder / "0").mkdir(exist_ok=True)
    for k, (name, *_) in enumerate(rows):
        if name != broken:
            pixels = np.random.default_rng(k).integers(0, 4096, SHAPE).astype(np.uint16)
            Image.fromarray(pixels).save(folder / "0" / name)


def rocov2(folder):
    """A captioned figure in each split; concepts of the first."""
    for part in ("train", "valid", "test"):
        name = f"ROCOv2_2023_{part}_000001"
        table(folder / f"{part}_captions.csv", "ID,Caption", f'{name},"CT, axial: a mass."')
        image(folder / f"{part}_images/{name}.jpg")
    table(folder / "train_concepts.csv", "ID,CUIs", "ROCOv2_2023_train_000001,C0040405;C0817096")


def rsna_pneumonia(folder, count=12):
    """Images of which the first has two boxes."""
    lines = ["id00,10.0,5.0,20.0,10.0,1", "id00,40.0,20.0,10.0,10.0,1"]
    lines += [f"id{k:02},,,,,0" for k in range(1, count)]
    table(folder / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *lines)
    kinds = ["id00,Lung Opacity", "id00,Lung Opacity", "id01,Normal"]
    kinds += [f"id{k:02},No Lung Opacity / Not Normal" for k in range(2, count)]
    table(folder / "stage_2_detailed_class_info.csv", "patientId,class", *kinds)
    for k in range(count):
        image(folder / f"stage_2_train_images/id{k:02}.dcm", k)


def siim_acr(folder, *, space=True, count=12):
    """Images of which the first has two rows of runs."""
    lines = ["1.2.0,2 3", "1.2.0,45 2"] + [f"1.2.{k},{' ' * space}-1" for k in range(1, count)]
    table(folder / "train-rle.csv", f"ImageId,{' ' * space}EncodedPixels", *lines)
    for k in range(count):
        image(folder / f"dicom-images-train/study{k}/series{k}/1.2.{k}.dcm", k)


def siim_png(folder):
    """The PNG re-pack: a positive and a negative training image, a test image."""
    header = "new_filename,ImageId,has_pneumo"
    rows = {"train": ["0_train_1_.png,1.2.0,1", "1_train_0_.png,1.2.1,0"], "test": []}
    rows["test"] = ["0_test_0_.png,1.2.2,0"]
    for part, lines in rows.items():
        table(folder / f"stage_1_{part}_images.csv", header, *lines)
        for line in lines:
            name = line.split(",")[0]
            image(folder / "png_images" / name)
            mask = np.zeros(SHAPE, np.uint8)
            mask[2:5, 3:6] = 255 * line.endswith("1")
            (folder / "png_masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / "png_masks" / name)


NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def nih_cxr14(folder, *, comma=False):
    """Three images of two patients, one with a box; with or without the old trailing comma."""
    end = "," * comma
    table(
        folder / f"Data_Entry_2017{'' if comma else '_v2020'}.csv",
        NIH + end,
        f"00000001_000.png,Cardiomegaly|Infiltration,0,1,058Y,M,PA,2682,2749,0.143,0.143{end}",
        f"00000001_001.png,No Finding,1,1,58,M,PA,2894,2729,0.143,0.143{end}",
        f"00000002_000.png,No Finding,0,2,81,M,AP,2500,2048,0.171,0.171{end}",
    )
    table(
        folder / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        "00000001_000.png,Infiltrate,6.0,4.0,30.0,20.0",
    )
    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (folder / "test_list.txt").write_text("00000002_000.png")
    image(folder / "images_001/images/00000001_000.png", 0)
    image(folder / "images_001/images/00000001_001.png", 1)
    image(folder / "images_002/images/00000002_000.png", 2)


def covidx(folder):
    """Both releases; one file name holds a space."""
    lists = {
        "train_COVIDx9A.txt": [f"{k} im{k}.png normal rsna" for k in range(4)]
        + ["ANON 7 a b.png COVID-19 sirm"],
        "test_COVIDx9A.txt": ["9 t.png pneumonia cohen"],
        "train.txt": ["1 im1.png negative rsna"],
        "val.txt": ["2 v.jpg positive bimcv"],
        "test.txt": ["9 t.png positive ricord"],
    }
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    for k, name in enumerate(["im0.png", "im1.png", "im2.png", "im3.png", "a b.png"]):
        image(folder / "train" / name, k)
    image(folder / "test/t.png")
    image(folder / "val/v.jpg")


def object_cxr(folder):
    """Every kind of object, and none."""
    shapes = '"0 5 5 15 10;1 20 10 40 30;2 30 2 50 2 50 8"'
    table(folder / "train.csv", "image_name,annotation", f"00001.jpg,{shapes}", "00002.jpg,")
    table(folder / "dev.csv", "image_name,annotation", "08001.jpg,")
    table(folder / "test.csv", "image_path,annotation", "test/09001.jpg,0 5 5 15 10")
    for k, name in enumerate(("train/00001", "train/00002", "dev/08001", "test/09001")):
        image(folder / f"{name}.jpg", k)


VINDR = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,"
    "Edema,Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,"
    "Mediastinal shift,Nodule/Mass,Pleural effusion,Pleural thickening,Pneumothorax,"
    "Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,Tuberculosis,"
    "Other diseases,No finding"
)


def vindr_cxr(folder):
    """Three training images with three readers, one test image with a consensus."""
    marks = {"a": (1, 0, 0), "b": (1, 1, 0), "c": (0, 0, 0)}
    lines = [
        f"{name},R{reader},{seen},{','.join(['0'] * 26)},{1 - seen}"
        for name, votes in marks.items()
        for reader, seen in enumerate(votes)
    ]
    header = f"image_id,rad_id,{VINDR}"
    table(folder / "annotations/image_labels_train.csv", header, *lines)
    test = VINDR.replace("Other diseases", "Other disease")
    row = f"t,{','.join(['0'] * 26)},1,0"
    table(folder / "annotations/image_labels_test.csv", f"image_id,{test}", row)
    table(
        folder / "annotations/annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
        "a,R0,Aortic enlargement,6.0,4.0,36.0,24.0",
        "c,R0,No finding,,,,",
    )
    header = "image_id,class_name,x_min,y_min,x_max,y_max"
    table(folder / "annotations/annotations_test.csv", header, "t,Other disease,0,0,30,20")
    for k, name in enumerate(marks):
        image(folder / f"train/{name}.dicom", k)
    image(folder / "test/t.dicom")


def tbx11k(folder):
    """Two images with a box, one of them of an unknown kind of tuberculosis, and a healthy one."""
    names = ("tb/tb0005.png", "tb/tb0007.png")
    kinds = ("ActiveTuberculosis", "PulmonaryTuberculosis")
    coco = {
        "categories": [{"id": k, "name": name} for k, name in enumerate(kinds)],
        "images": [
            {"id": k, "file_name": name, "width": 60, "height": 40} for k, name in enumerate(names)
        ],
        "annotations": [
            {"id": k, "image_id": k, "category_id": k, "bbox": [6, 4, 30, 20]} for k in range(2)
        ],
    }
    path = folder / "annotations/json/TBX11K_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(coco))
    (folder / "lists").mkdir()
    (folder / "lists/TBX11K_train.txt").write_text("tb/tb0005.png\nhealth/h0001.png\n")
    for k, name in enumerate((*names, "health/h0001.png")):
        image(folder / "imgs" / name, k)


def openi_csv(folder):
    """Kaggle's re-pack: both views of report 1, 2 without findings, 3 no image, 4 no text."""
    table(
        folder / "indiana_reports.csv",
        "uid,MeSH,Problems,image,indication,comparison,findings,impression",
        '1,normal,normal,Xray Chest PA and Lateral,Cough.,None.,"Clear, XXXX.",Normal.',
        "2,Pleural Effusion/left;Opacity,Pleural Effusion;Opacity,Xray,,,,Effusion.",
        "3,normal,normal,Xray,,,Clear.,Normal.",
        "4,No Indexing,No Indexing,Xray,,,,",
    )
    images = {"1_IM-0001-4001": "Frontal", "1_IM-0001-3001": "Lateral", "2_IM-0652-1001": "Frontal"}
    rows = [f"{name[0]},{name}.dcm.png,{view}" for name, view in images.items()]
    table(folder / "indiana_projections.csv", "uid,filename,projection", *rows)
    for seed, name in enumerate(images):
        image(folder / f"images/images_normalized/{name}.dcm.png", seed)


WRITERS = {
    "mimic_cxr": mimic_cxr,
    "chexpert": chexpert,
    "chexpert_plus": chexpert_plus,
    "padchest": padchest,
    "rocov2": rocov2,
    "rsna_pneumonia": rsna_pneumonia,
    "siim_acr": siim_acr,
    "nih_cxr14": nih_cxr14,
    "covidx": covidx,
    "object_cxr": object_cxr,
    "vindr_cxr": vindr_cxr,
    "tbx11k": tbx11k,
    "openi": openi_csv,
}
