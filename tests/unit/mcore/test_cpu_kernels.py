"""The arithmetic that megatron-core calls on a CPU equals the arithmetic that it is written with."""

import pytest

from tpt_megatron.config.parallel import ParallelConfig

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

import tpt_megatron.mcore  # noqa: E402, F401
from tpt_megatron.mcore import cpu_kernels, groups  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's kernels are not installed where there is CUDA")


def gradients(function, *inputs):
    """Return the output and, of a fixed weighing of it, the gradients of the inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    torch.manual_seed(1)
    output.backward(torch.randn_like(output))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_rotate_turns_pairs_of_halves():
    def plain(t):  # each pair (t[i], t[i + d/2]) as a complex number, times e^(i angle)
        first, second = t.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    torch.manual_seed(0)
    angles = torch.randn(7, 1, 1, 4)
    frequencies = torch.cat((angles, angles), dim=-1)
    states = torch.randn(7, 2, 3, 8)
    assert_close(gradients(lambda t: cpu_kernels.rotate(t, frequencies), states), gradients(plain, states))


def test_rotate_remembers_angles_of_one_tensor_and_precision_only():
    states = torch.ones(1, 1, 1, 2)
    zero, quarter = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), torch.pi / 2)
    for _ in range(2):
        assert cpu_kernels.rotate(states, zero).flatten().tolist() == [1, 1]
        assert cpu_kernels.rotate(states, quarter).flatten().tolist() == pytest.approx([-1, 1])
    assert cpu_kernels.rotate(states.bfloat16(), quarter).dtype == torch.bfloat16
    assert cpu_kernels.rotate(states, quarter).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    torch.manual_seed(0)
    gate_up = torch.randn(5, 2, 12, dtype=dtype)
    ours, theirs = gradients(lambda t: cpu_kernels.swiglu(t, None), gate_up), gradients(plain, gate_up)
    if dtype == torch.float32:
        assert_close(ours, theirs)
    else:
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_what_is_there(dtype):
    torch.manual_seed(0)
    inputs, output_gradient, before = torch.randn(6, 3, dtype=dtype), torch.randn(6, 4, dtype=dtype), torch.randn(4, 3)
    after = before.clone()
    cpu_kernels.accumulate(inputs, output_gradient, after)
    torch.testing.assert_close(after, before + (output_gradient.t() @ inputs).float())


def test_scale_changes_the_tensors_themselves():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    cpu_kernels.scale(0, torch.zeros(1), [tensors, tensors], 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[0.5] * 2, [1.0] * 3]


def test_a_group_of_one_keeps_its_buffers():
    from megatron.core import parallel_state
    from megatron.core.distributed import param_and_grad_buffer as buffers

    groups.join(ParallelConfig())
    try:
        group = parallel_state.get_data_parallel_group()
        whole = torch.arange(4.0)
        with buffers._coalescing_manager(group, async_ops=True) as handle:
            assert buffers.dist_all_gather_func(whole, whole[:], group=group, async_op=True) is None
            assert buffers.dist_reduce_scatter_func(whole[:], whole, group=group, async_op=True) is None
        handle.wait()
        assert whole.tolist() == [0, 1, 2, 3]
        with pytest.raises(AssertionError):
            buffers.dist_all_gather_func(whole, torch.zeros(4), group=group)
    finally:
        groups.leave()
