"""Weights of another study: `run:WORKDIR@strategy=full,seed=0,epoch=50`.

A study leaves, in `checkpoints/STRATEGY-seedSEED`, the encoder that it hands over (`ADAPTED`) and those that
`adapt.checkpoints` keeps (`EPOCHS`). A reference names one of them, or all kept ones.
"""

import dataclasses
import json
import re
from pathlib import Path

from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import home

SCHEME = "run:"
ALL, BEST, LAST = "all", "best", "last"
ADAPTED = "adapted.safetensors"
"""Name of the file, in an arm's folder, that says its adaptation is finished."""

ABOUT = "adapted.json"
"""Name of the file beside it that says how it came about."""

EPOCHS = "epochs"
"""Folder, in an arm's, of the encoders that are kept of its epochs."""

EXAMPLE = "run:WORKDIR@strategy=full,seed=0,epoch=50"
_KEYS = ("strategy", "seed", "epoch")


def epoch_file(epochs: int) -> str:
    """Return the name of the file of the encoder after a number of epochs.

    >>> epoch_file(50)
    'epoch0050.safetensors'
    """
    return f"epoch{epochs:04d}.safetensors"


@dataclasses.dataclass(frozen=True)
class ArmFolder:
    """What a study keeps of one arm.

    Attributes:
        strategy: Name of the strategy.
        seed: Seed of the arm.
        folder: Folder of its files.
    """

    strategy: str
    seed: int
    folder: Path

    @property
    def epochs(self) -> dict[int, Path]:
        """Files of the kept encoders, by number of epochs."""
        found = {}
        for path in sorted((self.folder / EPOCHS).glob("epoch*.safetensors")):
            if match := re.fullmatch(r"epoch(\d+)\.safetensors", path.name):
                found[int(match[1])] = path
        return found

    @property
    def is_finished(self) -> bool:
        """Whether its adaptation is finished."""
        return (self.folder / ADAPTED).is_file()

    @property
    def title(self) -> str:
        """Its strategy and seed in the form of a reference."""
        return f"strategy={self.strategy},seed={self.seed}"

    def kept(self) -> str:
        """Return its available epochs as part of an error line."""
        listed = ", ".join(map(str, self.epochs)) or "none"
        words = f"kept epochs: {listed}"
        return f"{words}; epoch={BEST} is the encoder that it hands over" if self.is_finished else words


