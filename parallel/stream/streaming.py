"""A model that streams: what its patched forwards do, and one pass over a batch from its tokens to its loss.

model(ids, labels=..)  ->  base model  ->  layers in chunks  ->  norm, head and loss in chunks    the end is stock
model(ids, labels=..)  ->  base model  ->  layers in chunks  ->  the model's own norm, head, loss     it is not
model(ids) or base(ids), training          layers in chunks  ->  the caller's own
model(ids) or base(ids), generating        everything as it was
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.options import RingSettings
from fourfold.parallel.sequence.tensors import IGNORED_LABEL
from fourfold.parallel.stream.attention import row_masks
from fourfold.parallel.stream.calls import BaseCall, LabelledCall
from fourfold.parallel.stream.checks import (
    check_padding,
    check_unchanged,
    check_weights,
    final_norm,
    inner_hook,
    is_plain_linear,
    own_end,
    plain_layers,
    projection_of,
    unverifiable,
)
from fourfold.parallel.stream.fused import liger
from fourfold.parallel.stream.head import Head
from fourfold.parallel.stream.head_groups import head_cut
from fourfold.parallel.stream.kept_inputs import Lookup, can_look_up_again, weights_are_sharded
from fourfold.parallel.stream.layer import Current, LayerStream
from fourfold.parallel.stream.layer_run import StreamRun
from fourfold.parallel.stream.logits import LazyLogits
from fourfold.parallel.stream.patching import Patches, attention_function, refuse_copy
from fourfold.parallel.stream.ring_layer import RingRun, around_ring
from fourfold.parallel.stream.router import asks_for_routing, routing_of, why_no_router_logits
from fourfold.parallel.stream.settings import LogitsForm, StreamSettings, new_head, new_run
from fourfold.parallel.stream.statistics import TokenStatistics
from fourfold.parallel.stream.verify import (
    ASKED,
    BY_ITSELF,
    Bounds,
    Incomparable,
    is_exact,
    projected,
    verify_gradients,
)

Plain = Callable[..., Any]
Verify = bool | Literal["first"] | None


class Streaming:
    """What stream_backprop puts into a model, and takes out again.

    Args:
        model: a causal language model that checks.check_model has passed.
        settings: its chunks.
        verify: as stream_backprop's.
    """

    def __init__(self, model: PreTrainedModel, settings: StreamSettings, verify: Verify = False) -> None:
        self.model, self.settings = model, settings
        # Whether the first pass that asks for a gradient, and the first with packed documents, compares a tiny batch
        # with plain backpropagation first; and which of the two have been compared.
        self._verify: Verify = verify if verify is not None else True
        self._verified: set[bool] = set()
        self._verifying = False
        self.base = cast(nn.Module, model.base_model)
        self.layers = plain_layers(self.base)
        self.norm = final_norm(self.base)
        self.patches, self.current = Patches(), Current()
        recorder = (model._can_record_outputs or {}).get("router_logits")
        self._router: type[nn.Module] | None = getattr(recorder, "target_class", None)
        self._paused = False
        self._streams: list[LayerStream] = []
        self._said: set[str] = set()
        self._head_was_plain = is_plain_linear(projection_of(model))
        self._attentions = [layer.self_attn for layer in self.layers]
        self._names = {module: list(signature(module.forward).parameters) for module in (model, self.base)}
        # What norm, head and embedding do while a pass with a streamed head is under way.
        self._instead: dict[nn.Module, Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()

    def enable(self) -> None:
        """Patch the model, once: see patching.PATCHES."""
        fused = liger() if self.settings.fused else None
        for index, layer in enumerate(self.layers):
            keep = self.settings.keeps(index, len(self.layers))
            stream = LayerStream(layer, self.current, keep=keep, router=self._router, fused=fused)
            stream.patch(self.patches)
            self._streams.append(stream)
            self.patches.gather_whole(layer)
        if self.model is not self.base:
            self.patches.add(self.model, self._model_forward, method=True)
        self.patches.add(self.base, self._base_forward, method=True)
        self._patch_ends()

    def disable(self) -> None:
        """Undo enable; what others have wrapped around a forward of ours stays and passes through."""
        self._paused = True
        self.patches.undo()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the model runs as if it did not stream."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def small_chunks(self) -> Iterator[None]:
        """Chunks of a few tokens, so that a tiny batch has several."""
        before = self.settings
        self.settings = replace(before, chunk_size=5, mlp_chunk=3, logits_chunk=7)
        try:
            yield
        finally:
            self.settings = before

    def _patch_ends(self) -> None:
        """Patch norm, head and embedding: those that are there now, for peft puts others in their place."""
        ends = (self.norm, projection_of(self.model), self.model.get_input_embeddings())
        for module in ends:
            if module is not None:
                self.patches.add(
                    module, lambda plain, *args, _at=module, **kwargs: self._end(_at, plain, *args, **kwargs)
                )

    def _end(self, module: nn.Module, plain: Plain, *args: Any, **kwargs: Any) -> Any:
        return self._instead.get(module, plain)(*args, **kwargs)

    @contextmanager
    def _doing(self, module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
        """Meanwhile the end `module` does this instead of its own forward."""
        before, self._instead[module] = self._instead.get(module), function
        try:
            yield
        finally:
            if before is None:
                del self._instead[module]
            else:
                self._instead[module] = before

    def _model_forward(self, plain: Plain, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._names[self.model], args, strict=False)) | kwargs
        labelled = arguments.get("labels") is not None or arguments.get("shift_labels") is not None
        if self._paused or not labelled or projection_of(self.model) is None:
            return plain(*args, **kwargs)
        check_unchanged(self.model, self.layers, self._attentions, self.norm, self._head_was_plain)
        why = own_end(self.model, self.norm, self.patches)
        if why is None:
            return self._with_labels(LabelledCall.of(arguments))
        if arguments.get("return_token_statistics"):
            raise ValueError(f"{why}: token statistics need transformers' own end of the model")
        self._warn(f"{why}: layers stream, and norm, head and loss are left to that code, which may make whole logits")
        return plain(*args, **kwargs)

    def _base_forward(self, plain: Plain, *args: Any, **kwargs: Any) -> Any:
        training = self.base.training or self._verifying
        if self.current.run is not None or self._paused or not training or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        embeddings = kwargs.get("inputs_embeds")
        if not any(p.requires_grad for p in self.base.parameters()) and not getattr(embeddings, "requires_grad", False):
            return plain(*args, **kwargs)
        check_unchanged(self.model, self.layers, self._attentions, self.norm, self._head_was_plain)
        call = BaseCall.of(dict(zip(self._names[self.base], args, strict=False)) | kwargs)
        why = call.refusal(self.model)
        if why is None and asks_for_routing(self.model, call.output_router_logits):
            why = why_no_router_logits(self.model, self._router, call, around_a_ring=self._ring() is not None)
        if why is not None:
            self._warn(f"this call does not stream, and takes plain backpropagation's memory: {why}")
            return plain(*args, **kwargs)
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            self._warn("gradient checkpointing is on, and streaming replaces it: leave it off")
        run = self._new_run(call, whole_router_logits=True)
        out = self._hidden(plain, run, call)
        if run.routing is not None:
            out["router_logits"] = run.routing.logits()
        return out

    def _with_labels(self, call: LabelledCall) -> Any:
        """The model's forward with labels: transformers' arguments, and its loss."""
        call.check(self.model, self.layers)
        # What the layers of this pass share, and their output before the final norm, which goes with the head.
        run = self._new_run(call)
        if isinstance(run, RingRun):
            call.check_shard()
        with self._doing(self.norm, lambda x: x):
            hidden = self._hidden(self.base, run, call).last_hidden_state
        # The end, for the targets.
        targets = call.targets().to(hidden.device)
        projection = cast(nn.Linear, projection_of(self.model))
        head = new_head(self.settings, run, LogitsForm.of(self.model.config), self.norm, self._normalise, projection)
        place = place_in(run.group) if isinstance(run, RingRun) else None
        auxiliary = None if run.routing is None else run.routing.loss(place)
        if call.return_token_statistics:
            return self._statistics(head, hidden, targets, auxiliary)
        check_padding(run.masks, targets, cast(list[nn.Module], self._attentions))
        wanted = not self.model.training if call.return_logits is None else call.return_logits
        loss, logits = self._at_the_end(hidden, lambda x: self._loss_and_logits(head, x, call, targets, wanted))
        if run.routing is None or auxiliary is None:
            out = CausalLMOutputWithPast(loss=loss, logits=logits)
        else:
            loss = loss + run.routing.coefficient * auxiliary
            out = MoeCausalLMOutputWithPast(loss=loss, aux_loss=auxiliary, logits=logits)
        return out.to_tuple() if call.return_dict is False else out

    def _loss_and_logits(
        self, head: Head, hidden: Tensor, call: LabelledCall, targets: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        loss, weight = head.loss(hidden, targets, call.weight(targets)), head.projection.weight
        if not wanted:
            return loss, None
        if weights_are_sharded(self.model):  # and whole only now
            return loss, head.logits(hidden)
        dtype = weight.dtype if head.autocast is None else head.autocast[1]
        return loss, LazyLogits(hidden, head.logits, head.projection.out_features, dtype)

    def _statistics(self, head: Head, hidden: Tensor, targets: Tensor, auxiliary: Tensor | None) -> TokenStatistics:
        found = self._at_the_end(hidden, lambda x: head.statistics(x, targets))
        # FSDP2 hooks what a model returns, and warns of views.
        logprobs, lse, mean = (part.clone() for part in found)
        return TokenStatistics(
            logprobs=logprobs, logsumexp=lse, mean_logits=mean, mask=targets >= 0, aux_loss=auxiliary
        )

    def _normalise(self, x: Tensor) -> Tensor:
        """The final norm without its hooks, which would run for every chunk."""
        return cast(Tensor, self.patches.plain(self.norm)(x))

    def _at_the_end(self, hidden: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """function(hidden), run as the norm's and the projection's forward: with their hooks, and so their weights."""
        projection = cast(nn.Module, projection_of(self.model))
        with self._doing(projection, function), self._doing(self.norm, projection.__call__):
            return self.norm(hidden)

    def _hidden(self, base: Plain, run: StreamRun, call: BaseCall) -> Any:
        """What `base`, the base model or its plain forward, returns with its layers streamed."""
        inputs: dict[str, Any] = {
            "input_ids": call.input_ids, "inputs_embeds": call.inputs_embeds, "position_ids": call.position_ids,
        }  # fmt: skip
        if getattr(self.model.config, "output_router_logits", False):  # which would be asked for whole
            inputs["output_router_logits"] = False
        if isinstance(call, LabelledCall) or call.return_dict is not None:
            inputs["return_dict"] = isinstance(call, LabelledCall) or call.return_dict
        if call.ring_seq_len is not None:  # by which the ring knows the call as one that it has checked
            inputs["ring_seq_len"] = call.ring_seq_len
        embedding = cast(nn.Module, self.model.get_input_embeddings())
        with ExitStack() as stack:
            stack.enter_context(self.current.entered(run))
            # One config, but for attention modules that came from another model.
            configs = [self.model.config, *(cast(Any, attention).config for attention in self._attentions)]
            for config in {id(config): config for config in configs}.values():
                stack.enter_context(attention_function(config))
            if run.lookup is not None:
                stack.enter_context(self._doing(embedding, run.lookup))
            return base(use_cache=False, **inputs, **call.vision())

    def _ring(self) -> RingSettings | None:
        """The ring that the layers attend around, if any."""
        return cast(RingSettings | None, getattr(self._attentions[0], "ring_settings", None))

    def _new_run(self, call: BaseCall, *, whole_router_logits: bool = False) -> StreamRun:
        """What all layers share in the pass that this call begins."""
        self._patch_ends()
        check_weights(self.model)
        hooked = None if self._verifying else inner_hook(self.layers)
        if hooked is not None:
            self._warn(
                f"{hooked} in a layer has a hook: it sees chunks of the sequence, and those again in backward; what it "
                "does must be done to each token by itself"
            )
        device, masks = call.tokens.device, row_masks(call.attention_mask, call.text_positions(), call.shape)
        packed = any(len(mask.documents) > 1 for mask in masks)
        caches = call.use_cache is not False and getattr(self.model.config, "use_cache", False)
        if packed and caches and not self._verifying:
            self._warn(
                "position_ids that restart part documents here, and not in a plain call that makes a cache: give "
                "use_cache=False, with which transformers parts them too"
            )
        self._verify_first(packed=packed)
        can_cut = head_cut(self._streams[0]) is not None
        run = new_run(self.settings, self.model.config, masks, call.shape, device, self.model.dtype, can_cut)
        embedding = cast(nn.Embedding, self.model.get_input_embeddings())
        usable = torch.is_grad_enabled() and can_look_up_again(embedding, self.model)
        routed = asks_for_routing(self.model, call.output_router_logits)
        routing = routing_of(self.model, call.attention_mask, whole=whole_router_logits) if routed else None
        run = replace(run, routing=routing, lookup=Lookup(embedding) if usable else None)
        ring = self._ring()
        if ring is not None:
            return around_ring(run, ring, call.ring_seq_len, call.ring_cu_seqlens)
        if call.ring_seq_len is not None or call.ring_cu_seqlens is not None:
            raise ValueError("a shard of a sequence (ring_seq_len): call use_ring_attention(model, group) first")
        return run

    def verify(self, bounds: Bounds = ASKED, *, packed: bool = False) -> None:
        """Compare a tiny batch, streamed and plain, with `packed` of two documents in a row; raises as in verify.py."""
        self._verified.add(packed)
        self._verifying, before = True, self.current.num_streamed
        try:
            loss = partial(self._tiny_loss, packed=packed)
            verify_gradients(self.model, loss, self.small_chunks, self.paused, bounds=bounds)
        except ValueError as error:
            if not packed:
                raise
            raise ValueError(f"with packed documents, against each document alone: {error}") from error
        finally:
            self._verifying, self.current.num_streamed = False, before

    def _tiny_loss(self, ids: Tensor, packed: bool) -> Tensor:
        """The loss to verify: the model's, or, where its end is not transformers' own, of its last hidden states.

        Of packed documents the truth is each one alone: not every model's own attention parts them by position_ids.
        """
        if not packed:
            return self._loss_of_row(ids, None)
        ids = ids.reshape(1, -1)
        lengths = [ids.shape[1] // 2 - 1, ids.shape[1] - ids.shape[1] // 2 + 1]
        if self._paused:
            return torch.stack([self._loss_of_row(part, None) for part in torch.split(ids, lengths, dim=1)]).sum()
        positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device).unsqueeze(0)
        return self._loss_of_row(ids, positions)

    def _loss_of_row(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """The sum over the labels of all documents, or of hidden states where the end is not transformers' own.

        The classes' own forwards are called: nothing that is wrapped around the model or hooked to it may notice.
        """
        plain: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        if hasattr(self.model.config, "output_router_logits"):
            plain["output_router_logits"] = False
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        if not checkpointing and own_end(self.model, self.norm, self.patches) is None:
            labels = ids if positions is None else ids.masked_fill(positions == 0, IGNORED_LABEL)
            labelled = LabelledCall(
                input_ids=ids, labels=labels, position_ids=positions, output_router_logits=False
            )  # fmt: skip
            model: Any = type(self.model)
            out = model.forward(self.model, labels=labels, **plain) if self._paused else self._with_labels(labelled)
            return cast(Tensor, out.loss * labels[:, 1:].ne(IGNORED_LABEL).sum())
        base: Any = partial(type(self.base).forward, self.base)
        call = BaseCall(input_ids=ids, position_ids=positions, output_router_logits=False)
        out = base(**plain) if self._paused else self._hidden(base, self._new_run(call), call)
        return projected(out.last_hidden_state).sum()

    def _verify_first(self, *, packed: bool) -> None:
        """The comparison that comes before the first pass with a gradient, where it was asked for or costs nothing.

        By itself it runs where nobody could notice but by the time it takes, and only a mistake can fail.
        """
        asked = self._verify == "first"
        if not self._verify or packed in self._verified or self._verifying or not torch.is_grad_enabled():
            return
        why = unverifiable(self.model)
        if not asked and why is None and self._router is not None and not is_exact(self.model):
            why = "a rounding may send a token to another expert"
        if why is None:
            try:
                self.verify(ASKED if asked else BY_ITSELF, packed=packed)
            except Incomparable as reason:
                why = str(reason)
            except BaseException:
                self._verified.discard(packed)
                raise
        if why is not None and asked:
            self._verified.discard(packed)
            raise ValueError(f"verify='first': {why}; give verify=True before that, or verify=False")
        self._verified.add(packed)

    def _warn(self, message: str) -> None:
        """Say it once a model."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)
