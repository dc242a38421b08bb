"""Model card of an adapted encoder: origin, adaptation, cost, scores, and how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.errors import redact
from dapt_jax.formatting import number
from dapt_jax.models.encoder import Encoder
from dapt_jax.objectives import SUPERVISED
from dapt_jax.records.study_records import Cost, Records
from dapt_jax.weights import export, locate, normalisation, zoo


def write(
    path: Path,
    *,
    records: Records,
    about: Mapping[str, Any],
    encoder: Encoder,
    is_whole: bool,
    spec: str,
    corpora: Sequence[str],
    phases: Sequence[str],
    largest: Mapping[int, float],
) -> None:
    """Write a card in Markdown.

    Args:
        path: Path of the card.
        records: Records of the study.
        about: Contents of the arm's `adapted.json`.
        encoder: The adapted encoder.
        is_whole: Whether the strategy kept all of its groups.
        spec: Source weights of the strategy, in the form of the setting `weights`.
        corpora: Names in `corpora` of what the strategy was adapted to, in order; empty for the study's corpus.
        phases: One line for each phase of the strategy.
        largest: The six largest pooled features of `export.parity_image`, by position.
    """
    config, strategy, seed = records.config, about["strategy"], about["seed"]
    title = config.get("title") or config.get("name") or "study"
    parts = [
        f"# {about['model']}, adapted by `{strategy}` (seed {seed})",
        f"From the study “{title}”."
        + (" **The images of this study are synthetic.**" if config.get("synthetic") else ""),
        _table(
            ("", ""),
            [
                (
                    "encoder",
                    f"{about['model']}, groups {about['groups'][0]} to {about['groups'][-1]}, "
                    f"{encoder.features} features",
                ),
                ("source weights", _source(spec, str(about["source"]))),
                ("in-domain corpus", _corpus(config, about, corpora)),
                ("strategy", "; ".join([strategy, *phases])),
                ("labels of the corpus", _labels(about)),
                (
                    "image size",
                    f"{about['image_size']} x {about['image_size']}, by {about.get('resize', 'squash')}",
                ),
                ("preprocessing", _preprocessing(encoder)),
                ("licence", _licence(spec)),
            ],
        ),
        "## Cost",
        _cost([row for row in records.rows if (row.strategy, row.seed) == (strategy, seed)]),
        "## Scores",
        _scores(records, strategy, seed),
        "## Use",
        *_use(encoder, about["image_size"], is_whole=is_whole),
        "StableHLO, any batch size, normalisation inside (uint8 in, pooled features out):",
        _code(
            "program = jax.export.deserialize(open('encoder.stablehlo', 'rb').read())",
            "features = program.call(images)",
        ),
        "In dapt_jax: `--config.weights=PATH` with any `.safetensors` file here, or the folder `orbax`.",
        "Parity: of the pooled features of the image `x[i, j, k] = (3 i + 5 j + 7 k) mod 256`, uint8, "
        "the largest are "
        + ", ".join(f"[{at}] = {value:.6g}" for at, value in largest.items())
        + ". Others in another framework mean that a kernel is transposed there, "
        "or that it normalises otherwise.",
        "A research tool: not a medical device.",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _source(spec: str, source: str) -> str:
    place, shown = locate.Address.of(spec).place, redact(spec)
    if zoo.is_name(place):
        return f"`{shown}` ({zoo.entry(place).citation}); {source}"
    return f"`{shown}`; {source}"


def _licence(spec: str) -> str:
    place = locate.Address.of(spec).place
    return (
        f"source weights: {zoo.entry(place).licence}"
        if zoo.is_name(place)
        else "as the source weights and the corpus allow"
    )


def _corpus(config: Mapping[str, Any], about: Mapping[str, Any], names: Sequence[str]) -> str:
    images = about.get("images")
    count = f"{images:,} images, " if isinstance(images, int) else ""
    labels = f"classes {', '.join(about['classes'])}" if about.get("classes") else "labels not used"
    last = f" of the last of {len(names)}" if len(names) > 1 else ""
    return f"{count}{labels}{last}; {'; then '.join(_settings_of_corpus(config, name) for name in names)}"


def _settings_of_corpus(config: Mapping[str, Any], name: str) -> str:
    corpus = (config["corpora"][name] if name else config.get("corpus")) or {}
    told = ", ".join(
        f"{key} {value}" for key, value in corpus.items() if key not in ("val_fraction",) and value != ""
    )
    digests = (config.get("contents") or {}).get(f"corpora.{name}" if name else "corpus") or {}
    images = digests.get("images") or (config.get("images") or {}).get(name or "corpus")
    return told + (f"; fingerprint `{images}`" if images else "")


def _labels(about: Mapping[str, Any]) -> str:
    """Return what labels were used for; arms of earlier versions were supervised."""
    if about.get("label_free"):
        return f"label-free ({about['objective']}): no label touched training, stopping or choice"
    if about.get("objective", SUPERVISED) != SUPERVISED:
        return (
            f"not used in training ({about['objective']}), but labels of a target task in stopping or choice"
        )
    return "used in training"


def _preprocessing(encoder: Encoder) -> str:
    return normalisation.describe(encoder.preprocess) + ("" if encoder.preprocess.bgr else ", red first")


def _cost(rows: Sequence[Any]) -> str:
    if not rows:
        return "The ledger holds no row of this arm."
    adapting = [row for row in rows if row.stage == "dapt"]
    lines = []
    for row in adapting:
        flops = number((row.model_flops + row.reused_flops) / 1e12)
        lines.append((row.phase, f"{row.steps:,}", f"{row.images:,}", flops, f"{row.trainable_params:,}"))
    cost = Cost.of(adapting)
    device = ", ".join(dict.fromkeys(f"{row.devices} x {row.device}" for row in adapting))
    total = (
        f"In all {number(cost.total_flops / 1e12)} TFLOP, {cost.wall_s:,.0f} s on {device}, {cost.kwh:.3g} "
        f"kWh ({', '.join(dict.fromkeys(row.energy_source for row in adapting)) or 'not measured'})."
    )
    return _table(("phase", "steps", "images", "model TFLOP", "trainable parameters"), lines) + f"\n\n{total}"


def _scores(records: Records, strategy: str, seed: int) -> str:
    found = [
        row
        for row in records.results
        if (row["strategy"], row["seed"]) == (strategy, seed)
        and "/" not in row["metric"]
        and row["value"] is not None
    ]
    if not found:
        return "None yet: this arm has not been measured on a target task."
    rows = [
        (
            row["task"],
            row["split"],
            row["protocol"],
            records.display_name(row["task"], row["metric"]),
            f"{row['value']:.4f}",
            str(row.get("n", "")),
        )
        for row in found
    ]
    note = "One seed; the study's report compares strategies over all of its seeds."
    return _table(("task", "set", "protocol", "metric", "value", "images"), rows) + f"\n\n{note}"


def _use(encoder: Encoder, side: int, *, is_whole: bool) -> list[str]:
    parts = []
    for library in export.libraries(encoder, side):
        parts.append(f"{library.name} (`import {library.name}, safetensors.torch`):")
        parts.append(_code(library.snippet(encoder, side, is_whole=is_whole)))
    return parts or [
        f"No PyTorch library builds this variant for {side} x {side} pixels: its weights are in "
        "`encoder.safetensors` and `orbax`."
    ]
