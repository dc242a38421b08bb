"""Collectives and traffic read off compiled programs: against arrays whose size is known."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.aot import collectives
from dapt_jax.aot.collectives import Collective, Total
from dapt_jax.aot.hlo import Program
from tests.command import ROOT

DEVICES = 8
PROGRAMS = """
    import json
    import jax, jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, PartitionSpec as P
    from dapt_jax.aot import collectives
    from dapt_jax.aot.hlo import Program

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def look(body, *shapes, split=P(("a", "b")), out=P(("a", "b"))):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=out, check_vma=False)
        text = jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()
        found = collectives.of_program(Program.parse(text))
        return [[each.kind, each.bytes, each.group, each.count] for each in found]

    def loop(x):
        return lax.fori_loop(0, 5, lambda _, x: lax.psum(x, ("a", "b")) / 8, x)

    def scan_in_scan(x):
        def outer(x, _):
            return lax.scan(lambda x, _: (lax.psum(x, "a") / 4, None), x, length=3)[0], None
        return lax.scan(outer, x, length=7)[0]

    def endless(x):
        return lax.while_loop(lambda x: x.sum() > 1, lambda x: lax.psum(x, ("a", "b")) / 9, x)

    print(json.dumps({
        "psum": look(lambda x: lax.psum(x, ("a", "b")), (64, 3), out=P()),
        "psum of one axis": look(lambda x: lax.psum(x, "b"), (64, 3)),
        "two arrays": look(lambda x, y: lax.psum((x, y), ("a", "b")), (64, 3), (16, 5), out=P()),
        "gather": look(lambda x: lax.all_gather(x, "a", tiled=True), (64, 3)),
        "scatter": look(lambda x: lax.psum_scatter(x, ("a", "b"), tiled=True), (64, 3)),
        "to all": look(lambda x: lax.all_to_all(x, "a", 0, 0, tiled=True), (64, 3)),
        "permute": look(lambda x: lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)]), (64, 3)),
        "loop": look(loop, (64, 3)),
        "loops": look(scan_in_scan, (64, 3)),
        "endless": look(endless, (64, 3)),
        "none": look(lambda x: x @ x.T, (64, 3)),
    }))
"""
ROWS = 64 // DEVICES * 3 * 4
"""Bytes that each device holds of 64 x 3 float32."""


@pytest.fixture(scope="module")
def looked():
    """What is found in programs for eight devices, which a process of its own has."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAMS)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "JAX_PLATFORMS": "cpu",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EXPECTED = {
    "psum": [("all-reduce", ROWS, 8, 1)],
    "psum of one axis": [("all-reduce", ROWS, 2, 1)],
    "two arrays": [("all-reduce", ROWS + 2 * 5 * 4, 8, 1)],
    "gather": [("all-gather", 4 * ROWS, 4, 1)],
    "scatter": [("reduce-scatter", ROWS, 8, 1)],
    "to all": [("all-to-all", ROWS, 4, 1)],
    "permute": [("collective-permute", ROWS, 8, 1)],
    "loop": [("all-reduce", ROWS, 8, 5)],
    "loops": [("all-reduce", ROWS, 4, 21)],
    "endless": [("all-reduce", ROWS, 8, 1)],
    "none": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_kind_bytes_group_and_count_are_those_of_the_arrays(looked, name):
    found = [tuple(each) for each in looked[name]]
    if name == "two arrays":  # whether they travel together is the compiler's choice
        assert {each[0] for each in found} == {"all-reduce"}
        assert sum(each[1] for each in found) == EXPECTED[name][0][1]
    elif name == "permute":
        assert [each[:2] for each in found] == [each[:2] for each in EXPECTED[name]]
    else:
        assert found == EXPECTED[name]


# What a TPU's compiler writes, in small.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%scattered (input: f32[64,16]) -> f32[8,16] {
  %input = f32[64,16]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[64,16]{1,0:T(8,128)} all-reduce(%input), channel_id=11, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = f32[8,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %id, %zero), dynamic_slice_sizes={8,16}
}

%begun (p: bf16[96,768]) -> bf16[768,768] {
  %p = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[768,768]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['x'=8,'y'=1] {'x'}, dimensions={0}
}

%ended (q: bf16[96,768]) -> bf16[768,768] {
  %q = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, replica_groups=mesh['x'=8,'y'=1] {'x'}, dimensions={0}
}

%sent (r: f32[32]) -> f32[8] {
  %r = f32[32]{0:T(128)} parameter(0)
  ROOT %reduce-scatter.1 = f32[8]{0:T(128)} reduce-scatter(%r), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
}

%sliced (whole: f32[1000,4], at: s32[]) -> f32[1,4] {
  %whole = f32[1000,4]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %nought = s32[] constant(0)
  ROOT %row = f32[1,4]{1,0:T(8,128)} dynamic-slice(%whole, %at, %nought), dynamic_slice_sizes={1,4}
}

