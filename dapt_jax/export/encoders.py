"""`mode=export`: a study's adapted encoders in formats of other tools, each with a model card."""

from pathlib import Path

import jax
import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.export import model_card
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import streams
from dapt_jax.settings import StudySettings
from dapt_jax.study import strategies
from dapt_jax.study import workdir as workdirs
from dapt_jax.study.adapt import ADAPTED, read_about
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.training.phases import Phase
from dapt_jax.weights import export, locate

FOLDER = "export"


def run(settings: StudySettings, workdir: Path) -> list[Path]:
    """Export every adapted encoder of the strategies and seeds of a study.

    In `workdir/export/ARM`: `timm.safetensors` and `torchvision.safetensors` where these libraries build the
    model, `encoder.safetensors` (names of this library), `orbax`, `encoder.stablehlo`, and the card
    `README.md`.

    Args:
        settings: Settings of the study; it may name fewer strategies and seeds.
        workdir: Folder of the study.

    Returns:
        Folders of the exported encoders.

    Raises:
        UserError: The workdir holds no study, or that of other settings, or none of its arms is adapted.
    """
    records = Records.read(workdir)
    settings = strategies.expanded(settings)
    encoder = locate.fitted(settings.weights, settings.model.encoder(), settings.model.preprocess)
    resolved = tuple(strategies.resolve(name, encoder, settings) for name in settings.strategies)
    there = workdirs.recorded_settings(records, workdir)
    # What follows the machine is another here than where the study ran, and no part of an encoder.
    workdirs.check_settings(Study(settings, resolved), there, workdir, free=("cache.", "model.dtype"))
    adapting = [strategy for strategy in resolved if strategy.phases]
    arms = [Arm(strategy, seed) for strategy in adapting for seed in settings.adaptation_seeds]
    checkpoints = workdir / "checkpoints"
    finished = [arm for arm in arms if (arm.folder(workdir) / ADAPTED).exists()]
    if not finished:
        wanted = ", ".join(arm.folder(workdir).name for arm in arms) or "no strategy adapts"
        raise UserError(
            f"{checkpoints}: no finished {ADAPTED} ({wanted}); expected the workdir of a study that has run"
        )
    made = []
    for arm in finished:
        source = arm.folder(workdir)
        target = workdir / FOLDER / source.name
        is_whole = arm.strategy.encoder.groups == encoder.groups
        _export(records, arm.strategy, source, target, is_whole=is_whole)
        streams.say(f"export: {target}")
        made.append(target)
    return made


def _export(records: Records, strategy: Strategy, source: Path, target: Path, *, is_whole: bool) -> None:
    encoder = strategy.encoder
    if remembered := locate.remembered(source / ADAPTED):  # the source weights may have been moved
        encoder = encoder.with_preprocess(remembered)
    params, batch_stats, _ = locate.load(str(source / ADAPTED), Classifier(encoder, 1), seed=0)
    params.pop(HEAD)
    about = read_about(source)
    target.mkdir(parents=True, exist_ok=True)
    for library in export.libraries(encoder, about["image_size"]):
        export.write_named(target / library.file, encoder, params, batch_stats, library.scheme)
    export.write(target / "encoder.safetensors", params, batch_stats, encoder)
    export.write_orbax(target / "orbax", params, batch_stats, encoder)
    export.write_stablehlo(target / "encoder.stablehlo", encoder, params, batch_stats, about["image_size"])
    image = parity_image(about["image_size"], encoder.preprocess.channels)
    features = jax.jit(Classifier(encoder, 1).features)(params, batch_stats, image[None])
    model_card.write(
        target / "README.md",
        records=records,
        about=about,
        encoder=encoder,
        is_whole=is_whole,
        spec=strategy.weights,
        corpora=tuple(dict.fromkeys(part.corpus for part in strategy.parts)),
        phases=[_phase(phase) for part in strategy.parts for phase in part.phases],
        largest={int(at): float(features[0, at]) for at in np.argsort(-np.asarray(features[0]))[:6]},
    )


def _phase(phase: Phase) -> str:
    return f"{phase.name}: {phase.epochs} epochs at {phase.lr:g}, training {', '.join(phase.trainable)}"


def parity_image(size: int, channels: int) -> np.ndarray:
    """Return the uint8 image (h, w, c) whose features a card lists; rows, columns and channels all differ."""
    rows, columns, depth = np.ogrid[:size, :size, :channels]
    return ((3 * rows + 5 * columns + 7 * depth) % 256).astype(np.uint8)
