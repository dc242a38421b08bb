"""The public API: encoders with weights, data, features, adaptation, evaluation and whole studies.

Each task is one call, available from `import dapt_jax as dj`. A notebook needs no
config, no workdir and no device mesh:

    >>> import dapt_jax as dj
    >>> encoder = dj.load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> corpus = dj.load_dataset("phantoms", name="corpus", n=24, image_size=32)
    >>> run = dj.adaptation_run(encoder, corpus, [dj.Phase("head", 1, trainable=("head",), lr=1e-3)])
    >>> [phase.trainable for phase in dj.plan(run)]
    [51]
    >>> adapted = dj.train(run, encoder).encoder
    >>> dj.extract_features(adapted, corpus).shape
    (24, 16)
"""

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from dapt_jax import losses, settings
from dapt_jax.data import sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.given_arrays import as_uint8
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError, nearest
from dapt_jax.export import embeddings
from dapt_jax.inference import predictor
from dapt_jax.inference.predictor import Predictor
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import DEFAULT_LORA, Encoder, Tree
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.row_changes import DEFAULT_ROWS, RowSettings
from dapt_jax.records.ledger import Row
from dapt_jax.records.scores import Scores
from dapt_jax.records.study_records import Records
from dapt_jax.report import compare as comparing
from dapt_jax.runtime import home, storage, streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.schema import DataSettings
from dapt_jax.settings.training import TransferSettings
from dapt_jax.study import leakage, prepare, study
from dapt_jax.study import plan as planning
from dapt_jax.study import score as scoring
from dapt_jax.study.classification import HeadRun
from dapt_jax.study.plan import PhasePlan
from dapt_jax.study.runs import inverse_frequency_weights
from dapt_jax.study.tasks import ArmKey, ResultRow, Task
from dapt_jax.training import freezing, head_sweep, linear_head, loop, patterns
from dapt_jax.training.context import RunContext
from dapt_jax.training.evaluate import ShardedForward
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import TrainData, TrainingRun
from dapt_jax.transferability.registry import Outcome, Sample
from dapt_jax.transferability.registry import evaluate as evaluate_scores
from dapt_jax.weights import export, locate
from dapt_jax.weights.merge import MergeReport


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedEncoder:
    """An encoder with its weights; made by `load_encoder`, or by `train`.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> encoder.encoder.groups
    ('stem', 'stage1/block1')

    Attributes:
        encoder: Its layer groups, as pure functions; see `dapt_jax.models.encoder.Encoder`.
        params: Its parameters, nested dicts of float32 arrays.
        batch_stats: Its batch-norm statistics, nested dicts of float32 arrays.
        report: What was loaded from which file, and how images are normalised.
    """

    encoder: Encoder
    params: Tree
    batch_stats: Tree
    report: MergeReport

    def save(self, path: str | Path) -> None:
        """Write the weights to one file that `load_encoder(..., weights=path)` takes.

        Args:
            path: File to write; its suffix is `.safetensors` or `.npz`.
        """
        export.write(home.expanded(path), self.params, self.batch_stats, self.encoder)

    def export(self, path: str | Path, library: str = "timm") -> None:
        """Write the weights as safetensors under the names of a PyTorch library.

        Args:
            path: File to write.
            library: "timm" or "torchvision".

        Raises:
            UserError: The library has no such model; names those that do.
        """
        by_name = {each.name: each for each in export.libraries(self.encoder)}
        if library not in by_name:
            hint = nearest(library, by_name) if by_name else "no library has this model"
            raise UserError(f"{self.encoder.name}: not a model of {library!r}; {hint}")
        export.write_named(
            home.expanded(path), self.encoder, self.params, self.batch_stats, by_name[library].scheme
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """The result of `train`.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> corpus = load_dataset("phantoms", name="corpus", n=24, image_size=32)
    >>> trained = train(adaptation_run(encoder, corpus, [Phase("head", 1, ("head",), lr=1e-3)]), encoder)
    >>> sorted(trained.curve[0])
    ['epoch', 'loss', 'lr', 'val_auc', 'val_loss']

    Attributes:
        encoder: The trained encoder, without the head.
        params: Parameters of the whole network, the head included, low-rank updates merged.
        batch_stats: Its batch-norm statistics.
        costs: Rows of the ledger, one per phase: FLOPs, images, seconds by kind, energy.
        curve: One point per epoch: `epoch`, `loss`, `lr`, and metrics of the validation rows.
    """

    encoder: PretrainedEncoder
    params: Tree
    batch_stats: Tree
    costs: tuple[Row, ...]
    curve: list[dict[str, Any]]


def list_encoders() -> tuple[str, ...]:
    """Return the names of all architectures.

    >>> "resnet50" in list_encoders()
    True
    """
    return registry.names()


def load_encoder(
    name: str, weights: str = "imagenet", *, preprocess: str = "", cut_after: str = "", seed: int = 0
) -> PretrainedEncoder:
    """Return an encoder with pretrained weights.

    >>> load_encoder("efficientnet_lite0", cut_after="stage1/block1").params["stem"]["conv"]["kernel"].shape
    (3, 3, 3, 32)

    Args:
        name: Name of the architecture; see `list_encoders`.
        weights: `imagenet`, `random`, a name of the zoo, a file or folder, `https://`, `hf://` or
            `package://`.
        preprocess: Normalisation of images where the weights do not define it: see the setting
            `model.preprocess`.
        cut_after: Last layer group that remains; empty for all.
        seed: Seed of the random initialisation; every parameter under `random`.

    Raises:
        UserError: The architecture, layer group or file does not exist, or the file does not fit; names the
            nearest valid choice.
    """
    encoder = locate.fitted(weights, registry.build(name), preprocess)
    if cut_after:
        encoder = encoder.truncate(cut_after)
    params, batch_stats, report = locate.load(weights, Classifier(encoder, 1), seed=seed)
    return PretrainedEncoder(encoder, _without_head(params), batch_stats, report)


def load_dataset(
    kind: str,
    path: str | Path = "",
    *,
    image_size: int,
    on_bad_image: str = "error",
    **source: Any,
) -> Dataset:
    """Return a data set of images with labels, patients and the other columns of its manifest.

    >>> data = load_dataset("phantoms", name="development", n=12, image_size=32)
    >>> len(data), data.images.batch([0]).shape
    (12, (1, 32, 32, 3))

    Args:
        kind: "manifest" (a CSV next to the images), "folder" (a folder per class), "phantoms", "tfds", or a
            public set.
        path: File or folder of the set; not needed for phantoms.
        image_size: Side of the images in pixels.
        on_bad_image: "error", or "skip" to leave out and count images that cannot be read.
        **source: Further options of the reader, such as `where="split=dev"` or `classes=("benign",
            "malignant")`; see docs/data_sets.md.

    Raises:
        UserError: The data set is invalid; names the file, row or key.
    """
    if not isinstance(image_size, numbers.Integral) or image_size < 8:
        raise UserError(f"image_size is {image_size!r}; expected a whole number, 8 or more")
    spec = {
        "kind": kind,
        **source,
        **({"path": str(home.expanded(path).resolve())} if str(path) else {}),
    }
    return sources.load(spec, data_dir=None, image_size=image_size, on_bad_image=on_bad_image)


def extract_features(
    encoder: PretrainedEncoder, images: Dataset | np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """Return the pooled features of images, in batches that are sharded over all devices.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> extract_features(encoder, np.zeros((3, 32, 32, 3), np.uint8)).shape
    (3, 16)

    Args:
        encoder: The encoder.
        images: A data set, or an array of images [n, h, w, 3], or [n, h, w] of grey ones: uint8, or floats from
            0 to 1; the encoder normalises them itself.
        batch_size: Images of a batch, over all devices; rounded up to a multiple of their number.

    Returns:
        float32 [n, features].

    Raises:
        UserError: The array has another type, shape or range.
    """
    if isinstance(images, np.ndarray) and images.shape[:1] == (0,):
        return np.zeros((0, encoder.encoder.features), np.float32)
    mesh = RunContext().mesh
    forward = ShardedForward(_features_of(encoder.encoder), encoder.params, encoder.batch_stats, mesh)
    if isinstance(images, Dataset):
        return embeddings.in_batches(forward, images.images.batch, len(images), batch_size)
    pixels = as_uint8(images)
    colour = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    return embeddings.in_batches(forward, colour.__getitem__, len(colour), batch_size)


def _require_dataset(name: str, value: object) -> None:
    if not isinstance(value, Dataset):
        raise UserError(
            f"{name} is a {type(value).__name__}; expected a data set, as load_dataset returns it"
        )


@functools.cache
def _features_of(encoder: Encoder) -> Any:
    return jax.jit(Classifier(encoder, 1).features)


def adaptation_run(
    encoder: PretrainedEncoder,
    corpus: Dataset,
    phases: Sequence[Phase],
    *,
    val_fraction: float = 0.1,
    balance_classes: bool = True,
    loss: str = "auto",
    dtype: str = "float32",
    lora: LoraSettings = DEFAULT_LORA,
    rows: RowSettings = DEFAULT_ROWS,
    seed: int = 0,
    **options: Any,
) -> TrainingRun[Classifier]:
    """Return the run that adapts an encoder to the images and labels of a corpus, split by patient.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> corpus = load_dataset("phantoms", name="corpus", n=24, image_size=32)
    >>> run = adaptation_run(encoder, corpus, [Phase("all", 2, trainable=("*",), lr=1e-4)], batch_size=8)
    >>> run.timeline.epochs, run.model.outputs
    (2, 3)

    Args:
        encoder: The encoder.
        corpus: In-domain images of two or more classes.
        phases: Phases of training in order; each trains only the parameters that its patterns name.
        val_fraction: Share of the images, by patient, on which the loss is measured after every epoch; 0 for
            none.
        balance_classes: Whether classes are weighted by their inverse frequency.
        loss: Name of the loss; `auto` is cross-entropy, and `ordinal` is for classes in an order: numbers, or of a
            set that `load_dataset(..., ordinal=True)` reads.
        dtype: Dtype of activations: `float32` or `bfloat16`.
        lora: Rank and factor of the low-rank updates of patterns that end with `:lora`.
        rows: Number and seed of the rows that patterns that end with `:rows` train.
        seed: Seed of the split, the data order, the augmentation and the new head.
        **options: Other fields of `TrainingRun`: `batch_size`, `optimizer`, `augment`, `caching` and so on.

    Raises:
        UserError: A pattern matches no parameter, the corpus has one class, or classes without an order for an
            ordinal loss, or no patient can be held out.
    """
    _require_dataset("corpus", corpus)
    if len(corpus.classes) < 2 and not corpus.multi_label:
        raise UserError(f"{corpus.name}: all images are {corpus.classes[0]!r}; expected two classes or more")
    train_rows, val_rows = np.arange(len(corpus)), np.arange(0)
    if val_fraction:
        train_rows, val_rows = grouped_holdout(corpus.labels, corpus.groups, val_fraction, seed)
    objective = losses.make(
        loss, classes=len(corpus.classes), multi_label=corpus.multi_label, uncertain=corpus.uncertain
    )
    if loss == "ordinal":
        try:
            corpus = sources.ordered(corpus, {})
        except UserError as error:
            raise UserError(f"{error}, and ordinal=True, of load_dataset") from error
    data = TrainData(
        corpus,
        train_rows,
        val_rows,
        inverse_frequency_weights(corpus, train_rows) if balance_classes else (),
    )
    tuned = patterns.with_rows(patterns.with_lora(encoder.encoder, phases, lora), phases, rows)
    model = Classifier(tuned, objective.outputs, dtype)
    return TrainingRun(model, tuple(phases), data, objective, seed=seed, **options)


def plan(run: TrainingRun) -> list[PhasePlan]:
    """Return the cost of each phase of a run without running it.

    The cost consists of parameters, FLOPs, images, steps and memory.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> corpus = load_dataset("phantoms", name="corpus", n=24, image_size=32)
    >>> run = adaptation_run(encoder, corpus, [Phase("head", 3, trainable=("head",), lr=1e-3)])
    >>> [(phase.name, phase.trainable, phase.cache_bytes > 0) for phase in plan(run)]
    [('head', 51, True)]

    Args:
        run: The run.
    """
    return planning.of_run(run)


def train(
    run: TrainingRun[Classifier], start: PretrainedEncoder | None = None, context: RunContext | None = None
) -> Trained:
    """Train a run; by default in memory, without output, on all devices.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> corpus = load_dataset("phantoms", name="corpus", n=24, image_size=32)
    >>> run = adaptation_run(encoder, corpus, [Phase("head", 2, trainable=("head",), lr=1e-3)])
    >>> trained = train(run, encoder)
    >>> len(trained.curve), trained.costs[0].model_flops == sum(phase.flops for phase in plan(run))
    (2, True)

    Args:
        run: The run.
        start: Encoder whose weights the run starts from; None to start from random weights. The head is
            always new.
        context: Checkpoints, ledger, display and callbacks; by default everything stays in memory. Runs that
            share one context share compiled steps and cached activations, so that a second seed compiles nothing.

    Raises:
        UserError: The loss is not finite, or the encoder differs from that of the run.
    """
    params, batch_stats = run.model.init(run.seed)
    report = MergeReport((), (), (), f"random (seed {run.seed})", "")
    if start is not None:
        if start.encoder.groups != run.model.encoder.groups:
            raise UserError(
                f"the run is of {run.model.encoder.name!r} with {len(run.model.encoder.groups)} layer "
                "groups, start of "
                f"{start.encoder.name!r} with {len(start.encoder.groups)}; expected the same encoder"
            )
        params, batch_stats, report = freezing.overlay(params, start.params), start.batch_stats, start.report
    result = loop.train(run, params, batch_stats, context)
    params = run.model.encoder.merged(result.params)
    encoder = PretrainedEncoder(run.model.encoder.base, _without_head(params), result.batch_stats, report)
    return Trained(encoder, params, result.batch_stats, result.costs, result.curve)


def evaluate(
    encoder: PretrainedEncoder,
    development: Dataset,
    external: Dataset | None = None,
    *,
    protocol: str = "linear",
    folds: int = 5,
    seed: int = 0,
    leaks: str = "error",
) -> list[ResultRow]:
    """Train heads on an encoder's features by cross-validation, and score them.

    Test images are never used for training.

    >>> encoder = load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> data = load_dataset("phantoms", name="development", n=60, image_size=32)
    >>> rows = evaluate(encoder, data, folds=2)
    >>> [row["split"] for row in rows if row["metric"] == "auc"]
    ['development']

    Args:
        encoder: The encoder.
        development: Images that heads are trained on and, fold by fold, scored on; folds are divided by
            patient.
        external: Images from another source, used for scoring only.
        protocol: Kind of head: `linear`, `mlp_small` or `mlp_large`.
        folds: Number of folds.
        seed: Seed of the folds and of the heads.
        leaks: What images or patients in both sets do: see the setting `data.leaks`; lines on standard output say
            what was found.

    Returns:
        Rows as in `results.jsonl`: `split`, `metric`, `value`, `n`, `classes` and more.

    Raises:
        UserError: The sets differ in their classes or in the size of their images, have images or patients in
            common, or a class has fewer patients than there are folds.
    """
    _require_dataset("development", development)
    if external is not None:
        _require_dataset("external", external)
        if external.images.size != development.images.size:
            raise UserError(
                f"external: image_size is {external.images.size}; expected {development.images.size}, that of "
                "development"
            )
    known = (linear_head.LINEAR, *head_sweep.HIDDEN)
    if protocol not in known:
        raise UserError(f"unknown protocol {protocol!r}; {nearest(protocol, known)}")
    transfer = dataclasses.replace(TransferSettings(), folds=folds, protocols=(protocol,))
    chosen = StudySettings(transfer=transfer, data=DataSettings(leaks=leaks))
    whole = Task("task", development, {} if external is None else {"external": external})
    apart = leakage.resolve((whole,), {}, chosen.data.leaks)
    for line in apart.notes:
        streams.say(f"warning: {line}")
    (task,) = apart.tasks
    features = {split: extract_features(encoder, dataset) for split, dataset in task.datasets.items()}
    key = ArmKey("encoder", seed, "", encoder.encoder.name)
    return HeadRun(chosen, task, key, protocol).measure(features, None)


def transferability_scores(
    names: Iterable[str], features: np.ndarray, labels: np.ndarray
) -> dict[str, Outcome]:
    """Return transferability scores of features of target images, without any training.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> scores = transferability_scores(["logme", "gbc"], rng.normal(size=(60, 8)) + labels[:, None], labels)
    >>> sorted(scores), all(np.isfinite(score.value) for score in scores.values())
    (['gbc', 'logme'], True)

    Args:
        names: Names of scores, or one name, such as `logme`, `h_score`, `gbc`, `transrate`, `sfda`, `parc`, `knn`.
        features: Features of the images, float [n, d].
        labels: Class numbers, int [n].

    Returns:
        Outcomes by name of the score; the value is NaN, with a reason, where it is undefined.

    Raises:
        UserError: No score has that name.
    """
    names = (names,) if isinstance(names, str) else names
    return evaluate_scores(names, Sample(np.asarray(features), np.asarray(labels)))


def plan_study(config: config_dict.ConfigDict | StudySettings) -> dict[str, list[PhasePlan]]:
    """Return the cost of adaptation by strategy, before a study has run.

    >>> config = settings.default()
    >>> config.strategies, config.seeds = ("full",), (0,)
    >>> config.model.image_size = 32
    >>> config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 36})
    >>> config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 60}}
    >>> [phase.name for phase in plan_study(config)["full"]]  # doctest: +ELLIPSIS
    weights: ...
    ['head', 'full']

    Args:
        config: A modified config from `default_config`, or settings.

    Raises:
        UserError: The settings, the data or the weights are invalid.
    """
    ready = prepare.prepare(_settings(config))
    arms = [arm for arm in ready.arms_of(ready.settings.seeds[0]) if ready.corpus_of(arm) is not None]
    return {arm.name: [phase for run in ready.runs_of(arm) for phase in planning.of_run(run)] for arm in arms}


def run_study(config: config_dict.ConfigDict | StudySettings, workdir: str | Path) -> Records:
    """Run the remaining arms of a study, write its report, and return its records.

    The same call resumes an interrupted study, and does nothing once all arms are complete.

    >>> import tempfile
    >>> config = settings.default()
    >>> config.strategies, config.seeds = ("cut",), (0,)
    >>> config.model.image_size, config.transfer.folds = 32, 2
    >>> config.custom_strategies.cut = {"cut_after": "stage1/block1"}
    >>> config.transfer.protocols = ("linear",)
    >>> config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 60}}
    >>> records = run_study(config, tempfile.mkdtemp())  # doctest: +ELLIPSIS
    weights: ...
    >>> sorted({row["strategy"] for row in records.results})
    ['baseline', 'cut']

    Args:
        config: A modified config from `default_config`, or settings.
        workdir: Folder of the study; `gs://`, `s3://` and whatever fsspec opens too.

    Raises:
        UserError: The study cannot run; one line gives the reason.
    """
    with _folder(workdir, "run") as folder:
        study.run(_settings(config), folder)
        return Records.read(folder)


def score(config: config_dict.ConfigDict | StudySettings, workdir: str | Path) -> Scores:
    """Score checkpoints on target sets without training, write `scores/` of a workdir, and return the scores.

    >>> import tempfile
    >>> config = settings.default()
    >>> config.model.image_size, config.scoring.levels, config.scoring.resamples = 32, (1,), 10
    >>> config.scoring.checkpoints, config.scoring.margins = ("imagenet", "random"), (0.5, 1.0)
    >>> config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 12}}
    >>> found = score(config, tempfile.mkdtemp())  # doctest: +ELLIPSIS
    cells development: ...
    >>> found.variants, found.checkpoints
    (['robustness 0.5', 'robustness 1'], ['imagenet', 'random'])

    Args:
        config: A modified config from `default_config`, or settings; the section `scoring` names the
            checkpoints and the grid of variants.
        workdir: Folder of the results; may be a URL, as of `run_study`.

    Raises:
        UserError: A checkpoint, a set or a score is invalid; one line gives the reason.
    """
    with _folder(workdir, "score") as folder:
        return scoring.run(_settings(config), folder)


def compare(workdirs: Sequence[str | Path], workdir: str | Path) -> Records:
    """Write one report over the studies of several workdirs, and return their records as those of one study.

    >>> import tempfile
    >>> records = compare(["a=docs/wbc", "b=docs/wbc_pretraining"], tempfile.mkdtemp())
    Traceback (most recent call last):
    ...
    dapt_jax.errors.UserError: compare: docs/wbc and docs/wbc_pretraining have other images or labels of ...

    Args:
        workdirs: Folders of the studies, `WORKDIR` or `NAME=WORKDIR`.
        workdir: Folder of the report; may be a URL, as of `run_study`.

    Raises:
        UserError: The studies cannot be compared, since tasks, images or folds differ; says which.
    """
    with _folder(workdir, "compare") as folder:
        return comparing.build([str(each) for each in workdirs], folder)


def read_study(workdir: str | Path) -> Records:
    """Return the records of a study: settings, results and ledger.

    >>> read_study("docs/wbc").results[0]["task"]
    'types'

    Args:
        workdir: Folder of the study; may be a URL, as of `run_study`.

    Raises:
        UserError: The folder holds no study, or a file is damaged; names file and line.
    """
    with _folder(workdir, "report") as folder:
        return Records.read(folder)


def load_predictor(path: str | Path | Sequence[str | Path], *, calibrate: bool = False) -> Predictor:
    """Return the function from images to predictions of target models that a study has kept.

    >>> predictor = load_predictor("runs/quickstart")  # doctest: +SKIP
    >>> prediction = predictor(["new/1.png", "new/2.png"])  # doctest: +SKIP
    >>> prediction.classes, prediction.probabilities.shape, prediction.unlike  # doctest: +SKIP
    (('benign', 'malignant'), (2, 2), array([False, True]))

    Args:
        path: Files of target models, a folder of them, or the workdir of a study; the models of all folds and
            seeds are one ensemble.
        calibrate: Whether probabilities are calibrated by the temperatures that the study fitted to development
            images.

    Raises:
        UserError: There is no target model, or the models are of several tasks, strategies or protocols.
    """
    return predictor.load(path, calibrate=calibrate)


@contextlib.contextmanager
def _folder(workdir: str | Path, mode: str) -> Iterator[Path]:
    """Yield a workdir, or the local copy of one elsewhere, as the command of that mode has it."""
    with storage.workdir(str(workdir) or ".", mode) as folder:
        assert folder is not None
        yield folder


def _settings(config: config_dict.ConfigDict | StudySettings) -> StudySettings:
    return config if isinstance(config, StudySettings) else settings.resolve(config)


def _without_head(params: Tree) -> Tree:
    return {key: value for key, value in jax.device_get(params).items() if key != HEAD}
