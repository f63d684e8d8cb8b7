"""fp8 under every layout against the same model that torchao itself converted, in one process.

On one rank to the bit. On several with products in fp32 around the rounding to fp8: bf16 sums of another order send one
value in some hundred to the other neighbour in fp8, a sixteenth of it away, and would hide what a layout does wrong.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from support.fp8_library import torchao_found
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, batches, tiny_model
from torch import nn

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder import precision
from fourfold.parallel.decoder.async_pipeline import decoder_stages
from fourfold.parallel.decoder.float8 import refuse_without_fp8, use_fp8
from fourfold.parallel.decoder.precision import store_weights_in
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 4}
BF16 = precision._MEANINGS["fp8-emulated"]
FP32 = replace(BF16, products=None)


@pytest.fixture(scope="module", autouse=True)
def torchao() -> Iterator[None]:
    with torchao_found() as found:
        if not found:
            pytest.skip("torchao is not installed")
        yield


def _bf16(_: nn.Module, given: tuple) -> tuple:
    return (given[0].bfloat16(),)


@cache  # in each rank's process
def by_torchao(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps and the first one's gradients, of transformers' model.

    Args:
        kind: "autocast" to bf16; "sharded", as FSDP2 has it: all of a bf16 copy of the weights; "fp32"; or
            "unconverted": autocast without fp8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = tiny_model(**SIZES)
    if kind != "unconverted":
        config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
        convert_to_float8_training(model.model.layers, config=config)
    if kind == "autocast":  # of which torchao knows CUDA's only
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_bf16)
    optimizer, losses, gradients = adamw(model.parameters()), [], {}
    for ids, labels in batches(True):
        run = copy.deepcopy(model) if kind == "sharded" else model
        if kind == "sharded":
            store_weights_in(run, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind in ("autocast", "unconverted")):
            loss = run(ids, labels=labels).loss
        loss.backward()
        for weight, used in zip(model.parameters(), run.parameters(), strict=True):
            weight.grad = used.grad.float()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def compared(mesh_shape: dict, options: dict, meaning: precision.Precision, kind: str) -> dict[str, float]:
    """This rank's errors against one process."""
    if options.get("compile"):
        torch._dynamo.reset()
    truth_losses, truth = by_torchao(kind)
    with patch.dict(precision._MEANINGS, {"fp8-emulated": meaning}):
        mesh = init_mesh(**mesh_shape, device_type="cpu")
        model = parallelize(tiny_model(**SIZES), mesh, precision="fp8-emulated", **options)
    optimizer, rows = adamw(model.parameters()), model.batch_rows(GLOBAL_BATCH)
    errors: dict[str, float] = {}
    for step, (ids, labels) in enumerate(batches(True)):
        before = model.evaluate(ids[rows], labels[rows]).item()
        loss = model.forward_backward(ids[rows], labels[rows]).item()
        errors[f"loss of step {step}"] = abs(loss / truth_losses[step] - 1)
        errors[f"evaluation before step {step}"] = abs(before / loss - 1)
        if step == 0:
            for name, parameter in model.named_parameters():
                errors[f"gradient of {name}"] = relative_error(full_tensor(parameter.grad), truth[name])
        model.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return errors


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "autocast"),
        ({"checkpointing": "full"}, "autocast"),
        ({"checkpointing": "selective"}, "autocast"),
        ({"compile": "aot_eager"}, "autocast"),
        ({"zero_stage": 3, "checkpointing": "full"}, "sharded"),
    ],
    ids=str,
)
def test_one_rank_is_torchao_s_own(ranks, options, kind):
    assert_ranks(ranks(1)(compared, {}, options, BF16, kind), 1e-6, f"{options}")  # of transformers' mean in fp32


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({"dp": 2}, {}),
        ({"dp": 2}, {"zero_stage": 1, "checkpointing": "selective"}),
        ({"dp": 2}, {"zero_stage": 2}),
        ({"dp": 2}, {"zero_stage": 3, "checkpointing": "full", "compile": "aot_eager"}),
        ({"cp": 2}, {}),
        ({"pp": 2}, {"micro_batch": 2, "vp": 2}),
        ({"tp": 2}, {"sequence_parallel": True}),
        ({"tp": 2}, {"compile": "aot_eager"}),
    ],
    ids=str,
)
def test_two_ranks(ranks, mesh_shape, options):
    answers = ranks(2)(compared, mesh_shape, options, FP32, "fp32")
    assert_ranks(answers, 1e-5, f"{mesh_shape} {options}")


