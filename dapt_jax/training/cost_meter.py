"""Seconds and energy of one ledger row; part of every checkpoint."""

import dataclasses
from typing import Any

from dapt_jax.cost.clock import NAMES, Clock
from dapt_jax.cost.energy import EnergyMeter
from dapt_jax.cost.hardware import Hardware
from dapt_jax.cost.memory import device_peak_bytes
from dapt_jax.records.ledger import Row


class CostMeter:
    """A clock and an energy meter that start together."""

    def __init__(self, hardware: Hardware, state: dict[str, Any] | None = None):
        """Start at zero, or resume from a checkpoint's state.

        Args:
            hardware: Devices that run the phase.
            state: What `state` returned before a restart.
        """
        self._hardware = hardware
        self.clock = Clock.from_state(state["clock"]) if state else Clock()
        self._energy = EnergyMeter.from_state(state["energy"], hardware) if state else EnergyMeter(hardware)
        self._energy.start()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        self._energy.sample()
        return {"clock": self.clock.state(), "energy": self._energy.state()}

    def spent(self) -> dict[str, float]:
        """Return seconds and kWh so far."""
        self._energy.sample()
        return {"wall_s": self.clock.wall, "energy_kwh": self._energy.kwh}

    def finalize(self, row: Row) -> Row:
        """Return the row with the current seconds, energy, memory and device."""
        self._energy.sample()
        seconds = self.clock.seconds()
        parts: dict[str, Any] = {f"{name}_s": spent for name, spent in seconds.items() if name != "other"}
        return dataclasses.replace(
            row,
            **parts,
            wall_s=sum(seconds.values()),
            peak_bytes=device_peak_bytes()[0],
            device=self._hardware.kind,
            devices=self._hardware.count,
            energy_kwh=self._energy.kwh,
            energy_source=self._energy.source,
        )


def state_of_row(row: Row) -> dict[str, Any]:
    """Return the meter state of a written row, to resume from it."""
    clock = {name: getattr(row, f"{name}_s") for name in NAMES if name != "other"}
    clock["other"] = max(row.wall_s - sum(clock.values()), 0.0)
    return {"clock": clock, "energy": {row.energy_source: row.energy_kwh}}
