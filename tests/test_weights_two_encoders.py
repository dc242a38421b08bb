"""Several encoders in one file: which is loaded follows from names, shapes and numbers, and is said, or is refused."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import encoders, identity, locate, readers, tables
from dapt_jax.weights.merge import MergeReport, merge
from dapt_jax.weights.paths import flatten
from dapt_jax.weights.source import Weights
from dapt_jax.weights.tables import prefixes
from tests.command import ROOT
from tests.torch_files import Call, Named, New, pickled, tensor, write_zip

MODEL = Classifier(registry.build("resnet18").truncate("stage1/block1"), 2)
SCHEME = tables.schemes("resnet18")[1]
SHAPES = {path: leaf.shape for tree in MODEL.abstract() for path, leaf in flatten(tree).items()}
BODY = {path: entry for path, entry in tables.table(SCHEME, MODEL).items() if not path.startswith("head/")}


def encoder(prefix: str = "", value: float = 1.0) -> dict[str, np.ndarray]:
    """A file's part that holds one encoder, full of one number, so that what was loaded shows whose it is."""
    return {
        prefix + entry.key: entry.restore(np.full(SHAPES[path], value, np.float32))
        for path, entry in BODY.items()
    }


def checkpoint(path: Path, content: dict) -> Path:
    """A file of torch.save; arrays anywhere in nested dicts become tensors."""
    runs: dict[str, bytes] = {}

    def pack(node):
        if isinstance(node, dict):
            return {key: pack(value) for key, value in node.items()}
        if isinstance(node, np.ndarray):
            runs[str(len(runs))] = node.tobytes()
            return tensor(np.ascontiguousarray(node), str(len(runs) - 1))
        return node

    packed = pack(content)
    return write_zip(path, packed, runs)


def loaded(source: dict | Path, prefix: str | None = None) -> tuple[float, MergeReport]:
    """The number that the encoder is full of after merging, and the report."""
    weights = readers.read(source) if isinstance(source, Path) else Weights(source, "file.pth")
    params, batch_stats, report = merge(MODEL, weights, seed=0, head="new", prefix=prefix)
    found = {
        float(value)
        for path, a in (flatten(params) | flatten(batch_stats)).items()
        if path in BODY
        for value in a.flat[:2]
    }
    assert len(found) == 1, "an encoder made of two"
    return found.pop(), report


PAIRS = [
    # (the averaged copy, the other)
    ("teacher.backbone.", "student.backbone."),
    ("teacher.", "student."),
    ("target_network.", "online_network."),
    ("target_net.module.0.", "online_net.0."),
    ("target_encoder.net.", "online_encoder.net."),
    ("momentum_encoder.", "base_encoder."),
    ("module.momentum_encoder.", "module.base_encoder."),
    ("momentum_backbone.", "backbone."),
    ("ema_model.module.", "model."),
    ("ema.", ""),
    ("model_ema.", "model."),
    ("backboneEMA.", "backbone."),
    ("swa_model.module.", "model."),
    ("state_dict_ema.", "state_dict."),
]


@pytest.mark.parametrize(("averaged", "other"), PAIRS)
@pytest.mark.parametrize("is_first", [True, False])
def test_the_averaged_copy_is_taken_and_the_report_says_so(averaged: str, other: str, is_first: bool) -> None:
    parts = [encoder(averaged, 2.0), encoder(other, 1.0)]
    source = parts[0] | parts[1] if is_first else parts[1] | parts[0]
    value, report = loaded(source)
    assert value == 2.0
    assert report.prefix == averaged
    assert "the averaged copy" in str(report)
    if other:
        assert f"#prefix={other.rstrip('.')}" in str(report)
        assert loaded(source, other.rstrip("."))[0] == 1.0
    assert loaded(source, averaged)[0] == 2.0


def test_of_mocos_two_encoders_the_query_encoder_is_taken() -> None:
    source = encoder("module.encoder_k.", 2.0) | encoder("module.encoder_q.", 1.0)
    value, report = loaded(source)
    assert value == 1.0
    assert "the query encoder" in report.choice
    assert loaded(source, "encoder_k")[0] == 2.0


