"""The words `rules` knows: findings, places, degrees, changes, and cues of negation and doubt.

Plain tables of lower-case words as the tokeniser leaves them (hyphens and slashes are spaces). The
last word of a finding is also found in its plural, and every word in its British spelling. Cues
follow NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029): a cue opens a scope that runs to the
right until a word that closes it.
"""

# American letters -> British ones, wherever they stand in a word of the tables.
BRITISH = {
    "edema": "oedema",
    "hemo": "haemo",
    "tumor": "tumour",
    "favor": "favour",
    "ized": "ised",
    "ization": "isation",
}

FINDINGS = {
    "consolidation": (
        "consolidation|alveolar consolidation|consolidative change|air space consolidation|"
        "airspace consolidation"
    ),
    "airspace disease": "airspace disease|air space disease|small airways disease",
    "airspace opacity": (
        "airspace opacity|airspace opacities|air space opacity|air space opacities|"
        "airspace opacification|air space opacification|alveolar opacity|alveolar opacities"
    ),
    "interstitial opacity": "interstitial opacities|interstitial opacity|reticular opacities",
    "infiltrate": "infiltrate|infiltration",
    "pneumonia": "pneumonia|bronchopneumonia|pneumonitis",
    "opacity": "opacity|opacities|opacification|density|densities|haze|nodular opacities",
    "effusion": "pleural effusion|effusion|pleural fluid|hydropneumothorax",
    "pneumothorax": (
        "pneumothorax|pneumothoraces|pneumothoraxes|hydropneumothorax|hemopneumothorax|"
        "pleural air collection"
    ),
    "nodule": "nodule|nodular opacity|nodular density|pulmonary nodule|nodularity",
    "mass": "mass|masses|mass lesion",
    "cardiomegaly": "cardiomegaly|cardiac enlargement",
    "atelectasis": (
        "atelectasis|atelectases|atelectatic change|atelectatic|subsegmental collapse|"
        "lobar collapse|volume loss with atelectasis"
    ),
    "edema": "pulmonary edema|interstitial edema|alveolar edema|edema",
    "congestion": (
        "vascular congestion|pulmonary congestion|venous congestion|"
        "pulmonary vascular congestion|pulmonary venous congestion|vascular engorgement|"
        "central vascular congestion"
    ),
    "heart failure": "heart failure|chf|congestive failure",
    "granuloma": (
        "granuloma|granulomata|calcified granuloma|calcified granulomata|calcified nodule|"
        "calcified pulmonary nodule"
    ),
    "granulomatous disease": (
        "granulomatous disease|granulomatous infection|granulomatous process|"
        "granulomatous change|granulomatous changes|granulomatous calcification"
    ),
    "calcification": (
        "calcification|calcified aorta|calcific density|calcified lymph node|"
        "calcified hilar lymph node|calcified mediastinal lymph node|vascular calcification|"
        "calcified plaque"
    ),
    "atherosclerosis": (
        "atherosclerosis|atherosclerotic calcification|atherosclerotic vascular calcification|"
        "atherosclerotic|atherosclerotic change|atherosclerotic disease|"
        "atheromatous calcification"
    ),
    "scar": "scar|scarring",
    "fibrosis": "fibrosis|fibrotic change|fibrotic",
    "emphysema": "emphysema|emphysematous|emphysematous change|bullous disease|bullous emphysema",
    "copd": (
        "copd|chronic obstructive pulmonary disease|obstructive pulmonary disease|"
        "chronic obstructive lung disease|obstructive lung disease|chronic obstructive disease"
    ),
    "interstitial disease": "interstitial lung disease|interstitial disease|chronic lung disease",
    "interstitial markings": (
        "interstitial marking|interstitial change|interstitial prominence|"
        "interstitial thickening|reticular marking|lung markings are prominent"
    ),
    "bronchovascular markings": (
        "bronchovascular crowding|bronchovascular marking|vascular crowding|"
        "crowding of the bronchovascular|crowding of bronchovascular|"
        "crowding of the pulmonary vasculature"
    ),
    "hyperinflation": (
        "hyperinflation|hyperinflated|hyperexpanded|hyperexpansion|overinflated|hyperaerated|"
        "hyperlucent lungs|hyperaeration|overexpanded|overinflation|hyperdistended|"
        "hyperinflated lungs|overaeration"
    ),
    "low lung volumes": (
        "low lung volume|low volume|hypoinflated|hypoinflation|hypoaeration|hypoventilation|"
        "underinflated|poor inspiratory effort|low inspiratory volume|shallow inspiration|"
        "poor inspiration|hypoventilated|hypoaerated|underinflation|hypoventilatory change|"
        "low lung expansion|hypoexpanded"
    ),
    "volume loss": "volume loss",
    "eventration": "eventration",
    "hiatal hernia": "hiatal hernia|hiatus hernia",
    "pleural thickening": (
        "pleural thickening|pleural plaque|pleural scarring|pleural parenchymal scarring|"
        "apical capping|apical cap"
    ),
    "degenerative change": (
        "degenerative change|degenerative disc disease|degenerative disease|"
        "degenerative spondylosis|degenerative joint disease|degenerative endplate change|"
        "degenerative osteophyte|degenerative|multilevel degenerative|disc degeneration|"
        "degenerative spurring|degenerative arthritis"
    ),
    "osteophyte": "osteophyte|spurring|osteophytosis|spurs",
    "spondylosis": "spondylosis|spondylotic change",
    "arthritis": "arthritis|arthritic change|osteoarthritis|arthritic|arthropathy",
    "scoliosis": (
        "scoliosis|scoliotic curvature|dextroscoliosis|levoscoliosis|scoliotic|dextrocurvature|"
        "levocurvature"
    ),
    "kyphosis": "kyphosis|kyphotic",
    "osteopenia": "osteopenia|osteopenic|demineralization|osteoporosis|demineralized",
    "fracture": "fracture|fractured|fx",
    "deformity": (
        "deformity|deformities|wedging|wedge compression|compression deformity|wedge deformity|"
        "wedge xxxx deformity|pectus excavatum|vertebral compression"
    ),
    "lymphadenopathy": "lymphadenopathy|adenopathy",
    "bulla": "bulla|bullae|bleb",
    "cavity": "cavitation|cavitary lesion|cavity|cavitary",
    "bronchiectasis": "bronchiectasis|bronchiectatic change",
    "subcutaneous emphysema": "subcutaneous emphysema|subcutaneous air|subcutaneous gas",
    "pneumoperitoneum": "pneumoperitoneum|free intraperitoneal air|free air",
    "malignancy": (
        "malignancy|lung cancer|metastasis|metastases|metastatic disease|carcinoma|neoplasm|tumor"
    ),
    "lesion": "lesion",
    "hemothorax": "hemothorax|hemothoraces",
    "empyema": "empyema",
    "abscess": "abscess|abscesses|lung abscess|pulmonary abscess",
    "aneurysm": "aneurysm|aortic aneurysm|aneurysmal",
    "dissection": "dissection|aortic dissection",
    "pneumomediastinum": "pneumomediastinum",
    "bronchitis": "bronchitis",
    "tuberculosis": "tuberculosis",
    "peribronchial cuffing": (
        "peribronchial cuffing|bronchial cuffing|peribronchial thickening|bronchial wall thickening"
    ),
}

