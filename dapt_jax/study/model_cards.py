"""The card of a folder of target models: what they are, how good they are, and how to use them."""

from collections.abc import Sequence

from dapt_jax.inference.target_model import About
from dapt_jax.models.encoder import Encoder
from dapt_jax.records.study_records import Records
from dapt_jax.statistics import Aggregation
from dapt_jax.weights import normalisation


def text(models: Sequence[tuple[About, Encoder]], records: Records) -> str:
    """Return the card in Markdown.

    Args:
        models: What the models of one task, strategy and protocol are, one or more, and their encoders.
        records: Records of the study.
    """
    (about, encoder), every = models[0], [each for each, _ in models]
    reading, trained = about.reading, about.trained_on
    outputs = ", ".join(about.classes) if about.classes else f"masks of {', '.join(about.segments[1:])}"
    members = sum(len(each.folds) for each in every)
    study = trained.get("study", "study")
    synthetic = " **The images of this study are synthetic.**" if records.config.get("synthetic") else ""
    rows = [
        ("outputs", outputs),
        ("encoder", f"{about.model}, groups to {about.last_group}; adapted by `{about.strategy}`"),
        ("source weights", f"`{trained.get('weights', '')}`; {trained.get('source', '')}"),
        (
            "how it was trained",
            f"protocol `{about.protocol}`" + (f", decoder {about.decoder}" if about.decoder else ""),
        ),
        ("trained on", _set(about.trained_on)),
        ("members", f"{members}: folds and seeds, each trained on its part of the development images"),
        (
            "image size",
            f"{reading.image_size} x {reading.image_size}"
            + (f", crop {reading.crop}" if reading.crop else "")
            + (f", of tiles of {reading.tile_size}" if reading.tile_size else ""),
        ),
        ("normalisation", normalisation.describe(encoder.preprocess)),
        ("training images", ", ".join([*reading.kinds[:3], _colour(reading.colour), *_sides(reading.sides)])),
    ]
    if about.units:
        rows.append(("patients or volumes", f"{about.units}: `units.csv` of mode=predict"))
    if about.temperatures:
        found = [warmth for each in every for warmth in each.temperatures]
        rows.append(
            ("temperature", f"{min(found):.3g} to {max(found):.3g}, applied with predict.calibrate=true")
        )
    lines = [
        f"# Target model of {about.task}: `{about.strategy}`, `{about.protocol}`",
        f"From the study “{study}”.{synthetic}",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]),
        "## Scores",
        _scores(records, about),
        "## Use",
        "    python -m dapt_jax.main --config.mode=predict --config.predict.model=THIS_FOLDER \\\n"
        "        --config.predict.images=IMAGES --workdir=OUT",
        "    import dapt_jax as dj\n    prediction = dj.load_predictor('THIS_FOLDER')(images)",
        "Each file is complete: encoder, heads or decoders, normalisation, classes and the distribution of "
        "the training images' features. A research tool: not a medical device.",
    ]
    return "\n\n".join(lines) + "\n"


def _set(trained_on: object) -> str:
    if not isinstance(trained_on, dict):
        return "unknown"
    counts = ", ".join(f"{name} {count}" for name, count in trained_on.get("class_counts", {}).items())
    images, patients = trained_on.get("images", 0), trained_on.get("patients", 0)
    said = f"{trained_on.get('set', '')}: {images:,} images of {patients:,} patients"
    return said + (f" ({counts})" if counts else "")


def _colour(colour: str) -> str:
    return {"grey": "grey", "colour": "in colour"}.get(colour, "grey and in colour")


def _sides(sides: tuple[int, ...]) -> list[str]:
    return [f"sides of {sides[0]} to {sides[1]} pixels"] if sides else []


def _scores(records: Records, about: About) -> str:
    levels = {about.protocol: "images"}
    if about.units:
        own = Aggregation(about.units.unit, about.units.rule)
        levels[own.protocol(about.protocol)] = str(about.units)
    rows = [
        row
        for row in records.results
        if (row["task"], row["strategy"]) == (about.task, about.strategy)
        and row["protocol"] in levels
        and "/" not in row["metric"]
        and row["value"] is not None
    ]
    if not rows:
        return "None."
    lines = [
        f"| {row['split']} | {levels[row['protocol']]} | {row['seed']} "
        f"| {records.display_name(about.task, row['metric'])} | {row['value']:.4f} | {row.get('n', '')} |"
        for row in rows
    ]
    note = "Each score is the mean over folds of single models; an ensemble of them is not scored."
    header = ["| set | level | seed | metric | value | n |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join([*header, *lines]) + f"\n\n{note}"