@pytest.mark.parametrize(
    "names",
    [
        ("branch1.", "branch2."),
        ("net_a.", "net_b."),
        ("encoder.", "backbone."),
        ("left.", "right."),
        ("teacher.", "ema.", "student."),
    ],
)
def test_where_nothing_decides_one_line_names_them_all(names: tuple[str, ...]) -> None:
    source = {key: array for n, name in enumerate(names) for key, array in encoder(name, n + 1).items()}
    with pytest.raises(
        UserError, match=f"{len(names)} encoders that fit, behind .* expected one of them, such as #prefix="
    ) as caught:
        loaded(source)
    for name in names:
        assert repr(name.rstrip(".")) in str(caught.value)
    for n, name in enumerate(names):
        value, report = loaded(source, name.rstrip("."))
        assert value == n + 1
        assert f"as #prefix={name.rstrip('.')} says" in str(report)


def test_two_copies_of_the_same_numbers_need_no_choice() -> None:
    value, report = loaded(encoder("net.backbone.", 3.0) | encoder("net.", 3.0))
    assert (value, report.prefix) == (3.0, "net.")
    assert "hold the same numbers" in report.choice


def test_an_encoder_of_another_size_is_no_candidate() -> None:
    large = {key: np.concatenate([a, a]) for key, a in encoder("teacher.", 2.0).items()}
    assert loaded(large | encoder("student.", 1.0))[0] == 1.0


def test_a_more_complete_encoder_comes_first() -> None:
    teacher = encoder("teacher.", 2.0)
    del teacher["teacher.bn1.running_mean"]
    assert loaded(teacher | encoder("student.", 1.0))[0] == 1.0


def test_a_prefix_that_is_not_there_names_those_that_are() -> None:
    source = encoder("teacher.backbone.") | encoder("student.backbone.")
    with pytest.raises(
        UserError, match=r"no encoder behind #prefix=studnet\.backbone; did you mean 'student\.backbone'"
    ):
        loaded(source, "studnet.backbone")


# ---- neither the order of a set nor of a file
# -------------------------------------------------------------------------

WORDS = [
    "teacher",
    "student",
    "online",
    "target",
    "ema",
    "module",
    "backbone",
    "net0",
    "net1",
    "encoder_q",
    "encoder_k",
]
NAME = st.lists(st.sampled_from(WORDS), max_size=3).map(lambda parts: "".join(f"{part}." for part in parts))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(NAME, min_size=1, max_size=4, unique=True), seed=st.integers(0, 99))
def test_the_choice_does_not_depend_on_the_order_of_the_file(names: list[str], seed: int) -> None:
    source = {key: array for n, name in enumerate(names) for key, array in encoder(name, n + 1).items()}
    shuffled = list(source)
    random.Random(seed).shuffle(shuffled)
    outcomes = []
    for keys in (source, shuffled, reversed(list(source))):
        weights = Weights({key: source[key] for key in keys}, "file.pth")
        found = encoders.find(weights, None, SCHEME, BODY)
        try:
            outcomes.append(encoders.decide(found, SHAPES)[1])
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    if isinstance(outcomes[0], prefixes.Choice):
        assert outcomes[0].prefix in names
        averaged = [name for name in names if prefixes.role(name) == "averaged"]
        assert len(averaged) != 1 or outcomes[0].prefix == averaged[0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    keys=st.lists(st.text("abc.", max_size=12), max_size=20),
    entries=st.lists(st.text("abc.", min_size=1, max_size=5), max_size=6, unique=True),
)
def test_hits_are_counted_as_the_definition_says(keys: list[str], entries: list[str]) -> None:
    table = {f"path{n}": tables.Entry(key, "torch") for n, key in enumerate(entries)}
    found = prefixes.hits(table, ".", dict.fromkeys(keys))
    starts = {
        key.removesuffix(entry)
        for key in keys
        for entry in entries
        if key == entry or key.endswith(f".{entry}")
    }
    assert found == {start: sum(start + entry in keys for entry in entries) for start in starts}


SCRIPT = """
from tests import test_weights_two_encoders as here

PAIRS = (["student.backbone.", "teacher.backbone."], ["online.net.", "target.net."], ["a.", "b."], ["teacher.", "student.", ""])
for names in PAIRS:
    source = {k: a for n, name in enumerate(names) for k, a in here.encoder(name, n + 1).items()}
    found = here.encoders.find(here.Weights(source, "f"), None, here.SCHEME, here.BODY)
    try:
        print(here.encoders.decide(found, here.SHAPES)[1])
    except here.UserError as error:
        print(error)
"""