# Findings said of a part of the body: (subject, state) -> finding.
SUBJECTS = {
    "heart": (
        "heart|heart size|cardiac silhouette|heart silhouette|cardiac size|cardiac contour|"
        "cardiomediastinal silhouette|cardiac shadow|cardiac and mediastinal silhouettes|"
        "cardiac and mediastinal silhouette|cardiac silhouette and mediastinum size|"
        "cardiomediastinal contours|cardiomediastinal contour"
    ),
    "aorta": "aorta|aortic|thoracic aorta|aortic arch|aortic knob|descending aorta",
    "diaphragm": "hemidiaphragm|diaphragm|hemidiaphragms|diaphragms",
    "angle": (
        "costophrenic angle|costophrenic angles|costophrenic sulcus|costophrenic sulci|"
        "costophrenic xxxx|costophrenic recess|costophrenic recesses|costophrenic"
    ),
    "nodes": "lymph node|lymph nodes|lymph xxxx|hilar xxxx",
    "volumes": (
        "lung volumes|lung volume|inspiratory effort|inspiration|inspiratory volumes|volumes"
    ),
    "hilum": "hilum|hila|hilar|hilar contours|hilar contour",
    "mediastinum": (
        "mediastinum|mediastinal|mediastinal contours|mediastinal contour|mediastinal silhouette"
    ),
    "vessels": (
        "pulmonary vasculature|pulmonary vascularity|pulmonary vascular|pulmonary xxxx|"
        "vasculature|vascularity|pulmonary vessels"
    ),
}
STATES = {
    "enlarged": (
        "enlarged|enlargement|large|increased in size|enlarging|mildly enlarged|"
        "prominent in size|big"
    ),
    "prominent": "prominent|prominence|fullness|full",
    "elevated": "elevated|elevation",
    "flattened": "flattened|flattening",
    "tortuous": "tortuous|tortuosity|ectatic|ectasia|unfolded|unfolding|uncoiled|uncoiling",
    "calcified": "calcified|calcific",
    "blunted": "blunted|blunting|obscured|obscuration",
    "low": "low|decreased|diminished|reduced|small|shallow|poor|underexpanded",
    "congested": "engorgement|engorged|congested|cephalized|redistributed",
    "borderline": "borderline",
    "widened": "widened|widening",
    "normal": (
        "normal|within normal limits|unremarkable|upper limits of normal|normal in size|"
        "upper limits normal|within the upper limits of normal|top normal|top normal limits|"
        "normal size|within normal size|not enlarged|upper normal|within limits of normal"
    ),
}
SAID = {
    ("heart", "enlarged"): "cardiomegaly",
    ("heart", "prominent"): "cardiomegaly",
    ("heart", "borderline"): "cardiomegaly",
    ("aorta", "tortuous"): "tortuous aorta",
    ("aorta", "calcified"): "calcification",
    ("nodes", "calcified"): "calcification",
    ("hilum", "calcified"): "calcification",
    ("mediastinum", "calcified"): "calcification",
    ("nodes", "enlarged"): "lymphadenopathy",
    ("diaphragm", "elevated"): "elevated diaphragm",
    ("diaphragm", "flattened"): "flattened diaphragm",
    ("angle", "blunted"): "blunted costophrenic angle",
    ("volumes", "low"): "low lung volumes",
    ("vessels", "congested"): "congestion",
    ("vessels", "prominent"): "congestion",
    ("hilum", "prominent"): "prominent hilum",
    ("hilum", "enlarged"): "prominent hilum",
    ("mediastinum", "enlarged"): "wide mediastinum",
    ("mediastinum", "prominent"): "wide mediastinum",
    ("mediastinum", "widened"): "wide mediastinum",
}
DENIED_BY_NORMAL = {"heart": "cardiomegaly"}  # a normal heart says that this is absent
HEDGED_STATES = ("borderline",)

