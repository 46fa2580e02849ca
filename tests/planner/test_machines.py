"""Names of machines as they are rented, and the rates of their links."""

from types import SimpleNamespace

import pytest

from helios_jax.config import ConfigError
from helios_jax.planner.machines import GRIDS, machine


@pytest.mark.parametrize(
    ("name", "chips", "grid", "hosts"),
    [
        ("v6e-256", 256, (16, 16), 64),
        ("v5e-8", 8, (2, 4), 2),
        ("v5litepod-64", 64, (8, 8), 16),
        ("v5p-128", 64, (4, 4, 4), 16),  # cores
        ("V5P-8", 4, (2, 2, 1), 1),
        ("v5p:4x4x8", 128, (4, 4, 8), 32),
        ("2*v5p-128", 128, (4, 4, 4), 32),
        ("4xv6e-64", 256, (8, 8), 64),
        ("one H100", 1, (1, 1), 1),
        ("H100", 1, (1, 1), 1),
        ("H100x8", 8, (1, 8), 1),
        ("16xH200", 16, (2, 8), 2),
        ("8 H100", 8, (1, 8), 1),
    ],
)
def test_names(name, chips, grid, hosts):
    found = machine(name)
    assert (found.count, found.grid, found.hosts) == (chips, grid, hosts)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tpu", "v6e-256"),
        ("v7x-64", "v6e-256"),
        ("v5p-256x", "v5p-256?"),
        ("v6e-48", "v6e-64"),
        ("v5p-127", "v5p-128"),
        ("v6e:4x4x4", "2 sides"),
        ("H100x12", "hosts of 8"),
        ("H100x0", "hosts of 8"),
        ("0*v5p-128", "1 to 65536"),
        ("0*v5e:4x4", "1 to 65536"),
        ("9999*v5p-128", "1 to 65536"),
        ("v5p:x", "v6e-256"),
        (f"H100x{'9' * 5000}", "v6e-256"),
    ],
)
def test_an_unknown_machine_is_refused_in_one_line(name, remedy):
    with pytest.raises(ConfigError, match=r"--topology") as error:
        machine(name)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


def test_grids_have_their_chips():
    for kind, grids in GRIDS.items():
        for chips in grids:
            assert machine(f"{kind}:{grids[chips]}").count == chips


def at(*coords, slice_index=0, process_index=0):
    return SimpleNamespace(coords=coords, slice_index=slice_index, process_index=process_index)


def test_more_sides_and_rings_carry_more():
    pod = machine("v5p-128")
    order = [at(x, y, 0) for x in range(4) for y in range(4)]
    link = pod.chip.link
    assert pod.link_rate((0, 1, 2, 3), order) == 2 * link  # a ring along one side
    assert pod.link_rate(tuple(range(16)), order) == 4 * link
    small = machine("v6e-64")  # its sides of 8 are open
    assert small.link_rate((0, 1), [at(0, 0), at(0, 1)]) == small.chip.link


def test_a_part_of_a_side_is_no_ring_and_groups_between_each_other_share_links():
    pod = machine("v6e-256")
    order, link = [at(x, 0) for x in range(16)], pod.chip.link
    assert pod.link_rate(tuple(range(16)), order) == 2 * link
    assert pod.link_rate((0, 1, 2, 3), order) == link
    assert pod.link_rate((0, 4, 8, 12), order) == 2 * link / 4
    open_side = [at(x, 0) for x in range(8)]
    assert machine("v6e-64").link_rate((0, 4), open_side) == link / 4


def test_axes_of_a_mesh_have_the_rates_of_their_places():
    pod = machine("v6e-256")
    whole = {"data": 16, "fsdp": 16, "tensor": 1, "context": 1}
    assert pod.axis_rate(whole, "data") == pod.axis_rate(whole, "fsdp") == 2 * pod.chip.link
    part = {"data": 4, "fsdp": 16, "tensor": 4, "context": 1}
    assert pod.axis_rate(part, "fsdp") == 2 * pod.chip.link
    assert pod.axis_rate(part, "tensor") == pod.chip.link
    assert pod.axis_rate(part, "data") == 2 * pod.chip.link / 4


def test_slices_and_hosts_are_joined_by_slower_networks():
    two = machine("2*v5p-128")
    order = [at(0, 0, 0), at(0, 0, 0, slice_index=1)]
    assert two.link_rate((0, 1), order) == two.chip.network
    assert two.axis_rate({"data": 2, "fsdp": 64, "tensor": 1, "context": 1}, "data") == two.chip.network
    hosts = machine("H100x16")
    order = [at(process_index=i // 8) for i in range(16)]
    assert hosts.link_rate(tuple(range(8)), order) == hosts.chip.link
    assert hosts.link_rate((0, 8), order) == hosts.chip.network
    assert hosts.link_rate(tuple(range(16)), order) == 8 * hosts.chip.network
    mesh = {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}
    assert hosts.axis_rate(mesh, "fsdp") == hosts.chip.link
    assert hosts.axis_rate(mesh, "data") == hosts.chip.network