def test_the_choice_does_not_depend_on_pythons_hash_seed() -> None:
    said = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        said.add(run.stdout)
    assert len(said) == 1
    assert said.pop().count("\n") == 4


# ---- checkpoints as training scripts write them
# -----------------------------------------------------------------------


def test_dinos_checkpoint_has_its_encoders_in_containers(tmp_path: Path) -> None:
    content = {
        "student": encoder("module.backbone.", 1.0),
        "teacher": encoder("backbone.", 2.0),
        "optimizer": {"state": {0: {"exp_avg": np.ones(2, np.float32)}}, "param_groups": []},
        "epoch": 100,
        "args": New(Named("argparse", "Namespace"), {"arch": "resnet18"}),
        "dino_loss": {"center": np.ones((1, 4), np.float32)},
    }
    path = checkpoint(tmp_path / "checkpoint.pth", content)
    value, report = loaded(path)
    assert value == 2.0
    assert (report.source, report.prefix) == (f"{path} ['teacher'], torchvision names", "backbone.")
    assert report.left_over == ()
    assert "#prefix=student.module.backbone for another" in report.choice
    for way in ("student", "student.backbone", "student.module.backbone"):
        assert loaded(path, way)[0] == 1.0


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (
            {"state_dict": encoder(), "state_dict_ema": encoder("", 2.0), "arch": "resnet18", "metric": 80.1},
            2.0,
        ),
        ({"model": encoder(), "model_ema": encoder("module.", 2.0), "n_averaged": np.array(3)}, 2.0),
        ({"model": encoder("student.backbone.") | encoder("teacher.backbone.", 2.0), "iteration": 3}, 2.0),
        (
            {
                "online_network_state_dict": encoder("encoder."),
                "target_network_state_dict": encoder("encoder.", 2.0),
            },
            2.0,
        ),
        (
            {
                "encoder": encoder(),
                "target_encoder": encoder("", 2.0),
                "opt_state": {"m": np.ones(3)},
                "predictor": {"w": np.ones(2)},
            },
            2.0,
        ),
        (
            {"state_dict": encoder("module.encoder."), "best_acc1": np.array(71.5), "optimizer": encoder()},
            1.0,
        ),
        (
            {
                "classy_state_dict": {
                    "base_model": {
                        "model": {"trunk": encoder("_feature_blocks."), "heads": {"w": np.ones(2)}}
                    }
                }
            },
            1.0,
        ),
        (
            {
                "model": {"state_dict": encoder("backbone.")},
                "hyper_parameters": {"backbone": encoder("", 5.0)},
            },
            1.0,
        ),
        ({"state_dict": encoder(), "ema_state_dict": encoder("module.", 2.0)}, 2.0),
        (
            {
                "state_dict": encoder("", 2.0),
                "ema_state_dict": encoder("module.", 1.0),
                "message_hub": {},
                "meta": {},
            },
            2.0,
        ),
        (
            {
                "state_dict": encoder("", 2.0),
                "ema_state_dict": encoder("module."),
                "meta": {"mmengine_version": "1"},
            },
            2.0,
        ),
        ({"generator": {"w": np.ones(2)}, "feature_extractor": encoder("", 4.0)}, 4.0),
    ],
    ids=[
        "timm",
        "torchvision",
        "dinov2",
        "byol",
        "ijepa",
        "simsiam",
        "vissl",
        "lightning",
        "mean_teacher",
        "mmengine",
        "mmengine_published",
        "any",
    ],
)
def test_checkpoints_of_the_usual_scripts(tmp_path: Path, content: dict, value: float) -> None:
    assert loaded(checkpoint(tmp_path / "w.pth", content))[0] == value


def test_names_in_a_file_do_not_reach_a_terminal_as_they_are() -> None:
    report = loaded(encoder("\x1b[31m.") | {"left\nover\x07": np.ones(1, np.float32)})[1]
    assert str(report).isprintable()
    assert "\\x1b[31m" in str(report)