SIDES = (
    "right|left|bilateral|bilaterally|both|biapical|bibasilar|bibasal|unilateral|right sided|"
    "left sided"
)
ANATOMY = (
    "upper|lower|middle|mid|midlung|lobe|lobes|lobar|lung|lungs|base|bases|basilar|basal|apex|"
    "apices|apical|lingula|lingular|hilum|hila|hilar|perihilar|infrahilar|suprahilar|"
    "retrocardiac|retrosternal|zone|zones|field|costophrenic|angle|angles|hemidiaphragm|"
    "mediastinum|mediastinal|paratracheal|thoracic|lumbar|cervical|spine|spinal|rib|ribs|"
    "vertebral|vertebra|body|bodies|clavicle|shoulder|shoulders|fissure|peripheral|lateral|"
    "lateralis|posterior|anterior|medial|aorta|aortic|arch|pulmonary|hemithorax|chest|thorax|"
    "hemithoraces|side|sides|sternum|humerus|mitral|annular|lingular|acromioclavicular|ac|"
    "parenchymal|pleura|midthoracic|midline|trachea|neck|abdomen|subpleural"
)
SEVERITY = {
    "mild": (
        "mild|mildly|minimal|minimally|small|tiny|trace|slight|slightly|subtle|faint|"
        "borderline|minor|few"
    ),
    "moderate": "moderate|moderately|moderate sized|medium",
    "severe": "severe|severely|marked|markedly|large|extensive|massive|dense|gross|significant",
}
ATTRIBUTES = (
    "patchy|linear|streaky|focal|multifocal|diffuse|interstitial|round|rounded|nodular|"
    "calcified|confluent|hazy|layering|loculated|bandlike|band like|plate like|platelike|"
    "subsegmental|segmental|discoid|solitary|multiple|numerous|innumerable|scattered|lobulated|"
    "irregular|spiculated|well defined|ill defined|chronic|acute|old|remote|healed|healing|"
    "tortuous|multilevel|coarse|coarsened|reticular|reticulonodular|confluent|airspace|"
    "air space|consolidative|compressive|basilar|dextroconvex|levoconvex|wedge|compression|"
    "noncalcified|cavitary|increased|prominent|suspicious|definite|developing|residual|"
    "recurrent"
)
LINKS = (
    "in|the|of|at|within|over|projecting|overlying|a|an|along|on|involving|measuring|area|"
    "areas|both|throughout|cm|mm|adjacent to|to|near|through|projected|sized|sided|type|like|"
    "apparent|approximately|about|diameter|with air bronchograms|with a meniscus|part|aspect|"
    "portion|region"
)

