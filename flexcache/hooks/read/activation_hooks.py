"""Reads activations out of a running model, by hooks that always undo."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import SiteError
from flexcache.hooks.locate.encoder_decoder import TARGET, embedding, encoded
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules, unwrap
from flexcache.hooks.locate.vision import PIXELS, image_tokens

Sink = Callable[[HookPoint, torch.Tensor], None]


class ActivationHooks:
    """Hooks on the modules of *points* while the context is open, and a forward that feeds *sink* through them.

        with ActivationHooks(model, locate(model, Site("resid_post")), sink) as points:
            for batch in batches:
                points.forward(input_ids=batch.ids, attention_mask=batch.mask)

    In every `forward`, `sink(point, tensor)` is called once for each hook point, in the order in which the modules run,
    with the tensor of shape (batch, sequence, feature…) that the model itself goes on to use: the sink copies what it
    wants to keep before it returns, and changes nothing. Falcon, for one, adds to such a tensor in place.

    Hooks are outside all others: a hook point reads the values that the code around the module passes and gets.
    Forwards of the model that do not go through `forward` are not tapped. One thread uses it.

    Parameters
    ----------
    stop
        Leave the forward as soon as all points have fired, so that later blocks and the lm_head are never computed.
        A module that would run a second time later on goes unnoticed then; `measure` runs to the end and sees it.

    shape
        Give the sink tensors of shape (batch, sequence, feature…). False gives it what the module passes: on several
        processes maybe a shard, or a DTensor.

    Raises
    ------
    SiteError
        On entering: a point's module is not in the model.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[HookPoint], sink: Sink, stop: bool = True, shape: bool = True
    ) -> None:
        self._model = model
        self._points = tuple(dict.fromkeys(points))
        self._sink = sink
        self._stop = stop
        self._shape = shape
        self._handles: list[RemovableHandle] = []
        self._pending: set[HookPoint] = set()
        self._batch: tuple[int, int] | None = None
        self._gradients: dict[HookPoint, torch.Tensor] = {}
        self._defaults = {"use_cache": False} if accepts(model, "use_cache") else {}

    def __enter__(self) -> Self:
        named = modules(self._model)
        try:
            for point in self._points:
                if point.module not in named:
                    raise SiteError(f"the model has no module {point.module!r}", where=str(point))
                self._handles.append(self._register(named[point.module], point))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model once, without gradients and without a KV cache where it has one.

        Given ``decoder_input_ids``, the encoder runs before, untapped, and the tokens are those that the decoder reads.
        A compiled model runs uncompiled: hooks that are registered after compilation would never fire.

        Returns
        -------
        The model's output if it ran to the end, else None.

        Raises
        ------
        SiteError
            A module ran twice or not at all, or passes something other than one activation per token.
        """
        with torch.no_grad():
            return self._run(args, inputs)

    def differentiate(self, objective: Callable[[Any], torch.Tensor], *args: Any, **inputs: Any) -> torch.Tensor:
        """Run the model once to its end, and the gradient of the sum of *objective* of its output back to the points.

        Hook points of gradients come last, in their order, each with the total derivative with respect to the tensor
        that the model uses there. Use it within `activations_only`.

        Returns
        -------
        What *objective* gave, detached.

        Raises
        ------
        SiteError
            The objective does not depend on an activation, or is not finite; else as of `forward`.
        """
        batch = batch_shape(self._model, args, inputs)
        try:
            with torch.enable_grad():
                value = objective(self._run(args, inputs))
                total = value.sum()
            if not torch.isfinite(total):
                raise SiteError("the objective is not finite", found=str(float(total.detach())))
            if total.requires_grad:
                total.backward()
            for point in self._points:
                if point.gradient:
                    if point not in self._gradients:
                        raise SiteError(
                            "the objective does not depend on an activation whose gradient is asked for",
                            where=str(point),
                            remedy="leave it out, or choose another objective",
                        )
                    self._feed(point, self._gradients[point], batch)
            return value.detach()
        finally:
            self._gradients = {}

    def _run(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        if len(self._handles) != len(self._points):
            raise SiteError(
                "the hooks are not registered",
                remedy="use them as: with ActivationHooks(model, points, sink) as points: …",
            )
        with eager(self._model):
            inputs = encoded(self._model, inputs)
        self._batch = batch_shape(self._model, args, inputs)
        self._pending = set(self._points)
        try:
            with eager(self._model), self._stopping() as result:
                result.append(self._model(*args, **{**self._defaults, **inputs}))
        finally:
            self._batch = None
        if self._pending:
            silent = [str(point) for point in self._points if point in self._pending]
            raise SiteError(
                "a module did not run in the forward",
                where=", ".join(silent[:8]) + (", …" if len(silent) > 8 else ""),
                expected=f"all {len(self._points)} tapped modules to run once",
                found=f"{len(silent)} that did not run",
                remedy="leave it out: the model does not use this module, or calls its weights without the module",
            )
        return result[0] if result else None

    def _register(self, module: nn.Module, point: HookPoint) -> RemovableHandle:
        # The gradient of a part is the part of a gradient: what is cut out for reading is not what the model uses.
        reads = point.whole if point.gradient else point
        if point.side != "input":
            return module.register_forward_hook(
                lambda _, args, output: self._take(point, lambda: reads.from_output(output))
            )
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: self._take(point, lambda: point.from_input(args, kwargs)),
            prepend=True,
            with_kwargs=True,
        )

    def _take(self, point: HookPoint, read: Callable[[], torch.Tensor]) -> None:
        if self._batch is None:
            return
        if point not in self._pending:
            raise SiteError(
                "a module runs more than once in the forward",
                where=str(point),
                expected="one activation for each token",
                remedy="leave it out: layers that share a module cannot be told apart",
            )
        if point.gradient:
            self._await_gradient(point, read())
        else:
            self._feed(point, read(), self._batch)
        self._pending.remove(point)
        if self._stop and not self._pending:
            raise _AllFired(self)

    def _feed(self, point: HookPoint, tensor: torch.Tensor, batch: tuple[int, int]) -> None:
        self._sink(point, point.shaped(tensor, batch) if self._shape else tensor)

    def _await_gradient(self, point: HookPoint, activation: torch.Tensor) -> None:
        if not activation.requires_grad:
            raise SiteError(
                "no gradient flows through an activation whose gradient is asked for",
                where=str(point),
                remedy="leave it out: the model computes it without gradients, or before its embeddings",
            )

        def take(gradient: torch.Tensor) -> None:
            self._gradients[point] = point.part(gradient)

        activation.register_hook(take)

    @contextmanager
    def _stopping(self) -> Iterator[list[Any]]:
        result: list[Any] = []
        try:
            yield result
        except _AllFired as signal:
            if signal.points is not self:
                raise

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _AllFired(BaseException):
    """Ends a forward; not an Exception, lest the model's own code catch it."""

    def __init__(self, points: ActivationHooks) -> None:
        super().__init__()
        self.points = points


