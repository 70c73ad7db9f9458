"""What is computed again in the backward pass gives the same gradients, and keeps less until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.decoder import Recompute
from imdm_scale.model.layer import DropoutKey
from imdm_scale.model.stage import ImdmStage
from tests.tiny import plain_network, random_input, tiny, weights_of

ARCHITECTURE = tiny(dropout=0.3, attention_softcap=2.0)
LLAMA = tiny(dropout=0.3, norm="rmsnorm", mlp="swiglu", bias=False)
KINDS: tuple[Recompute, ...] = ("none", "selective", "full")


def build(
    build_stage: Callable[..., ImdmStage], recompute: Recompute, architecture: Architecture = ARCHITECTURE
) -> ImdmStage:
    return build_stage(architecture, weights_of(plain_network(architecture)), recompute=recompute).train()


def logits(stage: ImdmStage, sample: int) -> Tensor:
    """Of every position of one sample, which is a micro-batch."""
    ids_BL, noise_BLD = random_input(ARCHITECTURE)
    key = DropoutKey(1, 3, torch.tensor([20 + sample]))
    rows = slice(sample, sample + 1)
    return stage(ids_BL[rows], noise_BLD[rows], torch.arange(ids_BL.size(1)), key)


def gradients_of_two_micro_batches(stage: ImdmStage) -> list[Tensor]:
    """As 1F1B computes them: the second forward pass comes before the first backward pass."""
    first, second = logits(stage, 0), logits(stage, 1)
    first.square().sum().backward()
    second.square().sum().backward()
    gradients = [parameter.grad for parameter in stage.parameters()]
    return [gradient for gradient in gradients if gradient is not None]


@contextmanager
def counted_elements() -> Iterator[list[int]]:
    """Sizes of the tensors that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("architecture", [ARCHITECTURE, LLAMA], ids=["mdlm", "llama"])
@pytest.mark.parametrize("recompute", KINDS[1:])
def test_gradients_are_equal_bit_for_bit(
    build_stage: Callable[..., ImdmStage], recompute: Recompute, architecture: Architecture
) -> None:
    expected = gradients_of_two_micro_batches(build(build_stage, "none", architecture))
    found = gradients_of_two_micro_batches(build(build_stage, recompute, architecture))
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) == len(
        weights_of(plain_network(architecture))
    )


def test_the_more_is_computed_again_the_less_is_kept(build_stage: Callable[..., ImdmStage]) -> None:
    kept = []
    for recompute in KINDS:
        with counted_elements() as sizes:
            logits(build(build_stage, recompute), 0)
        kept.append(sum(sizes))
    none, selective, full = kept
    assert full < 0.5 * selective < 0.5 * none


@pytest.mark.parametrize("recompute", KINDS)
def test_nothing_is_kept_where_no_gradient_is_wanted(
    build_stage: Callable[..., ImdmStage], recompute: Recompute
) -> None:
    """Even of hidden states that want one, as those that a pipeline stage receives do."""
    decoder = build(build_stage, recompute).decoder
    wanted = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda layer, inputs, outputs: wanted.append(outputs[0].requires_grad))
    hidden_SBH = torch.ones(4, 1, ARCHITECTURE.hidden_size, requires_grad=True)
    with torch.no_grad(), counted_elements() as sizes:
        decoder(hidden_SBH, DropoutKey(1, 3, torch.tensor([20])))
    assert wanted == [False] * ARCHITECTURE.num_layers
    assert not sizes