ENTRY %main (x: f32[8], g: f32[64,16], w: bf16[96,768], v: f32[32], table: f32[1000,4], at: s32[]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %g = f32[64,16]{1,0:T(8,128)S(1)} parameter(1)
  %w = bf16[96,768]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %v = f32[32]{0:T(128)S(1)} parameter(3)
  %table = f32[1000,4]{1,0:T(8,128)} parameter(4)
  %at = s32[]{:T(128)S(2)} parameter(5)
  %fusion.1 = f32[8,16]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%scattered
  %fusion.2 = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%begun
  %fusion.3 = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%ended
  %begin = ((f32[32]{0:T(128)S(1)}), f32[8]{0:T(128)S(1)}, u32[]{:S(2)}) async-start(%v), calls=%sent
  %end = f32[8]{0:T(128)S(1)} async-done(%begin)
  %gather-start = (f32[8]{0:T(128)S(1)}, f32[64]{0:T(128)S(1)}) all-gather-start(%end), channel_id=9, replica_groups={}, dimensions={0}
  %gather-done = f32[64]{0:T(128)S(1)} all-gather-done(%gather-start)
  %copy-start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8]{0:T(128)S(1)} copy-done(%copy-start)
  %fusion.4 = f32[1,4]{1,0:T(8,128)S(1)} fusion(%table, %at), kind=kLoop, calls=%sliced
  ROOT %result = f32[8]{0:T(128)} add(%copy-done, %end)
}
"""  # noqa: E501


def test_what_a_tpu_compiler_spreads_over_fusions_counts_once():
    found = collectives.of_program(Program.parse(TPU))
    assert found == [
        Collective("reduce-scatter", 64 * 16 * 4, 8),  # an all-reduce of which each keeps a slice
        Collective("all-gather", 768 * 768 * 2, 8),  # in two fusions, one channel
        Collective("reduce-scatter", 32 * 4, 4),  # begun and ended
        Collective("all-gather", 64 * 4, 8),
    ]
    assert collectives.totals(found) == [
        Total("all-gather", 2, 768 * 768 * 2 + 64 * 4),
        Total("reduce-scatter", 2, 64 * 16 * 4 + 32 * 4),
    ]


def test_traffic_is_of_the_arrays_in_the_device_s_memory_alone():
    # x is copied onto the chip, a row of the table is read, the result is written; all else stays on the
    # chip.
    assert Program.parse(TPU).memory_bytes == 8 * 4 + 4 * 4 + 8 * 4


@given(st.sampled_from(collectives.KINDS), st.integers(0, 1 << 40), st.integers(1, 4096), st.integers(1, 100))
def test_no_device_sends_more_than_twice_what_there_is_and_alone_reduces_for_nothing(
    kind, size, group, count
):
    one = Collective(kind, size, group, count)
    assert 0 <= one.sent <= 2 * size * count
    if group == 1 and kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        assert one.sent == 0
    both = (
        Collective("all-gather", size, group, count).sent
        + Collective("reduce-scatter", size, group, count).sent
    )
    assert Collective("all-reduce", size, group, count).sent == pytest.approx(both)


LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (carried: (f32[32], s32[])) -> (f32[32], s32[]) {
  %carried = (f32[32]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %step = s32[]{:T(128)} constant(STEP)
  %x = f32[32]{0:T(128)} get-tuple-element(%carried), index=0
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=1
  %next = s32[]{:T(128)} add(%i, %step)
  %all-reduce = f32[32]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %tuple.1 = (f32[32]{0:T(128)}, s32[]{:T(128)}) tuple(%all-reduce, %next)
}

%condition (seen: (f32[32], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} LIMIT
  %seen = (f32[32]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%seen), index=1
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (y: f32[32]) -> f32[32] {
  %y = f32[32]{0:T(128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%start)
  %tuple.2 = (f32[32]{0:T(128)}, s32[]{:T(128)}) tuple(%y, %copied)
  %while = (f32[32]{0:T(128)}, s32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = f32[32]{0:T(128)} get-tuple-element(%while), index=0
}
"""


@given(st.integers(-5, 20), st.integers(-5, 60), st.integers(1, 9))
def test_the_trips_of_a_loop_are_those_of_its_counter(start, stop, step):
    text = LOOP.replace("START", str(start)).replace("LIMIT", f"constant({stop})").replace("STEP", str(step))
    program = Program.parse(text)
    assert collectives.of_program(program) == [
        Collective("all-reduce", 32 * 4, 2, len(range(start, stop, step)))
    ]
    assert program.unknown_loops == 0


def test_a_loop_to_a_limit_that_is_computed_counts_once_and_is_told():
    text = LOOP.replace("START", "0").replace("LIMIT", "custom-call()").replace("STEP", "1")
    program = Program.parse(text)
    assert collectives.of_program(program) == [Collective("all-reduce", 32 * 4, 2, 1)]
    assert program.unknown_loops == 1
