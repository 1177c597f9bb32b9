"""The words of the reports. Plain tables; `reports` chooses among them.

Fields: {degree} how much, {side} right | left, {place} a lobe or zone with its side, {cm} a size.
A describing entry is (article, noun phrase): "a" for countable nouns, "" for the others, "are" for
plurals. The box of a finding carries the noun phrase.
"""

DEGREES = {  # for severity below 1/3, below 2/3, above
    "consolidation": (
        ("subtle", "faint", "patchy"),
        ("patchy", "moderate"),
        ("dense", "extensive"),
    ),
    "effusion": (("trace", "small", "tiny"), ("moderate", "moderate sized"), ("large",)),
    "pneumothorax": (("small", "tiny", "trace"), ("moderate", "moderate sized"), ("large",)),
    "nodule": (("small", "subtle"), ("rounded", "solitary"), ("well defined", "rounded")),
    "mass": (("rounded", "lobulated"), ("lobulated", "irregular"), ("large", "large lobulated")),
    "cardiomegaly": (("mild", "borderline"), ("moderate",), ("severe", "marked")),
    "atelectasis": (("mild", "minimal"), ("moderate", "linear"), ("marked", "bandlike")),
    "edema": (("mild", "minimal"), ("moderate",), ("severe", "marked")),
}
ADVERBS = {
    "mild": "mildly",
    "borderline": "borderline",
    "moderate": "moderately",
    "severe": "severely",
    "marked": "markedly",
}
PLACES = {
    ("right", "upper"): ("right upper lobe", "right upper lung zone", "right upper lung"),
    ("right", "mid"): ("right middle lobe", "right mid lung", "right mid lung zone"),
    ("right", "lower"): ("right lower lobe", "right lung base", "right lower lung zone"),
    ("left", "upper"): ("left upper lobe", "left upper lung zone", "left upper lung"),
    ("left", "mid"): ("left lingula", "left mid lung", "left mid lung zone"),
    ("left", "lower"): ("left lower lobe", "left lung base", "left lower lung zone"),
}

DESCRIBE = {
    "consolidation": (
        ("a", "{degree} airspace opacity in the {place}"),
        ("", "{degree} consolidation in the {place}"),
        ("", "{degree} consolidation with air bronchograms in the {place}"),
        ("a", "confluent airspace opacity with air bronchograms in the {place}"),
        ("a", "{degree} area of airspace consolidation in the {place}"),
        ("are", "{degree} airspace opacities projecting over the {place}"),
    ),
    "effusion": (
        ("a", "{degree} {side} pleural effusion"),
        ("a", "{degree} pleural effusion on the {side}"),
        ("", "blunting of the {side} costophrenic angle by {degree} pleural effusion"),
        ("a", "{degree} {side} pleural effusion with a meniscus"),
        ("a", "{degree} layering {side} pleural effusion"),
    ),
    "effusion bilateral": (
        ("are", "{degree} bilateral pleural effusions"),
        ("", "blunting of both costophrenic angles by {degree} pleural effusions"),
        ("are", "bilateral {degree} pleural effusions"),
    ),
    "pneumothorax": (
        ("a", "{degree} {side} pneumothorax"),
        ("a", "{degree} {side} apical pneumothorax"),
        ("a", "{degree} {side} pneumothorax measuring {cm} cm at the apex"),
        ("a", "{degree} {side} pneumothorax with a visible pleural line"),
        ("a", "{degree} pneumothorax on the {side}"),
    ),
    "nodule": (
        ("a", "{cm} cm nodule in the {place}"),
        ("a", "{degree} {cm} cm nodule in the {place}"),
        ("a", "{degree} nodular opacity measuring {mm} mm in the {place}"),
        ("a", "{degree} pulmonary nodule in the {place}"),
        ("a", "{mm} mm {place} nodule"),
    ),
    "mass": (
        ("a", "{cm} cm mass in the {place}"),
        ("a", "{degree} {cm} cm mass in the {place}"),
        ("a", "{degree} mass projecting over the {place}"),
        ("a", "{degree} {place} mass measuring {cm} cm"),
    ),
    "cardiomegaly": (
        ("", "{degree} cardiomegaly"),
        ("", "{degree} enlargement of the cardiac silhouette"),
        ("", "{degree} enlargement of the heart"),
    ),
    "atelectasis": (
        ("", "{degree} atelectasis at the {side} lung base"),
        ("", "plate like atelectasis at the {side} base"),
        ("", "{side} basilar linear atelectasis"),
        ("a", "linear opacity at the {side} base compatible with atelectasis"),
        ("", "{side} basilar atelectasis with elevation of the {side} hemidiaphragm"),
        ("", "{degree} {side} basilar subsegmental atelectasis"),
    ),
    "edema": (
        ("", "{degree} pulmonary edema"),
        ("", "{degree} interstitial pulmonary edema"),
        ("", "bilateral perihilar haze consistent with {degree} pulmonary edema"),
        ("", "vascular congestion with {degree} interstitial edema"),
        ("are", "increased interstitial markings with Kerley B lines reflecting {degree} edema"),
    ),
}
PRESENT = (
    "There {verb} {phrase}.",
    "{phrase} {verb} present.",
    "{phrase} {verb} seen.",
    "{phrase} {verb} noted.",
    "{bare}.",
)
ENLARGED = (  # cardiomegaly as a sentence about the heart
    "The cardiac silhouette is {adverb} enlarged.",
    "The heart is {adverb} enlarged.",
    "Heart size is {adverb} enlarged.",
)

