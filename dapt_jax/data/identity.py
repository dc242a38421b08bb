"""Equality and absence of the names of columns, splits, labels and patients."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Byte-order marks, zero-width characters and directional marks: invisible, left by spreadsheets and web
# pages.
_INVISIBLE = dict.fromkeys(
    map(ord, "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u202a\u202b\u202c\u202d\u202e\x00")
)

MISSING = frozenset(("", "nan", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "nat", "null"))
"""Cells that represent missing values, in lower case."""
_NOBODY = MISSING | {
    "none", "unknown", "unk", "-", "--", "?", ".", "missing", "nil", "not available", "anonymous",
    "anonymized",
    "anonymised", "anonym", "anon", "deidentified", "de-identified", "removed", "redacted", "no patient",
}  # fmt: skip

_WHOSE = r"(?:id|ids|no|nr|num|number|code|key|uid|uuid|guid|index|name|hash|ref|identifier|pseudonym)"
_PATIENT_KEYS = tuple(
    re.compile(rf"(?:anon|anonymi[sz]ed|pseudo|dicom|deid|hospital)?{kind}{_WHOSE}?|{more}")
    for kind, more in (
        (
            r"(?:patients?|pat|pts?|pacientes?|pazient[ei]|patienten)",
            r"id(?:patient|paciente)|pid|mrn|pseudonym",
        ),
        (
            r"(?:subjects?|subj|participants?|probands?|volunteers?|donors?|persons?|people|individuals?)",
            "idsubject",
        ),
        (r"cases?", "idcase"),
    )
)
"""Keys (see `column_key`) of columns that identify patients, the most reliable kind first."""
IMAGE_NAMES = _words(
    "image images img imgs imagepath imagepaths imgpath imagefile imagefiles imgfile imagefilename "
    "imgfilename imagename imgname imageid imgid imageindex file files filename filenames filepath "
    "filepaths path paths dicom dicompath dicomfile dicomfilename dcm dcmpath scan scanpath slice "
    "slicepath sliceid picture photo png jpg jpeg relpath relativepath fullpath imagefilepath "
    "imagefullpath fname imageuid sopinstanceuid idcode isicid id"
)
LABEL_NAMES = _words(
    "label labels class classes classname classlabel target targets diagnosis diagnoses dx category "
    "categories grade grades level disease pathology finding findings findinglabel findinglabels "
    "condition groundtruth gt tumortype tumourtype lesiontype celltype labelname labelid labeltext "
    "imagelabel truelabel classid classindex classification categoryid diag diseasetype ytrue truth "
    "outcome severity stage klgrade birads y"
)
MASK_NAMES = _words(
    "mask masks maskpath maskfile maskfilename maskname segmentation segmentations segmentationpath "
    "segmentationfile segmentationmask seg segpath segfile segmask annotationpath labelmap labelmappath "
    "gtmask groundtruthmask roimask"
)
_IDENTITY_WORDS = frozenset(
    _words(
        "id ids uid uuid pid nr no num number code key mrn lesion exam examination study series visit "
        "accession specimen slide animal mouse rat dog eye family scanid smear biopsy tissue block well "
        "plate video sequence session name"
    )
)
_TWO_STATES = frozenset(
    _words("0 1 yes no y n true false t f case control cases controls patient healthy positive negative m")
)

_SPLIT_WORDS = {
    **dict.fromkeys(_words("train training trn tr trainset"), "train"),
    **dict.fromkeys(_words("val valid validation validating valset validationset"), "val"),
    **dict.fromkeys(_words("dev development devset"), "dev"),
    **dict.fromkeys(_words("test testing tst te testset holdout heldout"), "test"),
    **dict.fromkeys(_words("external ext externalset"), "external"),
}
_FILLERS = frozenset(
    _words(
        "set sets data dataset datasets image images img imgs split splits folder folders file files "
        "subset seg cls raw part cropped resized png jpg jpeg a b c final new stage"
    )
)


def clean(text: str) -> str:
    """Return a cell or name in composed Unicode form, without invisible characters and outer blanks.

    Two names that look the same are then equal, whether macOS or Windows wrote them.
    """
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()


def spelling(text: str) -> str:
    """Return a key shared by names that differ only in case, separators, leading zeros or a trailing ".0".

    The sign of a number is no separator: -1 is not 1.

    >>> spelling("P_009") == spelling("p-9"), spelling("007") == spelling("7.0"), spelling("12") == spelling("1-2")
    (True, True, False)
    >>> spelling("-1") == spelling("-01.0"), spelling("-1") == spelling("1")
    (True, False)
    """
    folded = unicodedata.normalize("NFKC", clean(text)).casefold()
    if number := re.fullmatch(r"([+-]?)(\d+)(\.0*)?", folded):
        sign, whole, _ = number.groups()
        return sign.replace("+", "") + (whole.lstrip("0") or "0")
    folded = re.sub(r"[\s_\-]+", "-", folded).strip("-") or folded
    return re.sub(r"(?<![\d.])0+(?=\d)", "", folded)


def column_key(name: str) -> str:
    """Return a column's name without case, blanks and separators: "Patient ID" is "patientid"."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", clean(name)).casefold())


def is_missing(cell: str) -> bool:
    """Return whether a cell represents a missing value, such as "NaN" or "N/A"."""
    return clean(cell).casefold() in MISSING


def patient(cell: str) -> str:
    """Return the normalised name of a patient; "" if the cell names none ("NaN", "unknown", "anonymous")."""
    name = clean(cell)
    return "" if name.casefold() in _NOBODY else name


