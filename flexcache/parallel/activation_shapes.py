"""The whole shapes of a model's activations, learned by running a copy of it on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from flexcache.parallel.header import ActivationKey
from flexcache.parallel.meta_model import BatchExtent, LearnedShapes, MetaModel, Shape, ShapeProbe, batch_extent


class ActivationShapes:
    """Shapes of activations as functions of the batch, learned on the meta device when they are first needed.

    Attributes
    ----------
    extent : BatchExtent
        Rows and length of the batch of the current forward.
    """

    def __init__(self) -> None:
        self.extent = BatchExtent(1, 1)
        self._inputs: tuple[nn.Module, tuple[Any, ...] | None, Mapping[str, Any]] | None = None
        self._models: dict[int, MetaModel] = {}
        self._learned: dict[int, LearnedShapes] = {}
        self._failures: dict[int, str] = {}

    def keep_inputs(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the inputs of the forward that begins; shapes are learned from them."""
        self._inputs = root, args, kwargs
        self.extent = batch_extent(args, kwargs)

    def drop_inputs(self) -> None:
        """Release the inputs; the root and the extent stay, for modules that run again in the backward pass."""
        if self._inputs is not None:
            self._inputs = self._inputs[0], None, {}

    def find_shape(self, key: ActivationKey, probes: Callable[[], Iterable[ShapeProbe]]) -> tuple[Shape | None, str]:
        """Return the shape of an activation; if it is not known, None and the reason."""
        if self._inputs is None:
            return None, "the module runs outside of the model's forward"
        root, args, kwargs = self._inputs
        number = id(root)
        learned = self._learned.get(number)
        stale = learned is None or not learned.covers(self.extent) or key.hook not in learned.shapes
        if stale and args is not None and number not in self._failures:
            try:
                if number not in self._models:
                    self._models[number] = MetaModel(root)
                learned = self._learned[number] = self._models[number].learn_shapes(probes(), args, kwargs)
            except Exception as error:
                first = (str(error) or type(error).__name__).strip().splitlines()[0]
                self._failures[number] = f"the model does not run on the meta device: {first}"
        if learned is None or not learned.covers(self.extent):
            return None, self._failures.get(number, "")
        runs = learned.shapes.get(key.hook, [])
        if key.call >= len(runs):
            return None, "on the meta device the module did not run, or its shape follows from neither rows nor length"
        return runs[key.call], ""

    @property
    def known_for_any_batch(self) -> bool:
        """True if the shapes of the current root hold for any number of rows."""
        assert self._inputs is not None
        learned = self._learned.get(id(self._inputs[0]))
        return learned is not None and learned.any_batch
