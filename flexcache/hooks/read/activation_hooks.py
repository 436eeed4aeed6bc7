"""Hooks that read activations from a running model, and are always removed."""

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
from flexcache.hooks.locate.encoder_decoder import DECODER_INPUT_IDS, get_token_embedding, run_encoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.hook_scope import EarlyStop, hook_scope, stopped_by
from flexcache.hooks.locate.names import modules_by_path, unwrap_adapter, unwrap_model
from flexcache.hooks.locate.vision import PIXEL_VALUES, count_image_tokens

Sink = Callable[[HookPoint, torch.Tensor], None]


class ActivationHooks:
    """Hooks on the modules of *points*, and a forward that passes each activation to *sink*.

    Use it as a context manager: the hooks are registered on entry and removed on exit. In each `forward`,
    ``sink(point, tensor)`` is called once for each hook point, in the order in which the modules run. The tensor has
    shape (batch, sequence, feature…) and is the one that the model itself uses next, so a sink must not change it, and
    must copy what it keeps before it returns: some models (Falcon) add to it in place.

    The hooks run outside all other hooks of a module: they read the values that the code around the module passes and
    receives. A model that is compiled on entry runs uncompiled, since hooks registered after compilation would never
    fire. Forwards of the model that do not go through `forward` are not read. Not thread-safe.

    >>> import torch
    >>> model, shapes = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), []
    >>> points = (HookPoint("hidden", None, "0"),)
    >>> with ActivationHooks(model, points, lambda point, tensor: shapes.append(tuple(tensor.shape))) as hooks:
    ...     _ = hooks.forward(torch.zeros(2, 3, 4))
    >>> shapes
    [(2, 3, 8)]

    Parameters
    ----------
    stop
        End the forward when all points have been read, so that later blocks and the head are never computed. A module
        that would run a second time after that is not noticed; `measure` runs to the end and raises for it.
    shape
        Pass tensors of shape (batch, sequence, feature…) to the sink. If False, pass what the module passes: in a
        distributed model this may be a shard, or a DTensor.

    Raises
    ------
    SiteError
        On entry: the module of a point is not in the model.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[HookPoint], sink: Sink, stop: bool = True, shape: bool = True
    ) -> None:
        self._model = model
        self._points = tuple(dict.fromkeys(points))
        self._sink = sink
        self._stop = stop
        self._shape = shape
        self._scope: AbstractContextManager[None] | None = None
        self._pending: set[HookPoint] = set()
        self._batch: tuple[int, int] | None = None
        self._gradients: dict[HookPoint, torch.Tensor] = {}
        self._defaults = {"use_cache": False} if accepts_keyword(model, "use_cache") else {}
        self._compiled = False

    def __enter__(self) -> Self:
        self._compiled = has_compiled(self._model)
        scope = hook_scope(self._register_hooks())
        scope.__enter__()
        self._scope = scope
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.__exit__(None, None, None)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model once, without gradients and without a KV cache.

        If ``decoder_input_ids`` are given, the encoder runs first, without hooks, and the tokens are those that the
        decoder reads. A compiled model runs uncompiled, since hooks registered after compilation would never fire.

        Returns
        -------
        The model's output, or None if the forward was ended early.

        Raises
        ------
        SiteError
            A module ran twice or not at all, or does not pass one activation for each token.
        """
        with torch.no_grad():
            return self._run(args, inputs)

    def differentiate(self, objective: Callable[[Any], torch.Tensor], *args: Any, **inputs: Any) -> torch.Tensor:
        """Run the model to its end, then backpropagate the sum of *objective* of its output.

        The sink receives activations during the forward, then gradients in the order of their points. A gradient is
        the total derivative with respect to the tensor that the model uses at the point. Call it within
        `activations_only`.

        Returns
        -------
        The values of *objective*, detached.

        Raises
        ------
        SiteError
            The objective is not finite, or does not depend on an activation; and all errors of `forward`.
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
                    self._feed_sink(point, self._gradients[point], batch)
            return value.detach()
        finally:
            self._gradients = {}

    @contextmanager
    def follow(self, module: nn.Module, on_begin: Callable[[int, int], None]) -> Iterator[None]:
        """Read every forward of *module* that other code makes in the context, such as the steps of ``generate()``.

        *module* is the model inside its wrappers, on which that code runs. SiteError as of `forward`.

        Parameters
        ----------
        on_begin
            Called before each forward with its sequences and tokens.
        """

        def begin(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            self._batch = batch_shape(self._model, args, inputs)
            self._pending = set(self._points)
            on_begin(*self._batch)

        def end(*_: Any) -> None:
            self._batch = None
            self._check_read()

        handles = (
            register
            for register in (
                module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
                module.register_forward_hook(end),
            )
        )
        try:
            with uncompiled(self._model), hook_scope(handles):
                yield
        finally:
            self._batch = None

    def _run(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        if self._scope is None and self._points:
            raise SiteError(
                "the hooks are not registered",
                remedy="use them as: with ActivationHooks(model, points, sink) as points: …",
            )
        with self._uncompiled():
            inputs = run_encoder(self._model, inputs)
        self._batch = batch_shape(self._model, args, inputs)
        self._pending = set(self._points)
        result = None
        try:
            with self._uncompiled(), stopped_by(self):
                result = self._model(*args, **{**self._defaults, **inputs})
        finally:
            self._batch = None
        self._check_read()
        return result

    def _uncompiled(self) -> AbstractContextManager[Any]:
        # Blocks are looked at once, on entry: that takes longer than all hooks of a forward.
        return eager(self._compiled or _is_compiled(self._model))

    def _check_read(self) -> None:
        if self._pending:
            silent = [str(point) for point in self._points if point in self._pending]
            raise SiteError(
                "a module did not run in the forward",
                where=", ".join(silent[:8]) + (", …" if len(silent) > 8 else ""),
                expected=f"all {len(self._points)} hooked modules to run once",
                found=f"{len(silent)} that did not run",
                remedy="leave it out: the model does not use this module, or uses its weights without calling it",
            )

    def _register_hooks(self) -> Iterator[RemovableHandle]:
        named = modules_by_path(self._model)
        for point in self._points:
            if point.module not in named:
                raise SiteError(f"the model has no module {point.module!r}", where=str(point))
            yield self._register(named[point.module], point)

    def _register(self, module: nn.Module, point: HookPoint) -> RemovableHandle:
        # The model uses the whole tensor, not the slice that is read, so a gradient is taken of the whole and sliced.
        reads = point.all_features if point.gradient else point
        if point.side != "input":
            return module.register_forward_hook(
                lambda _, args, kwargs, output: self._read(point, lambda: reads.read(module, args, kwargs, output)),
                with_kwargs=True,
            )
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: self._read(point, lambda: point.read_input(args, kwargs)),
            prepend=True,
            with_kwargs=True,
        )

    def _read(self, point: HookPoint, read: Callable[[], torch.Tensor]) -> None:
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
            self._feed_sink(point, read(), self._batch)
        self._pending.remove(point)
        if self._stop and not self._pending:
            raise EarlyStop(self)

    def _feed_sink(self, point: HookPoint, tensor: torch.Tensor, batch: tuple[int, int]) -> None:
        self._sink(point, point.reshape_to_tokens(tensor, batch) if self._shape else tensor)

    def _await_gradient(self, point: HookPoint, activation: torch.Tensor) -> None:
        if not activation.requires_grad:
            raise SiteError(
                "no gradient flows through an activation whose gradient is asked for",
                where=str(point),
                remedy="leave it out: the model computes it without gradients, or before its embeddings",
            )

        def keep(gradient: torch.Tensor) -> None:
            self._gradients[point] = point.select_features(gradient)

        activation.register_hook(keep)


def accepts_keyword(model: nn.Module, keyword: str) -> bool:
    """Return True if the forward of the unwrapped model, or of the model in a PeftModel, has a parameter *keyword*."""
    root: Any = unwrap_model(model)
    own_cache = getattr(getattr(root, "active_peft_config", None), "is_prompt_learning", False)
    return keyword in inspect.signature(type(root if own_cache else unwrap_adapter(root)).forward).parameters


@contextmanager
def activations_only(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through the activations of a model, from its embeddings on, but into none of its weights.

    Raises
    ------
    SiteError
        The model does not state which of its modules embeds the tokens.
    """
    found = get_token_embedding(model)
    if found is None:
        raise SiteError(
            "the model does not state which module embeds its tokens, where gradients begin",
            where=type(unwrap_model(model)).__name__,
            expected="a method get_input_embeddings()",
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with hook_scope([found.register_forward_hook(lambda _, args, output: output.requires_grad_())]):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def batch_shape(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of sequences in the inputs of a model, and the number of tokens of the longest.

    Raises
    ------
    SiteError
        No input has these dims.
    """
    pixels = inputs.get(PIXEL_VALUES)
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and "input_ids" not in inputs:
        return pixels.shape[0], count_image_tokens(model, pixels)
    candidates = (
        inputs.get(DECODER_INPUT_IDS),
        inputs.get("input_ids"),
        inputs.get("inputs_embeds"),
        *args,
        *inputs.values(),
    )
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            return value.shape[0], value.shape[1]
    raise SiteError(
        "the number of tokens in the inputs is not known",
        expected="a tensor of shape (batch, sequence, …)",
        found=f"{len(args)} positional inputs, keywords {', '.join(inputs) or 'none'}",
    )


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run uncompiled.

    The guards of a compiled module do not notice hooks that are registered later (torch's
    ``skip_nnmodule_hook_guards``). Nothing is imported if nothing is compiled.
    """
    return eager(has_compiled(model))


def eager(compiled: bool) -> AbstractContextManager[Any]:
    """Return a context in which compiled code is not used, or one that does nothing if nothing is *compiled*."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def has_compiled(model: nn.Module) -> bool:
    """Return True if a module of a model is compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    seen: set[nn.Module] = set()
    left: list[nn.Module | None] = [model]
    while left:  # not by modules(), which builds names and takes ten times as long
        module = left.pop()
        if module is None or module in seen:
            continue
        if _is_compiled(module):
            return True
        seen.add(module)
        left.extend(module._modules.values())
    return False


def _is_compiled(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