@dataclasses.dataclass(frozen=True)
class RunReference:
    """A reference to the encoders of a study.

    >>> RunReference.of("run:runs/pretraining@seed=1,epoch=50")
    RunReference(spec='run:runs/pretraining@seed=1,epoch=50', workdir='runs/pretraining', strategy='', seed='1', epoch='50')

    Attributes:
        spec: The whole reference.
        workdir: Folder of the study.
        strategy: Name of the strategy; empty where the study has one arm.
        seed: Seed of the arm; empty where the strategy has one.
        epoch: Number of epochs, `last`, `best` (what the study hands over), or `all`; empty for `best`.
    """

    spec: str
    workdir: str
    strategy: str = ""
    seed: str = ""
    epoch: str = ""

    @classmethod
    def of(cls, spec: str) -> "RunReference":
        """Parse a reference.

        Raises:
            UserError: A key or a value behind the @ is invalid.
        """
        workdir, at, selection = spec.removeprefix(SCHEME).rpartition("@")
        if not at or "=" not in selection:
            workdir, selection = spec.removeprefix(SCHEME), ""
        values: dict[str, str] = {}
        for part in selection.split(",") if selection else ():
            key, equals, value = part.partition("=")
            if key not in _KEYS or not equals or not value or key in values:
                hint = nearest(key, _KEYS) if key not in _KEYS else "each once, with a value"
                raise UserError(f"{spec}: {part!r} behind the @; {hint} (expected {EXAMPLE})")
            values[key] = value
        if "seed" in values and not values["seed"].isdecimal():
            raise UserError(f"{spec}: seed is {values['seed']!r}; expected a whole number from 0")
        epoch = values.get("epoch", "")
        if epoch and epoch not in (ALL, BEST, LAST) and not epoch.isdecimal():
            raise UserError(f"{spec}: epoch is {epoch!r}; expected a number, {BEST}, {LAST} or {ALL}")
        if not workdir:
            raise UserError(f"{spec}: no workdir; expected {EXAMPLE}")
        return cls(spec, workdir, **values)

    def arms(self) -> list[ArmFolder]:
        """Return the arms that the reference allows, in the order of their names.

        Raises:
            UserError: The workdir holds no adapted arm, or none of this strategy or seed.
        """
        root = home.expanded(self.workdir) / "checkpoints"
        found = []
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            match = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
            if match and folder.is_dir():
                arm = ArmFolder(match[1], int(match[2]), folder)
                found += [arm] if arm.is_finished or arm.epochs else []
        if not found:
            raise UserError(
                f"{self.spec}: {root} holds no adapted encoder; expected the workdir of a study that has "
                "adapted one"
            )
        if self.strategy:
            names = list(dict.fromkeys(arm.strategy for arm in found))
            if self.strategy not in names:
                raise UserError(
                    f"{self.spec}: no strategy {self.strategy!r}; {nearest(self.strategy, names)}"
                )
            found = [arm for arm in found if arm.strategy == self.strategy]
        if self.seed:
            seeds = ", ".join(str(arm.seed) for arm in found)
            found = [arm for arm in found if arm.seed == int(self.seed)]
            if not found:
                raise UserError(f"{self.spec}: no seed {self.seed}; expected one of {seeds}")
        return found

    def arm(self) -> ArmFolder:
        """Return the arm of the reference.

        Raises:
            UserError: There is none, or several; lists them.
        """
        found = self.arms()
        if len(found) > 1:
            listed = "; ".join(arm.title for arm in found)
            raise UserError(
                f"{self.spec}: {len(found)} arms ({listed}); expected one, such as "
                f"{SCHEME}{self.workdir}@{found[0].title}"
            )
        return found[0]

    def with_epoch(self, epochs: int) -> str:
        """Return the reference to one epoch of its arm."""
        return f"{SCHEME}{self.workdir}@{self.arm().title},epoch={epochs}"

    def epochs(self) -> list[int]:
        """Return the kept epochs of its arm.

        Raises:
            UserError: The arm keeps none.
        """
        arm = self.arm()
        if not arm.epochs:
            raise UserError(
                f"{self.spec}: {arm.folder / EPOCHS} holds no epoch; expected a study that ran with "
                "adapt.checkpoints or adapt.checkpoint_every"
            )
        return list(arm.epochs)

    def path(self) -> Path:
        """Return the file of the reference.

        Raises:
            UserError: There is no such file, or the reference stands for several.
        """
        arm = self.arm()
        if self.epoch == ALL:
            raise UserError(
                f"{self.spec}: {len(self.epochs())} epochs; expected one here ({arm.kept()}): "
                "custom_strategies.NAME.weights and scoring.checkpoints take all of them"
            )
        if self.epoch in ("", BEST):
            if not arm.is_finished:
                raise UserError(
                    f"{self.spec}: {arm.title} is not finished; expected the same command to be run again, "
                    f"or one of its {arm.kept()}"
                )
            return arm.folder / ADAPTED
        if self.epoch == LAST:
            return self._last(arm)
        if int(self.epoch) not in arm.epochs:
            raise UserError(f"{self.spec}: {arm.folder / EPOCHS} has no epoch {self.epoch}; {arm.kept()}")
        return arm.epochs[int(self.epoch)]

    def _last(self, arm: ArmFolder) -> Path:
        about = json.loads((arm.folder / ABOUT).read_text()) if arm.is_finished else {}
        final = about.get("epochs")
        if final is None:
            raise UserError(f"{self.spec}: its last epoch is not known; expected epoch=NUMBER, {arm.kept()}")
        if about.get("chosen_epoch") == final:
            return arm.folder / ADAPTED
        if final not in arm.epochs:
            raise UserError(
                f"{self.spec}: epoch {final}, its last, was not kept, since a score chose epoch "
                f"{about.get('chosen_epoch')}; {arm.kept()}"
            )
        return arm.epochs[final]