def split_name(name: str) -> str:
    """Return the split that a folder or cell names in any spelling; "" if it names none.

    Returns:
        "train", "val", "dev", "test", "external", or "fold_K".

    >>> [split_name(name) for name in ("Training", "TEST_images", "2. Validation Set", "Fold 03", "tests of liver")]
    ['train', 'test', 'val', 'fold_3', '']
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", clean(name))
    tokens = [token for token in re.split(r"[\W_]+|(?<=[a-zA-Z])(?=\d)", words.casefold()) if token]
    if len(tokens) == 2 and tokens[0] in ("fold", "cv", "split") and tokens[1].isdecimal():
        return f"fold_{int(tokens[1])}"
    if re.fullmatch(r"(held|hold)\W*out", words.casefold()):
        return "test"
    numbered = [token for token in tokens if token not in _FILLERS and not token.isdecimal()]
    return _SPLIT_WORDS.get(numbered[0], "") if len(numbered) == 1 else ""


def is_split(name: str) -> bool:
    """Return whether a name says a split and nothing beside it that could tell two of its parts apart.

    >>> [is_split(name) for name in ("TRAIN", "test set", "Fold 03", "test_2", "train_a", "mild")]
    [True, True, True, False, False, False]
    """
    return column_key(name) in _SPLIT_WORDS or split_name(name).startswith("fold_")


def column(name: str, columns: Iterable[str], names: Sequence[str] = ()) -> list[str]:
    """Return the columns that a name may refer to, only those of the most reliable kind.

    Args:
        name: Name to look for, such as "patient".
        columns: The existing columns.
        names: Keys of other usual names.

    Returns:
        The column itself if it exists; else the columns that differ in case or separators; else those with a
        usual name.
    """
    present = list(columns)
    if clean(name) in present:
        return [clean(name)]
    same = [each for each in present if column_key(each) == column_key(name)]
    return same or [each for usual in names for each in present if column_key(each) == usual]


def patient_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that may identify patients according to their names, the most reliable first.

    >>> patient_columns(["image", "Case_No", "Patient Age", "PATIENT-ID"])
    ['PATIENT-ID', 'Case_No']
    """
    present = list(columns)
    if exact := column("patient", present):
        present = exact + [each for each in present if each not in exact]
    found = [each for kind in _PATIENT_KEYS for each in present if kind.fullmatch(column_key(each))]
    return list(dict.fromkeys(found))


def names_two_states(cells: Sequence[str]) -> bool:
    """Return whether a column holds two states, such as "case" and "control", rather than names."""
    found = {cell.casefold() for cell in cells if not is_missing(cell)}
    return not found or (found <= _TWO_STATES and len(cells) > 2)


def looks_like_identities(name: str, cells: Sequence[str]) -> bool:
    """Return whether a column seems to identify patients, lesions or the like, in several rows each."""
    named = [cell for cell in map(patient, cells) if cell]
    distinct = len(set(named))
    if not 3 <= distinct < len(named) or len(named) > 200 * distinct:
        return False
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", clean(name)).casefold()
    tokens = set(re.split(r"[\W_]+", words)) - {""}
    if tokens & {"class", "label", "category", "target", "split", "dataset"}:
        return False
    if tokens & _IDENTITY_WORDS or words.endswith("id") or patient_columns([name]):
        return all(len(cell) <= 80 for cell in named)
    # Codes such as P001, sub-12 or 0007, but neither measurements nor ages.
    code = re.compile(r"[A-Za-z]{1,12}[\W_]?\d+\w{0,3}|0\d{2,}|\d{5,}")
    return all(code.fullmatch(cell) for cell in named)


def joins(cells: Sequence[str], groups: Sequence[str]) -> bool:
    """Return whether two groups share a name in a column, so that splits by group would divide it."""
    first: dict[str, str] = {}
    return any(
        cell and first.setdefault(cell, group) != group for cell, group in zip(cells, groups, strict=True)
    )


def near_spellings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return names that differ only in case, separators or zeros, grouped by key, in order."""
    by_key: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        by_key.setdefault(spelling(name), []).append(name)
    return [tuple(group) for group in by_key.values() if len(group) > 1]


def in_order(labels: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """Return labels in numerical order if they are numbers or one name with numbers, else by name.

    Returns:
        The labels, and whether their order is numerical.

    >>> in_order(["10", "9", "0"]), in_order(["grade 2", "grade 10"]), in_order(["mild", "none"])
    ((('0', '9', '10'), True), (('grade 2', 'grade 10'), True), (('mild', 'none'), False))
    """
    names = sorted(set(labels))
    found = [re.fullmatch(r"(.*?)([+-]?\d+(?:\.\d+)?)(\D*)", name) for name in names]
    affixes = {(each[1].casefold(), each[3].casefold()) for each in found if each}
    if names and all(found) and len(affixes) == 1:
        prefix = next(iter(affixes))[0]
        # The dash of "T-1" is a separator, the dash of "-1" is a sign.
        values = [abs(float(each[2])) if prefix else float(each[2]) for each in found if each]
        if len(set(values)) == len(values):
            ordered = tuple(name for _, name in sorted(zip(values, names, strict=True)))
            return ordered, True
    return tuple(names), False


def same_partition(columns: Mapping[str, Sequence[str]], names: Sequence[str]) -> bool:
    """Return whether several columns partition the rows alike, as the number and the name of a class do."""
    return all(
        not joins(columns[a], columns[b]) and not joins(columns[b], columns[a]) for a, b in pairwise(names)
    )
