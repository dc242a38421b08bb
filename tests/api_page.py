"""Makes docs/api.md from the docstrings of the public names: `python -m tests.api_page`; a test keeps it."""

import inspect
import re
from pathlib import Path

import dapt_jax as dj

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
GROUPS = {
    "Encoders and data": ("load_encoder", "list_encoders", "PretrainedEncoder", "load_dataset", "Dataset", "extract_features"),
    "Adaptation": (
        "Phase", "adaptation_run", "plan", "train", "Trained", "TrainingRun", "TrainData", "RunContext", "Callback",
        "Optimizer", "Augment", "resolve_trainable",
    ),
    "Evaluation": ("evaluate", "load_predictor", "transferability_scores", "count_flops"),
    "Studies": ("default_config", "StudySettings", "plan_study", "run_study", "score", "compare", "read_study", "UserError"),
}  # fmt: skip


def signature(name: str, value: object) -> str:
    """Return a name with its parameters, without modules in front of types."""
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        text = "(...)"
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text).replace("<factory>", "...")
    return f"dj.{name}{re.sub(r'<class .(?:[a-z_]+[.])*([A-Za-z_]+).>', r'[1]', text)}"


def page() -> str:
    """Return the page."""
    parts = [
        "# The public API",
        "",
        "`import dapt_jax as dj`. This page is made from the docstrings by `python -m tests.api_page`.",
    ]
    for title, names in GROUPS.items():
        parts += ["", f"## {title}"]
        for name in names:
            value = getattr(dj, name)
            doc = inspect.getdoc(value) or ""
            parts += [
                "",
                f"### {name}",
                "",
                "```python",
                signature(name, value),
                "```",
                "",
                "```text",
                doc,
                "```",
            ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
