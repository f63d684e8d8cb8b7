"""LoRA through peft: one process's gradients under every layout that takes it, and adapters that peft loads again.

In fp64, where what remains is transformers' own: its norms and rotary tables are fp32.
"""

import pytest
import torch
from support.large_logits import with_large_logits
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, batches, tiny_model
from torch.distributed.tensor import DTensor

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

peft = pytest.importorskip("peft")  # of the test extra, not of the package

MATRICES = ["q_proj", "v_proj", "down_proj"]


def adapted_model(*, seed: int = 5, double: bool = True, meta: bool = False, model: dict | None = None, **settings):
    """A tiny model with adapters that already say something: peft begins them at zero."""
    with torch.device("meta" if meta else "cpu"):
        whole = tiny_model(double=double and not meta, **(model or {}))
        torch.manual_seed(seed)
        made = peft.get_peft_model(whole, peft.LoraConfig(**{"r": 2, "target_modules": MATRICES, **settings}))
    for name, parameter in made.named_parameters():
        if "lora_" in name and not meta:
            parameter.data = torch.randn(parameter.shape, dtype=whole.dtype) / 4
    return made


def trained_alone(**options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two steps and the first one's gradients, by the names that the base model has."""
    model, losses, gradients = adapted_model(**options), [], {}
    optimizer = adamw(model.parameters())
    for ids, labels in batches(True)[:2]:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {
            name.removeprefix("base_model.model."): parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    ids, labels = batches(True)[2]
    return [*losses, model(input_ids=ids, labels=labels).loss.item()], gradients


def check_adapters(mesh_shape: dict, options: dict, model_options: dict, folder: str) -> dict[str, float]:
    """This rank's errors against one process; what is saved goes to `folder`."""
    truth_losses, truth = trained_alone(**model_options)
    model = parallelize(adapted_model(**model_options), init_mesh(**mesh_shape, device_type="cpu"), **options)
    optimizer = adamw(model.parameters())
    rows = model.batch_rows(GLOBAL_BATCH)
    errors: dict[str, float] = {}
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}
    for step, (ids, labels) in enumerate(batches(True)[:2]):
        loss = model.forward_backward(ids[rows], labels[rows]).item()
        errors[f"loss of step {step}"] = abs(loss / truth_losses[step] - 1)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
            if step == 0 and "lora_" in name:
                gradient = parameter.grad
                gradient = full_tensor(gradient)
                errors[f"gradient of {name}"] = relative_error(gradient, truth[name])
        model.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        if name in before:
            assert torch.equal(*((x.to_local() if isinstance(x, DTensor) else x) for x in (value, before[name]))), name
    ids, labels = batches(True)[2]
    errors["evaluation"] = abs(model.evaluate(ids[rows], labels[rows]).item() / truth_losses[2] - 1)
    model.save_pretrained(folder)
    return errors


STREAM = {"checkpointing": "stream"}


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model_options"),
    [
        ({}, {}, {}),
        ({}, STREAM, {}),
        ({"dp": 2}, {"micro_batch": 1}, {}),
        ({"dp": 2}, {"zero_stage": 1, "checkpointing": "selective"}, {}),
        ({"dp": 2}, {"zero_stage": 2, "micro_batch": 1, "checkpointing": "full"}, {}),
        ({"dp": 2}, {"zero_stage": 3, "checkpointing": "full"}, {"model": {"tie_word_embeddings": True}}),
        ({"dp": 2}, STREAM | {"zero_stage": 3}, {}),
        ({"cp": 2}, {"zero_stage": 3}, {"model": {"family": "qwen3"}}),
        ({"cp": 2}, STREAM, {}),
        ({"pp": 2}, {}, {"use_rslora": True}),
        ({"pp": 2}, STREAM | {"zero_stage": 3}, {}),
        ({"pp": 2}, {"vp": 2, "zero_stage": 1}, {}),
        ({"pp": 2}, {"checkpointing": "full"}, {"model": {"tie_word_embeddings": True}}),
        ({"pp": 2}, {"vp": 2, "schedule": "zero-bubble"}, {}),
        ({"pp": 2}, {"micro_batch": 2}, {"layers_to_transform": [3]}),  # a stage and an embedding that are frozen
        ({"dp": 2}, {}, {"layers_to_transform": [2]}),
        ({"dp": 2, "pp": 2}, {}, {"layers_to_transform": [0]}),
        ({"dp": 2}, {"compile": "aot_eager"}, {}),
    ],
    ids=str,
)
def test_adapters_train_as_on_one_process(ranks, tmp_path, mesh_shape, options, model_options):
    world = torch.tensor(list(mesh_shape.values()) or [1]).prod().item()
    answers = ranks(world)(check_adapters, mesh_shape, options, model_options, str(tmp_path))
    assert_ranks(answers, 1e-6, f"mesh {mesh_shape}, options {options}, {model_options}")
    loaded = peft.PeftModel.from_pretrained(tiny_model(double=True, **model_options.get("model", {})), tmp_path)
    ids, labels = batches(True)[2]
    found = loaded.double()(input_ids=ids, labels=labels).loss.item()
    # fp64 but for what transformers computes in fp32, its norms and rotary tables: 6e-8 an operation
    assert found == pytest.approx(trained_alone(**model_options)[0][2], rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_adapters_under_a_frozen_head_that_streams(ranks, tmp_path):
    model = {"model": {"hidden_size": 16, "tie_word_embeddings": True}}
    answers = ranks(2)(with_large_logits, check_adapters, {"dp": 2}, {"micro_batch": 1}, model, str(tmp_path))
    assert_ranks([errors for errors, _ in answers], 1e-6, "dp 2, large logits")
    assert [count for _, count in answers] == [2 * 2 + 2] * 2


def first_weights(mesh_shape: dict, options: dict, meta: bool) -> dict[str, float]:
    """Sums of the adapters' weights and of each other's, of a model built unlike on every rank."""
    rank = torch.distributed.get_rank()
    with torch.device("meta" if meta else "cpu"):
        whole = tiny_model(seed=rank)
        torch.manual_seed(rank)
        whole = peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules=MATRICES))
    model = parallelize(whole, init_mesh(**mesh_shape, device_type="cpu"), **options)
    full = {n: full_tensor(p) for n, p in model.named_parameters()}
    return {name: value.double().square().sum().item() for name, value in full.items()}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_first_weights_are_alike(ranks, zero_stage, meta):
    alone = ranks(1)(first_weights, {}, {}, meta)[0]
    for found in ranks(2)(first_weights, {"dp": 2}, {"zero_stage": zero_stage}, meta):
        # the weights are fp32: a few of its roundings of 6e-8
        assert found == pytest.approx(alone, rel=1e-6)
    assert all((value == 0) == ("lora_B" in name) for name, value in alone.items() if "lora_" in name)
    if meta:  # drawn by name, so under pp too
        parts = ranks(2)(first_weights, {"pp": 2}, {}, meta)
        assert parts[0] | parts[1] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 of adapter 'default' is not supported.*set it to 0.0"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "is peft's Linear: parallelize takes plain LoRA|DoraLinearLayer"),
        ({"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper|lm_head"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is peft's Embedding"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is peft's Linear"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(mesh, settings, message):
    with pytest.raises(ValueError, match=message):
        parallelize(adapted_model(**settings), mesh)


def test_other_methods_and_states_are_refused(mesh):
    ia3 = peft.get_peft_model(tiny_model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    merged, thawed, inside = adapted_model(), adapted_model(), adapted_model()
    merged.merge_adapter()
    thawed.get_base_model().model.norm.weight.requires_grad_()
    for model, message in (
        (ia3, "is peft's IA3: parallelize takes LoRA"),
        (merged, "are merged or disabled"),
        (thawed, "model.norm.weight is trained beside the adapters"),
        (inside.get_base_model(), r"parallelize takes adapters in the PeftModel around them"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(model, mesh)
    parallelize(adapted_model().merge_and_unload(), mesh)


def test_the_wrapper_is_taken_over_too(mesh, tmp_path):
    model = adapted_model(double=False)
    ids = batches(False)[0][0]
    parallelize(model, mesh)
    for action in (
        lambda: model(input_ids=ids), lambda: model.generate(input_ids=ids), lambda: model.save_pretrained(tmp_path),
        lambda: model.get_base_model()(ids),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="taken over by parallelize"):
            action()
    with pytest.raises(ValueError, match="was parallelized before"):
        parallelize(model, mesh)


def refused_under_tp() -> str:
    with pytest.raises(ValueError, match="adapters of peft with tp=2") as error:
        parallelize(adapted_model(), init_mesh(tp=2, device_type="cpu"))
    return str(error.value)


def test_adapters_are_not_cut(ranks):
    assert all("use tp=1, or merge them first" in said for said in ranks(2)(refused_under_tp))