CHANGES = {
    "new": (
        "new|newly|interval development of|new since|developing|interval appearance of|"
        "not present on the prior|not present on prior|not seen on the prior|not seen on prior|"
        "not present previously|not seen previously|not previously seen|not previously present"
    ),
    "stable": (
        "stable|unchanged|persistent|persists|persisting|again noted|again seen|again|"
        "not changed|no change in|no change|no significant change|no interval change|"
        "no significant interval change|not significantly changed|without change|"
        "no increase|no increase in|no interval increase|no interval increase in|"
        "no significant increase in|no significant interval increase in|"
        "not resolved|not yet resolved|not cleared|not yet cleared|unresolved|"
        "without significant change|redemonstrated|re demonstrated|similar|unchanged from|"
        "grossly unchanged"
    ),
    "better": (
        "improved|improving|improvement|resolving|decreased in size|interval decrease|"
        "interval improvement|interval improvement in|smaller|has decreased|have decreased|"
        "interval clearing|clearing of|partially resolved|partial resolution|"
        "partly resolved|incompletely resolved|mostly resolved|largely resolved|"
        "nearly resolved|nearly completely resolved|almost resolved|almost completely resolved|"
        "not completely resolved|not fully resolved|not entirely resolved|"
        "not completely cleared|not fully cleared|not entirely cleared|"
        "incomplete resolution of|partial resolution of|near resolution of|"
        "near complete resolution of|nearly complete resolution of|almost complete resolution of"
    ),
    "worse": (
        "worse|worsened|worsening|progressed|progression|interval increase|increasing|"
        "increased in size|has increased|have increased|interval worsening|larger"
    ),
}