CONCLUDE = {
    "consolidation": (
        "{place} consolidation, concerning for pneumonia",
        "{place} pneumonia",
        "{degree} {place} consolidation",
        "findings compatible with pneumonia in the {place}",
        "airspace consolidation in the {place}, likely infectious",
        "{place} airspace disease, consistent with pneumonia",
    ),
    "effusion": (
        "{degree} {side} pleural effusion",
        "{side} pleural effusion, {degree}",
        "{degree} pleural effusion on the {side}",
        "{side} pleural effusion",
    ),
    "effusion bilateral": (
        "{degree} bilateral pleural effusions",
        "bilateral pleural effusions",
        "pleural effusions on both sides, {degree}",
    ),
    "pneumothorax": (
        "{degree} {side} pneumothorax",
        "{side} pneumothorax, {degree}",
        "{side} apical pneumothorax",
        "{degree} pneumothorax on the {side}",
    ),
    "nodule": (
        "{place} nodule, CT recommended for further evaluation",
        "{cm} cm {place} pulmonary nodule",
        "solitary pulmonary nodule in the {place}",
        "pulmonary nodule in the {place}, follow up CT is advised",
        "{place} lung nodule",
    ),
    "mass": (
        "{place} mass, suspicious for malignancy",
        "{cm} cm {place} lung mass, CT is recommended",
        "mass in the {place}, concerning for primary lung cancer",
        "{place} lung mass",
    ),
    "cardiomegaly": (
        "{degree} cardiomegaly",
        "cardiomegaly",
        "{degree} enlargement of the cardiac silhouette",
        "enlarged heart, {degree}",
    ),
    "atelectasis": (
        "{side} basilar atelectasis",
        "{degree} {side} lower lobe atelectasis",
        "atelectasis at the {side} base",
        "{side} basilar volume loss with atelectasis",
        "{side} basilar subsegmental atelectasis",
    ),
    "edema": (
        "{degree} pulmonary edema",
        "findings of {degree} interstitial edema",
        "pulmonary vascular congestion with {degree} edema",
        "{degree} interstitial pulmonary edema",
        "pulmonary edema",
    ),
}
# Around a conclusion that the reader is unsure of.
HEDGES = ("Possible {0}.", "Probable {0}.", "Questionable {0}.", "Findings may represent {0}.")

