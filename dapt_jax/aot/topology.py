"""TPU topologies: PyPI's `libtpu` describes them and compiles for them on any Linux machine."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, nearest

LIBTPU = "libtpu==0.0.42.1"
"""Version for jax 0.10.2: jax's extra `tpu` names the one for each release."""

_LIBRARY = "TPU_LIBRARY_PATH"


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A TPU generation.

    Holds the shapes that Cloud TPU offers, the chips in its largest slice, and how JAX exposes a chip.
    """

    shapes: tuple[str, ...]
    most: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_CHIPS = {
    # Both cores of a chip are one device, as in JAX on a v4 machine.
    "v4": _Chip((*_DEEP, "16x16x16"), 4096, {"chip_config_name": "megacore"}),
    "v5e": _Chip(_FLAT, 256),
    "v5p": _Chip((*_DEEP, "16x16x24"), 6144),
    "v6e": _Chip(_FLAT, 256),
}


def set_up() -> None:
    """Prepare this process to compile for TPUs; call it before JAX initialises its devices.

    The process itself computes on the CPU, whatever else is available. libtpu is loaded from
    `TPU_LIBRARY_PATH`, or else from the environment's packages; it is prevented from querying a cloud's
    metadata server for the machine type, and from failing because another process has it open.

    Raises:
        UserError: The library libtpu is not installed.
    """
    library = os.environ.get(_LIBRARY, "")
    how = (
        f"expected pip install --no-deps --target FOLDER '{LIBTPU}', then {_LIBRARY}=FOLDER/libtpu/libtpu.so "
        "(Linux on x86-64)"
    )
    if library and not Path(library).is_file():
        raise UserError(f"{_LIBRARY} is {library!r}, which is no file; {how}")
    if not library and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"mode=aot compiles with libtpu, which is not installed; {how}")
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        (
            "TPU_ACCELERATOR_TYPE",
            "v5litepod-8",
        ),  # a nominal type for this machine, which has no TPU: it only keeps libtpu from querying the server
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_LOG_DIR", "disabled"),
    ):
        os.environ.setdefault(name, value)


def version() -> str:
    """Return the version of the libtpu in use; empty where its folder does not give one."""
    library = os.environ.get(_LIBRARY, "")
    spec = importlib.util.find_spec("libtpu") if not library else None
    folder = Path(library or (spec.origin if spec and spec.origin else ".")).parent.parent
    found = sorted(folder.glob("libtpu-*.dist-info"))
    return found[-1].name.removeprefix("libtpu-").removesuffix(".dist-info") if found else ""


def devices(name: str) -> list[Any]:
    """Return the devices of a topology to compile for.

    Args:
        name: Topology `CHIP:SHAPE`, such as `v5e:2x4`, `v6e:4x4`, `v4:2x2x2` or `v5p:2x2x4`: chips along each
            axis.

    Returns:
        A device for each chip, in libtpu's order.

    Raises:
        UserError: The chip does not exist, or no slice has such a shape.
    """
    chip, colon, shape = name.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"aot.topology is {name!r}; expected CHIP:SHAPE, such as v5e:2x4, v6e:4x4, v4:2x2x2 or v5p:2x2x4"
        )
    if chip not in _CHIPS:
        raise UserError(f"aot.topology is {name!r}: no chip {chip!r}; {nearest(chip, _CHIPS)}")
    known = _CHIPS[chip]
    sizes = [int(size) for size in shape.split("x")]
    valid = f"expected {chip}:{f' or {chip}:'.join(known.shapes)}"
    chips = 1
    for size in sizes:
        chips *= size
    if not 0 < chips <= known.most or len(sizes) != known.shapes[0].count("x") + 1:
        raise UserError(f"aot.topology is {name!r}, which no slice of {chip} has; {valid}")
    options = dict(known.options)
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    import jax
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition(": ")[2].partition("\n")[0] or str(error)
        raise UserError(f"aot.topology is {name!r}, which libtpu refuses ({said}); {valid}") from error
    except RuntimeError as error:
        raise UserError(
            f"libtpu cannot be used ({error}); jax {jax.__version__} goes with {LIBTPU}"
        ) from error
    return list(found.devices)
