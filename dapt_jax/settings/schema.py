"""All settings of a study, each with default, range, choices, help and effect on results."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.cost.energy import CARBON_INTENSITY
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.framing import RESIZES
from dapt_jax.data.limits import DECODED_BYTES
from dapt_jax.data.records import ON_BAD_IMAGE
from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError, check_fields, section, setting
from dapt_jax.metrics import METRICS
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.registry import configured
from dapt_jax.records.vocabulary import MARGIN
from dapt_jax.runtime.processes import Group
from dapt_jax.settings.names import is_like
from dapt_jax.settings.predict import PredictSettings
from dapt_jax.settings.sections import changed
from dapt_jax.settings.sources import CorpusSettings, StrategySpec, TaskSettings, check_name
from dapt_jax.settings.training import AdaptSettings, TransferSettings, check_names
from dapt_jax.training.cache.policy import DTYPES, FLOPS_PER_BYTE, Caching
from dapt_jax.training.cache.policy import MODES as CACHE_MODES
from dapt_jax.training.context import NonFinitePolicy
from dapt_jax.training.phases import LEAST_SIDE
from dapt_jax.transferability.settings import ScoringSettings, SelectionSettings, Settings
from dapt_jax.transferability.variants import ScoringGrid

MODES = (
    "run", "data", "plan", "advise", "score", "aot", "status", "report", "compare", "export", "embed", "predict", "models",
)  # fmt: skip


AUTO = -1
"""Value of a budget that follows the machine: see `study.budgets`."""

ON_LEAK = ("error", "drop_train", "drop_eval", "mark")
"""What a study does about an image or a patient in two sets."""

PARTS = ("corpus", "target")
"""Parts of a set that `data.split` divides."""

FIT = "fit"
"""Value of `cache.dtype` and `model.remat` that follows what fits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(_Checked):
    """The encoder: the section `model`."""

    name: str = setting("efficientnet_lite0", doc="Architecture; --config.mode=models lists them.")
    image_size: int = setting(96, at_least=LEAST_SIDE, doc="Side of the images in pixels.")
    resize: str = setting(
        RESIZES[0],
        choices=RESIZES,
        doc="How images that are not square become square: squash stretches, pad fills with black, crop keeps "
        "the central square; a set may have its own resize.",
    )
    preprocess: str = setting(
        "",
        doc="Normalisation of images: imagenet, half, unit, torchxrayvision, keras_caffe, or MEAN,STD of "
        "pixel values; "
        "empty: as the weights say.",
    )
    dtype: str = setting("float32", choices=("float32", "bfloat16"), doc="Dtype of activations.")
    drop_path: float = setting(
        0.0, at_least=0, below=1, doc="Stochastic depth while training: rate of the last residual branch."
    )
    drop_path_subset: bool = setting(
        False,
        doc="Whether stochastic depth computes a branch for a random part of the batch only, instead of dropping "
        "results; not on masks.",
    )
    dropout: float = setting(0.0, at_least=0, below=1, doc="Dropout while training, of transformers.")
    patch_dropout: float = setting(
        0.0,
        at_least=0,
        below=1,
        doc="Share of each image's patch tokens that a training step leaves out, of vision transformers; not on "
        "masks.",
    )
    batch_norm_statistics: str = setting(
        "global",
        choices=("global", "per_device"),
        doc="Images over which batch norm that trains takes statistics: the batch, or each device's part.",
    )
    remat: tuple[str, ...] = setting(
        (),
        doc="Layer groups whose activations are computed again instead of kept; * for all, fit for as many of the "
        "lowest as a batch needs to fit in device memory.",
    )

    def encoder(self) -> Encoder:
        """Return the encoder, without the recomputed groups that are yet to be chosen; equal settings share one."""
        remat = tuple(group for group in self.remat if group != FIT)
        return configured(
            self.name, self.drop_path, self.dropout, remat, self.patch_dropout, self.drop_path_subset
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(_Checked):
    """Reading images: the section `data`."""

    on_bad_image: str = setting(
        "error", choices=ON_BAD_IMAGE, doc="What an unreadable image does; skipped ones are counted."
    )
    leaks: str = setting(
        "error",
        doc="What images or patients in two sets do: error, drop_train, drop_eval, mark, or the path of a "
        "list.csv.",
    )
    split: str = setting(
        "",
        doc="One labelled set as corpus and target: corpus=.5,target=.5 are the shares of the images of the only "
        "task's development set, divided by patient.",
    )
    cache_mb: int = setting(
        AUTO,
        at_least=AUTO,
        affects_results=False,
        doc="MiB of decoded images of all sets kept in memory; -1: a quarter of what is free.",
    )
    max_image_mb: int = setting(
        DECODED_BYTES >> 20,
        at_least=1,
        affects_results=False,
        doc="MiB that decoding one file may take; larger ones are unreadable, by their headers.",
    )
    threads: int = setting(2, at_least=1, affects_results=False, doc="Threads that decode images.")
    stall_s: float = setting(
        120.0,
        at_least=0,
        affects_results=False,
        doc="Seconds after which a read is reported as stalled; 0: never.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.shares
        if self.leaks not in ON_LEAK and not Path(self.leaks).suffix:
            raise SettingError(
                "leaks",
                self.leaks,
                f"{nearest(self.leaks, ON_LEAK)}, or the path of a list.csv",
                unknown=True,
            )

    @property
    def shares(self) -> dict[str, float]:
        """Shares of `corpus` and `target` in the development set, in this order; empty without a split."""
        if not self.split:
            return {}
        given = dict(part.partition("=")[::2] for part in self.split.replace(" ", "").split(","))
        try:
            found = {name: float(given[name]) for name in PARTS}
        except (KeyError, ValueError):
            found = {}
        is_valid = found and len(given) == len(PARTS) and all(0 < share < 1 for share in found.values())
        if not is_valid or sum(found.values()) > 1 + 1e-9:
            expected = "corpus=SHARE,target=SHARE, each more than 0 and together at most 1, such as "
            raise SettingError("split", self.split, f"{expected}corpus=.5,target=.5")
        return found

    @property
    def cache_bytes(self) -> int:
        """Bytes of decoded images kept in memory; 2 GiB where the machine was not asked yet."""
        return CACHE_BYTES if self.cache_mb == AUTO else self.cache_mb << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings(_Checked):
    """Activations of frozen prefixes, computed once for all arms, seeds and tasks: the section `cache`."""

    mode: str = setting(
        Caching().mode, choices=CACHE_MODES, doc="on refuses a frozen prefix that cannot be cached."
    )
    memory_mb: int = setting(
        AUTO, at_least=AUTO, doc="MiB of activations on the device; -1: a quarter of its free memory."
    )
    disk_mb: int = setting(
        AUTO, at_least=AUTO, doc="MiB of activations on disk; 0: none; -1: half of what is free there."
    )
    dir: str = setting(
        "",
        affects_results=False,
        doc="Folder of the cache on disk; empty: in the workdir, and removed at the end.",
    )
    dtype: str = setting(
        Caching().dtype,
        choices=(*DTYPES, FIT),
        doc="Dtype of cached activations; empty: as computed; int8: in 127 steps either way, by image and "
        "channel; fit: bfloat16 where only that fits.",
    )
    flops_per_byte: float = setting(
        Caching().flops_per_byte,
        at_least=0,
        doc=f"FLOPs that a byte read from disk has to save at least; 0: by device, {FLOPS_PER_BYTE}.",
    )

    def policy(self) -> Caching:
        """Return the caching options of the training loop; with 2 and 8 GiB where the machine was not asked."""
        memory, disk = (
            standard if value == AUTO else value << 20
            for value, standard in (
                (self.memory_mb, Caching().memory_bytes),
                (self.disk_mb, Caching().disk_bytes),
            )
        )
        return Caching(self.mode, memory, disk, "" if self.dtype == FIT else self.dtype, self.flops_per_byte)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergySettings(_Checked):
    """Energy where the hardware has no counter, by the formula of Green Algorithms: the section `energy`."""

    region: str = setting(
        "world", choices=tuple(CARBON_INTENSITY), doc="Region whose carbon intensity the report takes."
    )
    pue: float = setting(1.67, at_least=1, doc="Power usage effectiveness of the data centre.")
    watts: float = setting(0.0, at_least=0, doc="Power of each device in watts; 0: from a table.")
    memory_gb: float = setting(0.0, at_least=0, doc="Main memory that is charged, in GB; 0: this machine's.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings(_Checked):
    """What a plan supposes of what is not here, `mode=plan`: the section `plan`."""

    images: str = setting(
        "",
        doc="Images of sets that are not here: corpus=24422,TASK.development=3064 and so on; NUMBER/CLASSES where "
        "neither the set nor its description has the classes; corpus.KIND for sets of that kind alone.",
    )
    records: str = setting(
        "",
        doc="Folder with records of an earlier study of the same tasks, whose scatter over seeds says how many "
        "seeds report.margin needs; empty: the workdir, where it has results.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.counts

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Numbers of images and of classes by set, see `images`; 0 classes: known."""
        found = {}
        for each in filter(None, self.images.split(",")):
            name, _, size = each.partition("=")
            images, slash, classes = (part.strip() for part in size.partition("/"))
            numbers = [images, classes] if slash else [images]
            if not all(number.isdecimal() and int(number) > 1 for number in numbers):
                raise UserError(
                    f"plan.images holds {each!r}; expected SET=NUMBER, such as corpus=24422, or SET=NUMBER/CLASSES"
                )
            found[name.strip()] = int(images), int(classes or 0)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseSettings(_Checked):
    """Budget of one seed and evidence, `mode=advise`: the section `advise`."""

    tflop: float = setting(0.0, at_least=0, doc="Model TFLOP of adaptation and target tasks; 0: not given.")
    hours: float = setting(0.0, at_least=0, doc="Hours on this machine; 0: not given.")
    kwh: float = setting(
        0.0, at_least=0, doc="Energy in kWh, by the formula of the section energy; 0: not given."
    )
    records: tuple[str, ...] = setting(
        (), doc="Workdirs of your own studies that compare none and full, as evidence beside the shipped one."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeSettings(_Checked):
    """Devices, processes and checkpoints, which change results by rounding only: the section `runtime`."""

    fsdp: int = setting(
        1,
        at_least=0,
        doc="Devices over which each copy of parameters and optimizer state is sharded; 0: all.",
    )
    multi_process: str = setting(
        "auto",
        choices=("auto", "on", "off"),
        doc="Several processes; auto: if the cluster or the environment says so.",
    )
    coordinator_address: str = setting("", doc="HOST:PORT of the first process, where no cluster says it.")
    num_processes: int = setting(0, at_least=0, doc="Number of processes; 0: what the cluster says.")
    process_id: int = setting(
        -1, at_least=-1, doc="Number of this process, from 0; -1: what the cluster says."
    )
    checkpoint_every_s: float = setting(30.0, at_least=0, doc="Seconds between checkpoints.")
    measure_peak: bool = setting(False, doc="Measure a CPU's peak FLOP/s for the report; takes two seconds.")

    def group(self) -> Group:
        """Return the settings of the study's processes."""
        return Group(self.multi_process, self.coordinator_address, self.num_processes, self.process_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitoringSettings(_Checked):
    """Outputs in addition to metrics.jsonl and status.json: the section `monitoring`."""

    tensorboard: bool = setting(False, doc="Write TensorBoard event files into the workdir.")
    wandb: str = setting("", doc="Weights & Biases project; WANDB_MODE=offline needs no account.")
    prometheus: str = setting("", doc="File NAME.prom in the folder of node_exporter's textfile collector.")
    collapse: str = setting(
        "warn",
        choices=("warn", "halt"),
        doc="What a label-free arm does when RankMe of its features falls below half of its start.",
    )
    profile_step: int = setting(0, at_least=0, doc="First step, from 1, of a profiler trace; 0: none.")
    profile_steps: int = setting(5, at_least=1, doc="Number of traced steps.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings(_Checked):
    """Primary results of the report: the section `report`."""

    metric: str = setting("auc", doc="Primary metric, or METRIC/CLASS.")
    protocol: str = setting("", doc="Primary protocol; empty: the first of each task.")
    margin: float = setting(
        MARGIN,
        at_least=0,
        doc="Margin of the metric within which a strategy is not inferior to full DAPT; 0: no test.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name, _, of_class = self.metric.partition("/")
        by_class = [each.name for each in METRICS.values() if each.per_class]
        if self.metric not in METRICS and not (name in by_class and of_class):
            choices = (*METRICS, *(f"{each}/CLASS" for each in by_class))
            raise SettingError("metric", self.metric, nearest(self.metric, choices), unknown=True)

    def primary_of(self, protocols: Sequence[str]) -> str:
        """Return the primary one of a task's protocols."""
        return self.protocol if self.protocol in protocols else protocols[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotSettings(_Checked):
    """Compilation ahead of time for a TPU topology, `mode=aot`: the section `aot`."""

    topology: str = setting("v5e:2x4", doc="CHIP:SHAPE: v4, v5e, v5p or v6e, and chips along each axis.")
    compilations: int = setting(
        6, at_least=0, doc="Compilations that the search for a phase's largest batch may take; 0: no search."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings(_Checked):
    """All settings of a study.

    >>> StudySettings(seeds=(0, 1)).adapt.batch_size
    32

    `default()` returns its defaults as a config, and `resolve` converts an edited config to an instance.
    """

    name: str = setting("study", doc="Name of the study.")
    title: str = setting("", doc="Title of the report.")
    note: str = setting("", doc="A line below the title.")
    synthetic: bool = setting(False, doc="Images are made by a generator: said wherever results are shown.")
    mode: str = setting("run", choices=MODES, affects_results=False, doc="What the command does.")
    compare: tuple[str, ...] = setting(
        (),
        affects_results=False,
        doc="Workdirs whose results mode=compare shows in one report: WORKDIR or NAME=WORKDIR.",
    )
    strategies: tuple[str, ...] = setting(
        ("none", "full", "partial", "hybrid", "simplified"),
        doc="Built-in and custom strategies that are compared.",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), doc="Seeds with which each strategy runs.")
    model: ModelSettings = section(ModelSettings, "The encoder.")
    weights: str = setting(
        "imagenet",
        doc="imagenet, random, a name of weights/zoo.py, a path, run:WORKDIR@epoch=N (an encoder of another "
        "study), https://, hf:// or package://.",
    )
    embed_level: str = setting(
        "",
        affects_results=False,
        doc="Layer group whose output mode=embed averages over an image; empty: the pooled features.",
    )
    data_dir: str = setting(
        "", affects_results=False, doc="Where relative paths of data sets start: a folder, gs://, s3:// ..."
    )
    data: DataSettings = section(DataSettings, "Reading images.")
    corpus: CorpusSettings = section(
        CorpusSettings, "The in-domain corpus: docs/data_sets.md says what it takes."
    )
    corpora: Mapping[str, CorpusSettings] = setting(
        default_factory=dict, doc="More corpora by name, for custom strategies that name one."
    )
    tasks: Mapping[str, TaskSettings] = setting(
        default_factory=dict,
        doc="Target tasks by name: development, or train and val; and test and external where there are any.",
    )
    adapt: AdaptSettings = section(AdaptSettings, "Domain-adaptive pre-training.")
    cache: CacheSettings = section(CacheSettings, "Activations of frozen prefixes.")
    custom_strategies: Mapping[str, StrategySpec] = setting(
        default_factory=dict,
        doc="Strategies by name: phases, or like, and weights, corpus, cut_after where they differ.",
    )
    phases_scale: float = setting(
        1.0, above=0, doc="Factor of the epochs of every phase of adaptation, at least one each: for trials."
    )
    transfer: TransferSettings = section(TransferSettings, "Target tasks.")
    checkpoint_scoring: ScoringSettings = section(ScoringSettings, "Transferability scores along adaptation.")
    checkpoint_selection: SelectionSettings = section(SelectionSettings, "Choice of a checkpoint by a score.")
    scoring: ScoringGrid = section(
        ScoringGrid, "Scores of given checkpoints, mode=score.", affects_results=False
    )
    compute_budget: float = setting(
        0.0,
        at_least=0,
        doc="Share of full DAPT's FLOPs for all strategies, by successive halving; 0: no limit.",
    )
    runtime: RuntimeSettings = section(RuntimeSettings, "Devices and processes.", affects_results=False)
    non_finite: NonFinitePolicy = section(
        NonFinitePolicy, "Losses that are not finite.", affects_results=False
    )
    monitoring: MonitoringSettings = section(
        MonitoringSettings, "What is written on the way.", affects_results=False
    )
    energy: EnergySettings = section(EnergySettings, "Energy by formula.", affects_results=False)
    report: ReportSettings = section(ReportSettings, "The report.", affects_results=False)
    predict: PredictSettings = section(PredictSettings, "Target models on new images.", affects_results=False)
    plan: PlanSettings = section(PlanSettings, "What a plan supposes.", affects_results=False)
    advise: AdviseSettings = section(AdviseSettings, "Advice.", affects_results=False)
    aot: AotSettings = section(AotSettings, "Ahead-of-time compilation.", affects_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for section_name in ("tasks", "custom_strategies"):
            for name in getattr(self, section_name):
                check_name(section_name, name)
        check_names("strategies", self.strategies)
        self._check_seeds()
        self._check_early_stopping()
        if not self.tasks or any(task.val is None for task in self.tasks.values()):
            self.transfer.check_validation("transfer")
        for name, task in self.tasks.items():
            if task.transfer and task.val is None:
                self.transfer_of(name).check_validation(f"tasks.{name}.transfer")
        for name, spec in self.custom_strategies.items():
            for corpus in (spec.corpus, *(phase.corpus for phase in spec.phases)):
                if corpus and corpus not in self.corpora:
                    hint = nearest(corpus, self.corpora) if self.corpora else "corpora is empty"
                    raise UserError(f"custom_strategies.{name}: no corpus {corpus!r} in corpora; {hint}")
        protocols = (*self.transfer.protocols, *self.transfer.segmentation.protocols)
        if (protocol := self.report.protocol) and protocol not in protocols:
            raise UserError(
                f"report.protocol {protocol!r} is not one of transfer.protocols; "
                f"{nearest(protocol, protocols)}"
            )
        if self.compute_budget and self.adapt.has_own_seed:
            raise UserError(
                f"adapt.seed is {self.adapt.seed}, one adaptation for all seeds, and a compute_budget chooses a "
                "strategy with every seed; expected adapt.seed=-1, or compute_budget=0"
            )
        if self.compute_budget and not self.checkpoint_selection.score:
            raise UserError(
                "compute_budget is for strategies that adapt, compared by a score; expected "
                "checkpoint_selection.score='robustness', or compute_budget=0"
            )

    def transfer_of(self, task: str) -> TransferSettings:
        """Return the settings of a target task: `transfer`, with what the task changes.

        Raises:
            UserError: A change is invalid.
        """
        changes = self.tasks[task].transfer if task in self.tasks else {}
        return changed(self.transfer, changes, f"tasks.{task}.transfer") if changes else self.transfer

    def of_task(self, task: str) -> "StudySettings":
        """Return the settings with those of a target task in the place of `transfer`."""
        own = self.transfer_of(task)
        return self if own is self.transfer else dataclasses.replace(self, transfer=own)

    def _check_early_stopping(self) -> None:
        if not self.adapt.early_stopping_patience:
            return
        for name, corpus in (
            ("corpus", self.corpus),
            *((f"corpora.{n}", c) for n, c in self.corpora.items()),
        ):
            if not corpus.val_fraction:
                raise UserError(
                    f"adapt.early_stopping_patience needs images to watch; expected {name}.val_fraction above 0, "
                    "such as 0.1"
                )
        if self.checkpoint_selection.score:
            raise UserError(
                f"adapt.early_stopping_patience and checkpoint_selection.score={self.checkpoint_selection.score!r} "
                "both choose the checkpoint; expected one of them"
            )

    def _check_seeds(self) -> None:
        for seed in self.seeds:
            if not (is_like(seed, 0) and 0 <= seed < 1 << 32):
                raise UserError(f"seeds holds {seed!r}; expected whole numbers from 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; expected one or more, each once")

    @property
    def adaptation_seeds(self) -> tuple[int, ...]:
        """Seeds with which each strategy adapts."""
        return (self.adapt.seed,) if self.adapt.has_own_seed else self.seeds

    @property
    def scores(self) -> Settings | None:
        """Plan of checkpoint scoring along adaptation; None where nothing is scored."""
        return Settings.of(self.checkpoint_scoring, self.checkpoint_selection)

    def corpus_named(self, name: str) -> CorpusSettings:
        """Return the settings of a corpus by its name in `corpora`; empty for the main corpus."""
        return self.corpora[name] if name else self.corpus


def open_sections() -> dict[str, Any]:
    """Return the sections with user-defined names and the class of their entries."""
    return {
        "corpus": CorpusSettings,
        "corpora": CorpusSettings,
        "tasks": TaskSettings,
        "custom_strategies": StrategySpec,
    }
