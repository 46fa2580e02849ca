"""The reader of compiled programs: loops, products, kernels, traffic and collectives."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax.planner import cost, hlo, hlo_flops, traffic
from helios_jax.planner.collectives import collective
from helios_jax.planner.machines import machine
from tests.planner import programs
from tests.planner.test_machines import at

POD = machine("v5p-128")
ORDER = [at(x, y, 0) for x in range(4) for y in range(4)]


def spent(text: str) -> cost.Cost:
    return cost.cost(hlo.parse(text), POD, ORDER)


def test_loops_count_as_often_as_they_run():
    module = hlo.parse(programs.LOOPS)
    inner = module.computations["outer_body"].instructions["inner"]
    outer = module.computations["main"].instructions["outer"]
    assert (module.trips(inner), module.trips(outer)) == (5, 3)
    found = spent(programs.LOOPS)
    assert found.flops == {"products": 3 * 5 * 2 * 4 * 16 * 8}
    # Of the stacked weights each product reads one of five.
    assert found.bytes["main memory"] == 3 * 5 * (4 * (8 * 16 + 4 * 8 + 4 * 16) + 4 + 9) + 3 * (4 + 128 + 2560 + 1)


def test_a_fusion_beside_other_work_costs_what_it_does():
    """Its result holds its operands, too."""
    fusion = "%product = f32[4,16]{1,0} fusion(%w.1, %i.1, %x.1), kind=kOutput, calls=%fused"
    start = """%start = ((f32[5,8,16]{2,1,0}, s32[], f32[4,8]{1,0}), f32[4,16]{1,0}, u32[]) \