def accepts(model: nn.Module, keyword: str) -> bool:
    """Whether the forward of *model*, wrappers aside, names *keyword* among its parameters."""
    return keyword in inspect.signature(type(unwrap(model)).forward).parameters


@contextmanager
def activations_only(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through a model, from its embeddings on, and into none of its weights; undone afterwards.

    Raises
    ------
    SiteError
        The model does not say which of its modules embeds the tokens.
    """
    found = embedding(model)
    if found is None:
        raise SiteError(
            "the model does not say which module embeds its tokens, where gradients begin",
            where=type(unwrap(model)).__name__,
            expected="a method get_input_embeddings()",
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = found.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def batch_shape(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many sequences the inputs of a model are, and the tokens of the longest.

    Raises
    ------
    SiteError
        They do not tell.
    """
    pixels = inputs.get(PIXELS)
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and "input_ids" not in inputs:
        return pixels.shape[0], image_tokens(model, pixels)
    candidates = (inputs.get(TARGET), inputs.get("input_ids"), inputs.get("inputs_embeds"), *args, *inputs.values())
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            return value.shape[0], value.shape[1]
    raise SiteError(
        "the inputs do not tell how many tokens they are",
        expected="a tensor of shape (batch, sequence, …)",
        found=f"{len(args)} positional inputs, keywords {', '.join(inputs) or 'none'}",
    )


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run as written; nothing is imported where nothing is compiled.

    Hooks on a module that was compiled before are not seen by its guards (torch's ``skip_nnmodule_hook_guards``).
    """
    if "torch._dynamo" not in sys.modules or not any(_compiled(module) for module in model.modules()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _compiled(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
