"""What is traced on the meta device: FLOPs as torch counts them, memory that is alive at once, attention as one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nft_ray.planning.trace import Trace

WIDTH, ROWS, MANY = 256, 16, 16384
ROW_BYTES = ROWS * WIDTH * 4


def layers(count: int) -> torch.nn.Sequential:
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))


def rows() -> torch.Tensor:
    return torch.empty(ROWS, WIDTH, device="meta")


def test_flops_are_those_of_torch() -> None:
    model, x = layers(3), rows()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    model.zero_grad()
    assert Trace.of(lambda: model(x).sum().backward()).flops == counter.get_total_flops()
    assert counter.get_total_flops() == (3 + 3 + 2) * 2 * ROWS * WIDTH**2  # the first layer's input needs no gradient


def test_what_is_gone_takes_no_memory() -> None:
    model, x = layers(8), rows()
    with torch.no_grad():
        assert Trace.of(lambda: model(x)).peak_bytes == 2 * ROW_BYTES


def test_a_backward_needs_what_the_forward_has_kept() -> None:
    model, x = layers(8).requires_grad_(False), rows().requires_grad_()
    # each product goes on with its input's gradient; nothing but GELU's inputs is kept
    found = Trace.of(lambda: torch.nn.functional.gelu(model(x)).sum().backward())
    assert 2 * ROW_BYTES <= found.peak_bytes <= 4 * ROW_BYTES


def test_a_checkpoint_keeps_its_input_alone_and_computes_again() -> None:
    blocks = [torch.nn.Sequential(layers(1), torch.nn.GELU(), layers(1), torch.nn.GELU()) for _ in range(6)]

    def run(again: bool) -> None:
        x = torch.empty(MANY, WIDTH, device="meta", requires_grad=True)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)  # type: ignore[assignment]
        x.sum().backward()
        for block in blocks:
            block.zero_grad()

    kept, again = Trace.of(lambda: run(False)), Trace.of(lambda: run(True))
    forward = 12 * 2 * MANY * WIDTH**2
    assert kept.flops == 3 * forward
    assert again.flops == 4 * forward
    assert again.peak_bytes < 0.6 * kept.peak_bytes


@pytest.mark.parametrize("grad", [False, True])
def test_attention_keeps_no_matrix_of_probabilities(grad: bool) -> None:
    q = torch.empty(2, 4, 1024, 32, device="meta", requires_grad=grad)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        if grad:
            out.sum().backward()

    found = Trace.of(run)
    assert found.peak_bytes < 2 * 4 * 1024 * 1024 * 4 / 2, "half of the matrix"
    assert found.flops == (2 + (5 if grad else 0)) * 2 * 2 * 4 * 1024**2 * 32
    assert torch.nn.functional.scaled_dot_product_attention is attend


def test_views_are_no_operations() -> None:
    x = rows()
    assert Trace.of(lambda: x.view(-1).unsqueeze(0)).operations == 0
    assert Trace.of(lambda: (x.t() + 1).mul_(2)).operations == 2