def test_mmengines_other_weights_can_be_had(tmp_path: Path) -> None:
    content = {"state_dict": encoder("", 2.0), "ema_state_dict": encoder("module.", 1.0), "message_hub": {}}
    path = checkpoint(tmp_path / "w.pth", content)
    assert "the averaged copy, which mmengine saves there; #prefix=ema_state_dict" in loaded(path)[1].choice
    assert loaded(path, "ema_state_dict")[0] == 1.0
    assert loaded(path, "state_dict")[0] == 2.0


def test_byols_target_can_be_had(tmp_path: Path) -> None:
    model = Classifier(registry.build("resnet50").truncate("stage1/block1"), 2)
    scheme = next(each for each in tables.schemes("resnet50") if each.name == "haiku")
    shapes = {path: leaf.shape for tree in model.abstract() for path, leaf in flatten(tree).items()}

    def side(value: float) -> tuple[dict, dict]:
        params: dict = {}
        for path, entry in tables.table(scheme, model).items():
            if not path.startswith("head/"):
                module, _, leaf = f"res_net50/~/{entry.key}".rpartition("/")
                params.setdefault(module, {})[leaf] = entry.restore(np.full(shapes[path], value, np.float32))
        return params, {}

    fields = [each for pair in zip(side(1.0), side(2.0), strict=True) for each in pair]
    experiment = New(Named("byol.byol_experiment", "_ByolExperimentState"), args=(*fields, []))
    path = tmp_path / "byol.pkl"
    path.write_bytes(pickled({"experiment_state": experiment}))
    weights = readers.read(path)
    params, _, report = merge(model, weights, seed=0, head="new")
    assert params["stem"]["conv"]["kernel"].flat[0] == 1.0
    assert "the online encoder, which BYOL's authors evaluate; #prefix=target for another" in report.choice
    assert (
        merge(model, weights, seed=0, head="new", prefix="target")[0]["stem"]["conv"]["kernel"].flat[0] == 2.0
    )


# ---- hyper-parameters of any class
# ------------------------------------------------------------------------------------

