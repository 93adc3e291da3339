"""The meter, here of the CPU: what is counted is known in advance."""

import torch

from support.meter import Meter


def test_kernels_and_operations_of_a_product_and_its_backward_pass() -> None:
    x, weight = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    with Meter("cpu") as meter:
        out = x @ weight
        assert (meter.kernels["mm"], meter.operations) == (1, 2 * 3 * 4 * 5)
        torch.autograd.backward(out.view(15).sum())
    assert (meter.kernels["mm"], meter.operations) == (2, 2 * 2 * 3 * 4 * 5)
    assert "view" not in meter.kernels
    assert meter.num_kernels == sum(meter.kernels.values())


def test_memory_is_what_is_alive_in_blocks_of_512_bytes() -> None:
    with Meter("cpu") as meter:
        first = torch.empty(1000)
        second = torch.empty(1)
        assert meter.live == meter.peak == 4096 + 512
        view = first[:10]
        del first
        assert meter.live == 4096 + 512
        del view, second
        assert (meter.live, meter.peak) == (0, 4096 + 512)
        meter.reset()
        assert meter.peak == 0


def test_the_host_waits_where_it_asks_for_a_value_or_a_size() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    with Meter("cpu") as meter:
        line = "test_meter.py"
        x + 1
        x[torch.tensor([0, 2])]
        assert not meter.waits
        x.sum().item()
        x.nonzero()
        x[x > 0]
        x.repeat_interleave(torch.tensor([1, 2, 1]))
        torch.equal(x, x)
    assert sum(meter.waits.values()) == 5
    assert all(line in where for where in meter.waits)
    assert {where.split()[-1] for where in meter.waits} == {
        "_local_scalar_dense",
        "nonzero",
        "index",
        "repeat_interleave",
        "equal",
    }


def test_another_device_is_not_counted() -> None:
    with Meter("meta") as meter:
        torch.ones(3) @ torch.ones(3)
        assert not meter.num_kernels
        torch.empty(3, 3, device="meta") @ torch.empty(3, 3, device="meta")
    assert dict(meter.kernels) == {"mm": 1}
    assert meter.operations == 2 * 27