fusion-start(%w.1, %i.1, %x.1), kind=kOutput, calls=%fused
  %product = f32[4,16]{1,0} fusion-done(%start)"""
    assert fusion in programs.LOOPS
    found, expected = spent(programs.LOOPS.replace(fusion, start)), spent(programs.LOOPS)
    assert (found.flops, found.bytes) == (expected.flops, expected.bytes)


def test_a_loop_of_unknown_length_is_told():
    text = programs.LOOPS.replace('"known_trip_count":{"n":"3"}', "")
    found = spent(text)
    assert found.flops == {"products": 5 * 2 * 4 * 16 * 8}
    assert any("loops" in name for name in found.unknown)


def test_attention_kernels_are_known_and_others_named():
    module = hlo.parse(programs.KERNEL)
    main = module.computations["main"]
    kernel = main.instructions["splash_mha_fwd_residuals.2"]
    forward = 2 * 2 * (2 * 40 * 256 * 128) * 512
    assert hlo_flops.flops(module, main, kernel) == forward
    found = spent(programs.KERNEL)
    assert found.flops == {"attention": forward}
    assert list(found.unknown) == ["operations of kernel norm_rope"]
    # The keys lie in on-chip memory.
    assert traffic.traffic(module, main, kernel) == 2 * 2 * 40 * 256 * 128 * 2 + 4 * 2 * 256 * 128


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        # A plain product, as TPUs write it.
        (("f32[4,8]{1,0}", "f32[8,16]{1,0}", "f32[4,16]{1,0}", "dim_labels=bf_io->bf"), 2 * 4 * 8 * 16),
        # A product of 20 matrices as a convolution with holes.
        (
            (
                "f32[20,4,8]{2,1,0}",
                "f32[20,16,8]{2,1,0}",
                "f32[20,4,16]{2,1,0}",
                "window={size=20 stride=19 lhs_dilate=20}, dim_labels=0bf_0oi->0bf",
            ),
            20 * 2 * 4 * 8 * 16,
        ),
        # Heads as a window over one input between padding.
        (
            (
                "f32[2,9,8,1]{3,2,1,0}",
                "f32[8,40,16,1]{3,2,1,0}",
                "f32[2,9,40,16]{3,2,1,0}",
                "window={size=1x40 pad=0_0x39_39 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            ),
            2 * 2 * 9 * 8 * 40 * 16,
        ),
        # A convolution of images, three by three with padding: at each edge a third is missing.
        (
            (
                "f32[1,6,6,3]{3,2,1,0}",
                "f32[3,3,3,5]{3,2,1,0}",
                "f32[1,6,6,5]{3,2,1,0}",
                "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            ),
            2 * 3 * 5 * 16 * 16,
        ),
    ],
)
def test_convolutions(program, expected):
    assert spent(programs.convolution(*program)).flops == {"products": expected}


@pytest.mark.parametrize(
    ("line", "received"),
    [
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 3 / 4),
        ("all-reduce(%x), replica_groups=[4,4]<=[16], to_apply=%add", 2 * 3 / 4),
        ("reduce-scatter(%x), replica_groups=[1,16]<=[16], to_apply=%add", 15),
        ("all-to-all(%x), replica_groups=[2,8]<=[4,4]T(1,0), dimensions={0}", 7 / 8),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 1),
        ("all-gather(%x), replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'a'}, dimensions={0}", 3 / 4),
    ],
)
def test_collectives_of_every_kind(line, received):
    found = spent(programs.collectives(f"%c = f32[1024,1024]{{1,0}} {line}"))
    kind = line.partition("(")[0]
    assert found.runs == {kind: 1}
    assert found.received == pytest.approx({kind: received * 4 * 2**20})
    assert found.overlapped == {}


def test_groups_of_one_device_are_no_collectives():
    assert spent(programs.collectives("%c = f32[1024,1024]{1,0} all-reduce(%x), replica_groups={{0},{1}}")).runs == {}


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups=[4,4]<=[16]", (0, 1, 2, 3)),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("replica_groups=mesh['a'=4,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=4] {'a'}", (0, 4, 8, 12)),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups={{3,7},{0,1}}", (3, 7)),
    ],
)
def test_groups(groups, first):
    module = hlo.parse(programs.collectives(f"%c = f32[1024,1024]{{1,0}} all-reduce(%x), {groups}"))
    main = module.computations["main"]
    found = collective(module, main, main.instructions["c"])
    assert found is not None
    assert found.group == first


START = "%s = (f32[256,1024], f32[1024,1024]) all-gather-start(%x), replica_groups=[4,4]<=[16], dimensions={0}"

DONE = "%d = f32[1024,1024]{1,0} all-gather-done(%s)"
PRODUCT = "%p = f32[1024,1024]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def test_work_between_start_and_done_hides_a_collective():
    beside, behind = (spent(programs.collectives(*lines)) for lines in ((START, PRODUCT, DONE), (START, DONE, PRODUCT)))
    size = 3 / 4 * 4 * 2**20
    assert beside.received == behind.received == {"all-gather": size}
    assert behind.overlapped == {}
    assert behind.bound["collectives"] == pytest.approx(size / (2 * POD.chip.link))
    assert beside.overlapped == {"all-gather": size}
    hidden = beside.hidden["collectives"]
    assert hidden == pytest.approx(3 * 4 * 2**20 / (POD.chip.bandwidth * POD.chip.efficiency[2]))  # the product's
    assert beside.expected["collectives"] == pytest.approx(behind.expected["collectives"] - hidden)


ASYNC = """HloModule m

