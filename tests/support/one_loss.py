"""A layout's training against one process: losses, every gradient of the first step, norms, evaluation."""

from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from fourfold.parallel import parallelize
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error
from support.meshes import shared_mesh

GLOBAL_BATCH, SEQ_LEN, STEPS, MAX_NORM = 4, 24, 3, 0.5


def tiny_model(family: str = "llama", *, seed: int = 1, double: bool = False, **changes: object) -> torch.nn.Module:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    config = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}[family](**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.double() if double else model


def batches(masked: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (STEPS, GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels = ids.clone()
    if masked:  # uneven, so that a mean of means would show
        labels[:, 0, : SEQ_LEN // 2] = -100
        labels[:, 1, SEQ_LEN - 5 :] = -100
    return list(zip(ids, labels, strict=True))


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


@cache  # in each rank's process, for all layouts of one model
def single_process(masked: bool, **model_options: object):
    """Losses, the first step's gradients, and the gradient norms of the plain transformers model."""
    model, data = tiny_model(**model_options), batches(masked)
    optimizer = adamw(model.parameters())
    losses, norms, gradients = [], [], {}
    for step, (ids, labels) in enumerate(data):
        loss = model(ids, labels=labels).loss
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients


def check_layout(
    mesh_shape: dict, options: dict, model_options: dict, masked: bool, steps: int = 2
) -> tuple[dict[str, float], set]:
    """This rank's errors against the single process by what is compared, and which parameters it has no part of.

    A model that no pipeline cuts has two layers unless `model_options` says otherwise: a first one and a last one.
    Evaluation comes after an update, where weights that were kept would be old ones; test_eight_ranks.py evaluates
    first of all.
    """
    model_options = {"num_hidden_layers": 4 if "pp" in mesh_shape else 2} | model_options
    data = batches(masked)[:steps]
    truth_losses, truth_norms, truth = single_process(masked, **model_options)
    model = parallelize(tiny_model(**model_options), shared_mesh(**mesh_shape), **options)
    optimizer = adamw(model.parameters())
    rows = model.batch_rows(GLOBAL_BATCH)
    errors: dict[str, float] = {}
    for step, (ids, labels) in enumerate(data):
        if step == 1:
            evaluated = model.evaluate(ids[rows], labels[rows])
        loss = model.forward_backward(ids[rows], labels[rows])
        if step == 0:
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                gradient = full_tensor(gradient)
                errors[f"gradient of {name}"] = relative_error(gradient, truth[name])
        norm = model.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        errors[f"loss of step {step}"] = abs(loss.item() / truth_losses[step] - 1)
        if step == 1:
            errors[f"evaluation before step {step}"] = abs(evaluated.item() / loss.item() - 1)
        errors[f"gradient norm of step {step}"] = abs(norm.item() / truth_norms[step] - 1)
    return errors, set(truth) - {name for name, _ in model.named_parameters()}


def assert_one_loss(pool, mesh_shape, *, masked=False, model=None, tolerance=1e-5, steps=2, **options):
    """Fail with the layout and, of every rank, what differs by more than `tolerance`, the worst first."""
    results = pool(check_layout, mesh_shape, options, model or {}, masked, steps)
    layout = f"mesh {mesh_shape}, options {options}, model {model or 'llama'}, masked={masked}"
    assert_ranks([errors for errors, _ in results], tolerance, layout)
    nowhere = set.intersection(*(missing for _, missing in results))
    assert not nowhere, f"{layout}\nno rank compared {sorted(nowhere)}"