def losses_besides() -> tuple[list[float], list[float]]:
    return by_torchao("autocast")[0], by_torchao("unconverted")[0]


def test_the_loss_follows_bf16_mixed_s(ranks):
    fp8, bf16 = ranks(1)(losses_besides)[0]
    # e4m3 keeps four significant bits, bf16 eight, and in a mean roundings mostly cancel. Nearer, nothing was rounded.
    assert fp8 == pytest.approx(bf16, rel=1e-2)
    assert fp8 != pytest.approx(bf16, rel=1e-5)


def products_of(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), upstream)


def rounded(values: torch.Tensor, dim: int) -> torch.Tensor:
    """To e4m3, with a scale for what is summed over along `dim`: the largest power of two that leaves all in range."""
    scale = 2.0 ** torch.floor(torch.log2(448.0 / values.abs().amax(dim, keepdim=True)))
    return (values * scale).float().to(torch.float8_e4m3fn).double() / scale


def test_what_a_product_is():
    """The recipe, in fp64 from its definition: output, and the gradients of input and weight."""
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(32, 48, bias=False))
    x, upstream = torch.randn(16, 32, requires_grad=True), torch.randn(16, 48)
    use_fp8(layer, BF16)
    given, weight, late = x.detach().double(), layer[0].weight.detach().double(), upstream.double()
    expected = (
        rounded(given, 1) @ rounded(weight, 1).T,
        rounded(late, 1) @ rounded(weight, 0),
        rounded(late, 0).T @ rounded(given, 0),
    )
    for name, got, truth in zip(
        ("output", "input", "weight"), products_of(layer[0], x, upstream), expected, strict=True
    ):
        assert relative_error(got, truth) < 1e-6, name  # the products are summed in fp32


def adapted(rank: int) -> nn.Module:
    peft = pytest.importorskip("peft")  # not among what the package needs
    torch.manual_seed(5)
    settings = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model(**SIZES), settings)