FOREIGN = {
    "a path": Call(Named("pathlib", "PosixPath"), "data", "x"),
    "an enum": Call(Named("my.settings", "Split"), "train"),
    "a config": New(Named("omegaconf.dictconfig", "DictConfig"), {"_content": {"lr": 0.1}, "_metadata": None}),
    "a partial": Call(Named("functools", "partial"), Named("torch.nn.modules.loss", "mse"), state=(None, (), {}, None)),
    "a method": Call(Named("builtins", "getattr"), Named("my.module", "Net"), "forward"),
    "a made function": Call(Call(Named("builtins", "getattr"), Named("my.module", "Net"), "make"), 1),
    "a function": Named("my.module", "collate"),
    "a counter": Call(Named("collections", "Counter"), {"a": 1}),
    "a generator": Call(Named("numpy.random._pickle", "__generator_ctor"), "PCG64", state={"state": 3}),
    "words": Call(Named("numpy.core.multiarray", "_reconstruct"), Named("numpy", "ndarray"), (0,), b"b",
                  state=(1, (2,), Call(Named("numpy", "dtype"), "U3", False, True), False, b"abcdef" * 4)),
    "objects": Call(Named("numpy.core.multiarray", "_reconstruct"), Named("numpy", "ndarray"), (0,), b"b",
                    state=(1, (1,), Call(Named("numpy", "dtype"), "O8", False, True), False, [None])),
    "a key": {("a", "tuple"): 1, Call(Named("my.settings", "Split"), "x"): 2},
    "a set": Call(Named("__builtin__", "set"), [1, 2]),
    "a quantised tensor": Call(Named("torch._utils", "_rebuild_qtensor"), 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_stands_beside_the_tensors_is_never_built_and_never_in_the_way(
    tmp_path: Path, what: str
) -> None:
    content = {
        "state_dict": encoder("model.", 7.0),
        "hyper_parameters": {"it": FOREIGN[what], "lr": 0.1},
        "it": FOREIGN[what],
    }
    modules = set(sys.modules)
    assert loaded(checkpoint(tmp_path / "last.ckpt", content))[0] == 7.0
    assert not {"my", "omegaconf", "my.settings"} & (set(sys.modules) - modules)


@pytest.mark.parametrize(
    "kind", [("os", "system"), ("builtins", "exec"), ("subprocess", "Popen"), ("posix", "system")]
)
def test_a_file_that_asks_for_programs_is_told_of_even_beside_tensors(
    tmp_path: Path, kind: tuple[str, str]
) -> None:
    content = {"state_dict": encoder(), "hyper_parameters": {"it": Call(Named(*kind), "true")}}
    with pytest.raises(UserError, match=rf"asks for {kind[0]}\.{kind[1]}"):
        loaded(checkpoint(tmp_path / "a.ckpt", content))


def test_a_state_dict_in_a_dict_of_another_class_is_found(tmp_path: Path) -> None:
    class Items(dict):
        """Pickled as lightning's own kind of dict."""

    runs = {str(n): a.tobytes() for n, a in enumerate(encoder("", 3.0).values())}
    state = {key: tensor(a, str(n)) for n, (key, a) in enumerate(encoder("", 3.0).items())}
    made = Call(Named("flax.core.frozen_dict", "FrozenDict"), state)
    assert loaded(write_zip(tmp_path / "a.ckpt", {"state_dict": made}, runs))[0] == 3.0


def test_a_network_of_an_unknown_class_is_named_where_nothing_else_fits(tmp_path: Path) -> None:
    content = {
        "model": New(Named("my.models", "Net"), {"_parameters": {}}),
        "class_weights": np.ones(3, np.float32),
    }
    with pytest.raises(
        UserError, match=r"not weights of 'resnet18'.*objects of my\.models\.Net in it are not read"
    ):
        loaded(checkpoint(tmp_path / "a.pt", content))


# ---- what a config says
# -----------------------------------------------------------------------------------------------


def test_a_config_selects_behind_the_files_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "w.pth", {"student": encoder("", 1.0), "teacher": encoder("", 2.0)})
    for spec, value in (
        (f"{path}", 2.0),
        (f"{path}#prefix=student", 1.0),
        (f"{path}#prefix=student&sha256={identity.digest(path)}", 1.0),
    ):
        params, _, report = locate.load(spec, MODEL, seed=0)
        assert params["stem"]["conv"]["kernel"].flat[0] == value
        assert report.source_sha256 == identity.digest(path)
    with pytest.raises(UserError, match=r"its sha256 is .*, expected 00000000"):
        locate.load(f"{path}#sha256=00000000", MODEL, seed=0)
    with pytest.raises(UserError, match="behind the # expected sha256=DIGITS, prefix=NAME"):
        locate.load(f"{path}#prefix=student&layer=2", MODEL, seed=0)


def test_a_file_whose_name_has_a_sharp_in_it_is_meant_as_it_is(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run#prefix=3.pth", encoder("", 5.0))
    assert locate.load(str(path), MODEL, seed=0)[0]["stem"]["conv"]["kernel"].flat[0] == 5.0


# ---- fingerprints
# -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_numbers_and_not_of_the_file(tmp_path: Path) -> None:
    first = loaded(encoder("module.", 1.0))[1]
    assert (
        first.fingerprint == loaded(checkpoint(tmp_path / "a.pth", {"state_dict": encoder()}))[1].fingerprint
    )
    assert (
        first.fingerprint
        == merge(Classifier(MODEL.encoder, 5), Weights(encoder(), "x"), seed=3)[2].fingerprint
    )
    assert first.fingerprint[:16] in str(first)
    other = encoder()
    other["bn1.bias"] = np.nextafter(other["bn1.bias"], np.float32(2))
    assert loaded_any(other).fingerprint != first.fingerprint


def loaded_any(source: dict[str, np.ndarray]) -> MergeReport:
    return merge(MODEL, Weights(source, "x"), seed=0, head="new")[2]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    names=st.lists(st.text("ab/", min_size=1, max_size=4), min_size=2, max_size=5, unique=True),
    seed=st.integers(0, 9),
)
def test_a_fingerprint_depends_on_names_shapes_and_bits_alone(names: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in names}
    same = {name: np.asfortranarray(arrays[name]) for name in reversed(names)}
    assert identity.fingerprint(arrays) == identity.fingerprint(same)
    turned = {name: array.T for name, array in arrays.items()}
    swapped = arrays | {names[0]: arrays[names[1]], names[1]: arrays[names[0]]}
    zero = {name: array * 0 for name, array in arrays.items()}
    minus = {name: -array for name, array in zero.items()}
    found = {identity.fingerprint(each) for each in (arrays, turned, swapped, zero, minus)}
    assert len(found) == 5