DENIES = (
    "no|not|without|no evidence of|no evidence for|without evidence of|"
    "no convincing evidence of|no radiographic evidence of|no definite|no definite evidence of|"
    "negative for|free of|clear of|absence of|absent|denies|never|nor|neither|no longer|"
    "no findings of|no typical findings of|no signs of|no sign of|rather than|"
    "do not see|resolution of|no evidence to suggest|fails to show|not positive for"
)
DENIES_BEFORE = (  # what they follow is absent
    "not seen|not identified|not visualized|not present|is absent|are absent|has resolved|"
    "have resolved|has cleared|have cleared|not evident|not appreciated|not demonstrated|"
    "is excluded|was excluded|not observed|no longer seen|no longer visualized|resolved|"
    "not visible|no longer identified|no longer evident|no longer present|"
    "completely resolved|is ruled out|are ruled out|was ruled out|were ruled out|"
    "been ruled out|are excluded|were excluded|been excluded"
)
DENIES_LAST = "none|nil|absent|negative"  # what they follow is absent where nothing follows them
DOUBTS = (
    "possible|possibly|probable|probably|questionable|question|may represent|might represent|"
    "could represent|may be|might be|could be|suspicious for|concerning for|suspected|suspect|"
    "suggest|suggests|suggesting|suggestive of|cannot exclude|can not exclude|not exclude|"
    "likely|may reflect|could reflect|presumed|worrisome for|equivocal|perhaps|conceivably|"
    "cannot rule out|may indicate|may relate to|potentially|appears to represent|favor|"
    "favored to represent|difficult to exclude|differential includes|may be related to|"
    "most likely|concern for|versus|vs|xxxx represents|xxxx represent|is not excluded for|"
    "unlikely|is unlikely to represent|are unlikely to represent|is unlikely to be|"
    "are unlikely to be|is unlikely to reflect|are unlikely to reflect"
)
DOUBTS_BEFORE = (
    "cannot be excluded|can not be excluded|not excluded|not entirely excluded|is possible|"
    "is suspected|is questioned|cannot be ruled out|is likely|are possible|"
    "could not be excluded|could not be ruled out|not ruled out|not been excluded|"
    "not been ruled out|not completely excluded|is unlikely|are unlikely|is less likely|"
    "are less likely|seems unlikely|appears unlikely|felt unlikely|thought unlikely|"
    "considered unlikely"
)
DOUBTS_LAST = "unlikely|less likely"  # what they follow is in doubt where nothing follows them
AFFIRMS = "is present|are present|is seen|are seen|is noted|are noted"
ALTERNATIVES = "or|versus|vs|and or"
IGNORES = (  # the finding is asked about, advised on or history, not seen
    "to exclude|to rule out|rule out|evaluate for|evaluation for|assess for|history of|"
    "hx of|clinical concern for|risk of|to suggest|indicated for|if there is|to confirm|"
    "in the setting of|no improvement|to allow|known history of"
)
STOPS = (
    "but|however|although|though|except|except for|aside from|apart from|other than|which|"
    "otherwise|there is|there are|and there|, the|, there|and the|and a|yet|still|while|"
    "whereas|there has been|with|, with|, and there|with otherwise|nevertheless|, a|where|"
    "seen with|and is|and are|superimposed upon|this|these|it|in addition|positive for"
)
# Words that may not be part of a finding although they look like one.
NOT_FINDINGS = (
    "bone density|soft tissue density|mass effect|breast density|bony density|"
    "bone mineral density|nipple density|density of the bones"
)
NOT_DENIALS = "not only"  # nor these a denial
# Abnormalities without a name in FINDINGS: a report that speaks of one is not a normal one.
OTHER_FINDINGS = (
    "collapse|collapsed|contusion|cyst|cysts|cystic|dislocated|dislocation|embolism|embolus|"
    "hemorrhage|infarct|infarction|laceration|lytic|malpositioned|perforation|rupture|ruptured|"
    "sarcoidosis|stenosis|subluxation|thrombosis|thrombus"
)
# Between two names of one thing: "an opacity at the left base compatible with atelectasis".
SAME = (
    "compatible with|consistent with|reflecting|representing|represents|represent|by|"
    "may represent|could represent|may reflect|likely representing|suggesting|suggestive of|"
    "concerning for|suspicious for|from|most compatible with|most consistent with|may be|likely"
)
# Statements that nothing is wrong; a report with one of them and no finding is a normal one.
NORMAL = (
    r"\b(?:normal|unremarkable|clear|negative|"
    r"no (?:\w+ ){0,4}(?:acute|active|abnormal\w*|disease|process|findings?|pathology))\b"
)
NORMAL_PHRASE = "no acute cardiopulmonary abnormality"  # what an extraction without findings says
LANGUAGE = (  # words of English reports that other languages do not have
    "the are of and there with without to for within seen or this has have lungs heart chest size "
    "right left clear limits not evidence bilateral disease changes lung small spine unremarkable "
    "identified acute abnormality abnormalities effusion effusions pulmonary opacity opacities "
    "cardiomediastinal consolidation enlargement enlarged increasing mild findings change"
)