def adapters_compared() -> dict[str, float]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    truth, (ids, labels) = adapted(16), batches(True)[0]
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    layers = truth.get_base_model().model.layers
    convert_to_float8_training(layers, config=config, module_filter_fn=lambda _, name: "lora" not in name)
    for module in layers.modules():
        if isinstance(module, Float8Linear):
            module.register_forward_pre_hook(_bf16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = truth(input_ids=ids, labels=labels).loss
    loss.backward()
    expected = {name.removeprefix("base_model.model."): p.grad for name, p in truth.named_parameters()}
    model = parallelize(adapted(16), init_mesh(device_type="cpu"), precision="fp8-emulated")
    errors = {"loss": abs(model.forward_backward(ids, labels).item() / loss.item() - 1)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_" in name:
            errors[name] = relative_error(parameter.grad, expected[name])
    return errors


def test_adapters_stay_as_they_are(ranks):
    errors = ranks(1)(adapters_compared)
    assert len(errors[0]) == 1 + 2 * 2 * SIZES["num_hidden_layers"]
    assert_ranks(errors, 1e-6, "adapters")


def saved(folder: str) -> tuple[bool, list[str]]:
    from transformers import AutoModelForCausalLM

    given = tiny_model(**SIZES)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    model = parallelize(given, init_mesh(device_type="cpu"), precision="fp8-emulated")
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    kept = all(torch.equal(again[name], value) for name, value in before.items())
    return kept, sorted(set(model.state_dict()) ^ set(before))


def test_names_and_what_is_saved_are_the_plain_model_s(ranks, tmp_path):
    assert ranks(1)(saved, str(tmp_path / "saved"))[0] == (True, [])


def said(options: dict, sizes: dict, length: int) -> str:
    """What a training step answers: the precision that runs, or the refusal."""
    try:
        model = parallelize(tiny_model(**{**SIZES, **sizes}), init_mesh(device_type="cpu"), **options)
        model.forward_backward(torch.ones(2, length, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return model.precision


@pytest.mark.parametrize(
    ("options", "sizes", "length", "answer"),
    [
        ({}, {}, 16, "fp8-emulated"),
        ({}, {}, 24, "fp8-emulated"),
        ({"micro_batch": 1}, {}, 24, "1 x 24 tokens over cp=1 with precision='fp8-emulated': a rank's part must be a"),
        ({"precision": "fp8"}, {}, 16, "precision='fp8' on cpu, which has no products in fp8"),
        ({}, {"intermediate_size": 72}, 16, "the feed-forward width 72; choose a tp that leaves multiples of 16"),
        ({}, {"head_dim": 8, "num_key_value_heads": 1}, 16, "heads x head size 4 x 8 and 1 x 8"),
        ({"checkpointing": "stream"}, {}, 16, "fp8 with checkpointing='stream': StreamBP makes weight gradients"),
    ],
    ids=str,
)
def test_what_fp8_takes(ranks, options, sizes, length, answer):
    assert answer in ranks(1)(said, {"precision": "fp8-emulated", **options}, sizes, length)[0]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["subclass", "forward", "hook"])
def test_what_is_more_than_a_matrix_is_refused(change):
    layer = nn.Sequential(nn.Linear(16, 16), Doubled(16, 16) if change == "subclass" else nn.Linear(16, 16))
    if change == "forward":
        layer[1].forward = lambda x: x
    if change == "hook":
        layer[1].register_forward_hook(lambda *_: None)
    with torchao_found(), pytest.raises(ValueError, match=r"1 is a \w+ with code of its own"):
        use_fp8(layer, precision.chosen_precision("fp8-emulated", None, layer, "cpu"))


@pytest.mark.parametrize("num_stages", [1, 2])
def test_stages_that_never_drain_have_none(num_stages):
    with pytest.raises(ValueError, match=r"fp8.*choose"):
        decoder_stages(tiny_model(**SIZES), num_stages, seq_len=16, precision="fp8-emulated")


def packed_around_a_ring() -> str:
    model = parallelize(tiny_model(**SIZES), init_mesh(cp=2, device_type="cpu"), precision="fp8-emulated")
    ids = torch.ones(1, 32, dtype=torch.int64)
    try:
        model.forward_backward(ids, ids, torch.arange(32)[None] // 20)
    except ValueError as error:
        return str(error)
    return ""


def test_packed_rows_around_a_ring_are_refused(ranks):
    assert all("packed rows with cp=2 in fp8" in answer for answer in ranks(2)(packed_around_a_ring))


def test_without_torchao_it_is_named():
    with patch("fourfold.parallel.decoder.float8.find_spec", return_value=None):
        with pytest.raises(ValueError, match="pip install 'torchao>="):
            refuse_without_fp8(BF16, "cpu")
        refuse_without_fp8(precision._MEANINGS["bf16-mixed"], "cpu")


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_devices_with_fp8(capability, has):
    with (
        patch("torch.cuda.get_device_capability", return_value=capability),
        patch("torch.cuda.get_device_name", return_value="a GPU"),
    ):
        refuse_without_fp8(BF16, "cuda")
        if has:
            refuse_without_fp8(precision._MEANINGS["fp8"], "cuda")
        else:
            with pytest.raises(ValueError, match="precision='fp8' on a GPU, which has no products in fp8"):
                refuse_without_fp8(precision._MEANINGS["fp8"], "cuda")