NEGATED = {  # as an item of "No a, b or c."
    "consolidation": ("focal consolidation", "consolidation", "focal airspace opacity"),
    "effusion": ("pleural effusion", "effusion"),
    "pneumothorax": ("pneumothorax",),
    "nodule": ("pulmonary nodule", "suspicious nodule"),
    "mass": ("mass", "pulmonary mass"),
    "cardiomegaly": ("cardiomegaly",),
    "atelectasis": ("atelectasis",),
    "edema": ("pulmonary edema", "edema", "vascular congestion"),
}
MENTIONED = {  # how often an absent finding is denied in the Findings section
    "consolidation": 0.75,
    "effusion": 0.85,
    "pneumothorax": 0.85,
    "nodule": 0.2,
    "mass": 0.2,
    "cardiomegaly": 0.05,
    "atelectasis": 0.1,
    "edema": 0.45,
}
DENIALS = (
    "No {0}.",
    "There is no {0}.",
    "There is no evidence of {0}.",
    "No {0} is seen.",
    "No {0} is identified.",
    "Negative for {0}.",
)
NORMAL_HEART = (
    "The heart size is normal.",
    "Heart size is within normal limits.",
    "The cardiac silhouette is normal in size.",
    "Cardiomediastinal silhouette is within normal limits.",
    "The heart is not enlarged.",
)
CLEAR = ("The lungs are clear.", "Lungs are clear bilaterally.", "Both lungs are clear.")
OTHERWISE = (
    "The lungs are otherwise clear.",
    "The remaining lungs are clear.",
    "The other lung is clear.",
)
BACKGROUND = (
    "The mediastinal contours are unremarkable.",
    "The hilar contours are normal.",
    "The trachea is midline.",
    "The osseous structures are intact.",
    "No acute bony abnormality.",
    "The visualized upper abdomen is unremarkable.",
    "The mediastinum is normal in width.",
)
TORTUOUS = ("The aorta is tortuous.", "The thoracic aorta is tortuous and prominent.")
DEGENERATIVE = (
    "Degenerative changes of the thoracic spine.",
    "Mild degenerative changes are seen in the spine.",
)
OPENINGS = (
    "Frontal view of the chest.",
    "Single frontal view of the chest was obtained.",
    "PA view of the chest was reviewed.",
)
NORMAL_IMPRESSIONS = (  # from the most to the least common
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute cardiopulmonary disease.",
    "No radiographic evidence of acute cardiopulmonary disease.",
    "No acute intrathoracic process.",
    "Normal chest.",
    "No evidence of pneumonia.",
    "Clear lungs. No acute process.",
    "Unremarkable frontal chest radiograph.",
)
NORMAL_FINDINGS = (  # used word by word by many normal reports, from the most to the least common
    "The lungs are clear. There is no pleural effusion or pneumothorax. The cardiomediastinal "
    "silhouette is normal.",
    "Heart size is normal. Mediastinal and hilar contours are unremarkable. The lungs are clear. "
    "No pleural effusion or pneumothorax is seen. There are no acute osseous abnormalities.",
    "The lungs are clear without focal consolidation. No pleural effusion or pneumothorax is seen. "
    "The cardiac and mediastinal silhouettes are unremarkable.",
    "The cardiac silhouette and mediastinum size are within normal limits. There is no pulmonary "
    "edema. There is no focal consolidation. There is no pneumothorax.",
    "Lungs are clear bilaterally. No focal consolidation, pleural effusion or pneumothorax. "
    "Heart and mediastinum are normal.",
    "The heart is normal in size. The lungs are clear of focal airspace disease. No effusion. "
    "No pneumothorax.",
    "Frontal view of the chest. The lungs are well expanded and clear. There is no consolidation, "
    "effusion or pulmonary edema. The heart is not enlarged.",
    "No focal airspace opacity, pleural effusion, nodule or mass. Heart size within normal limits. "
    "The osseous structures are intact.",
)