%begin (a: f32[64,1024]) -> (f32[64,1024], f32[1024,1024], u32[]) {
  %a = f32[64,1024]{1,0} parameter(0)
  %g = f32[1024,1024]{1,0} all-gather(%a), channel_id=7, replica_groups=[4,16]<=[64], dimensions={0}
  ROOT %s = (f32[64,1024]{1,0}, f32[1024,1024]{1,0}, u32[]{:S(2)}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (b: f32[64,1024], c: f32[1024,1024], d: u32[], e: f32[512,512]) -> \
(f32[512,512], f32[64,1024], f32[1024,1024], f32[1024,1024], u32[]) {
  %b = f32[64,1024]{1,0} parameter(0)
  %c = f32[1024,1024]{1,0} parameter(1)
  %d = u32[]{:S(2)} parameter(2)
  %e = f32[512,512]{1,0} parameter(3)
  %p = f32[512,512]{1,0} dot(%e, %e), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %h = f32[1024,1024]{1,0} all-gather(%b), channel_id=7, replica_groups=[4,16]<=[64], dimensions={0}
  ROOT %t = (f32[512,512]{1,0}, f32[64,1024]{1,0}, f32[1024,1024]{1,0}, f32[1024,1024]{1,0}, u32[]{:S(2)}) \
tuple(%p, %b, %c, %h, %d)
}

%end (i: f32[1024,1024], j: u32[]) -> f32[1024,1024] {
  %i = f32[1024,1024]{1,0} parameter(0)
  %j = u32[]{:S(2)} parameter(1)
  %k = f32[1024,1024]{1,0} all-gather(%i), channel_id=7, replica_groups=[4,16]<=[64], dimensions={0}
  ROOT %l = f32[1024,1024]{1,0} custom-call(%i, %k, %j), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[64,1024], y: f32[512,512]) -> f32[1024,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %y = f32[512,512]{1,0} parameter(1)
  %start = (f32[64,1024]{1,0}, f32[1024,1024]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
  %x1 = f32[64,1024]{1,0} get-tuple-element(%start), index=0
  %y1 = f32[1024,1024]{1,0} get-tuple-element(%start), index=1
  %z1 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %step = (f32[512,512]{1,0}, f32[64,1024]{1,0}, f32[1024,1024]{1,0}, f32[1024,1024]{1,0}, u32[]{:S(2)}) \
fusion(%x1, %y1, %z1, %y), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), \
{4}: (2, {})}, calls=%async_collective_fusion.1
  %y2 = f32[1024,1024]{1,0} get-tuple-element(%step), index=3
  %z2 = u32[]{:S(2)} get-tuple-element(%step), index=4
  ROOT %done = f32[1024,1024]{1,0} fusion(%y2, %z2), kind=kCustom, calls=%end
}
"""


def test_a_collective_in_fusions_with_other_work_counts_once_and_beside_it():
    found = spent(ASYNC)
    assert found.runs == {"all-gather": 1}
    assert found.received == found.overlapped == {"all-gather": 15 / 16 * 4 * 2**20}
    assert found.flops == {"products": 2 * 512**3}
    assert found.bytes == {"main memory": 2 * 4 * 512**2}  # of the product alone
    assert found.hidden["collectives"] > 0


def test_of_branches_the_most_expensive_counts():
    text = """HloModule m

%small (a: f32[8,8]) -> f32[8,8] {
  ROOT %a = f32[8,8]{1,0} parameter(0)
}

%large (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  ROOT %dot = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (i: s32[], x: f32[8,8]) -> f32[8,8] {
  %i = s32[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%i, %x, %x), branch_computations={%small, %large}
}
"""
    assert spent(text).flops == {"products": 2 * 8**3}


def test_a_program_of_xla_is_read():
    """A scan of three layers with its gradient, which runs three products for each of the forward pass's."""

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return (x**2).sum()

    shapes = (jax.ShapeDtypeStruct((3, 64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32))
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    found = spent(program.as_text())
    assert found.flops["products"] == 3 * 3 * 2 * 32 * 64 * 64
    assert not found.unknown


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule m\n")


def test_a_slice_in_a_fusion_of_a_fusion_is_read_alone():
    text = """HloModule m

%inner (p: f32[5,8,16], i: s32[]) -> f32[1,8,16] {
  %p = f32[5,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8,16]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%outer (q: f32[5,8,16], j: s32[]) -> f32[1,8,16] {
  %q = f32[5,8,16]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %view = f32[5,8,16]{2,1,0} bitcast(%q)
  %nested = f32[1,8,16]{2,1,0} fusion(%view, %j), kind=kLoop, calls=%inner
  ROOT %negative = f32[1,8,16]{2,1,0} negate(%nested)
}

ENTRY %main (x: f32[5,8,16], k: s32[]) -> f32[1,8,16] {
  %x = f32[5,8,16]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %made = f32[1,8,16]{2,1,0} fusion(%x, %k), kind=kLoop, calls=%outer
}
"""
    assert spent(text).bytes["main memory"] == 2 * 4 * 8 * 16 + 4
