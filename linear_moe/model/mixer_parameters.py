"""The parameters in a mixer's tables as Megatron parameters: sharded, replicated or shared by the whole model.

Per-head parameters are sharded with the heads; those that all heads share are replicated, and their gradients summed
over tensor-parallel ranks, with and without sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from linear_moe.lsm import Parameter
from linear_moe.model.config import LinearMoEConfig
from linear_moe.model.mixer_projections import empty


class TableModule(MegatronModule):
    """A module that owns the parameters of some tables."""

    def __init__(self, config: LinearMoEConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.tables: tuple[Parameter, ...] = ()

    def create(self, tables: Sequence[Parameter]) -> None:
        """Register and fill a parameter for each table."""
        self.tables = tuple(tables)
        for table in self.tables:
            self.register_parameter(table.name, self._filled(table))

    def _filled(self, table: Parameter) -> torch.nn.Parameter:
        shape = table.shape
        if table.per_head:
            shape = (table.shape[0] // self.tp_group.size(), *table.shape[1:])
        parameter = empty(shape, torch.float32 if table.keep_float32 else self.config.params_dtype)
        init = table.init or self.config.init_method
        if table.per_head:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            with tensor_parallel.get_cuda_rng_tracker().fork():
                init(parameter.data)
        else:
            init(parameter.data)
            # With sequence parallelism Megatron sums the gradients of such parameters over tensor-parallel ranks.
            setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        return parameter

    def _apply(self, fn: Any, recurse: bool = True) -> TableModule:
        """Keep the float32 parameters float32 when the model is cast (Float16Module, ``.bfloat16()``)."""
        names = [table.name for table in self.tables if table.keep_float32]
        exact = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, data in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, shared ones routed so that their gradients are whole."""
        sum_here = self.tp_group.size() > 1 and not self.config.sequence_parallel
        weights = {}
        for table in self.tables:
            weight = getattr(self, table.name)
            if sum_here and not table.per_head:
                # Each rank sees its own heads only: without sequence parallelism nobody else sums this gradient.
                weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
            weights[table.name] = weight
        return weights

    def sharded_tables(self, prefix: str, sharded_offsets: tuple, metadata: dict | None) -> dict[str, Any]:
        """The parameters' part of ``sharded_state_dict``: those per head are sharded on axis 0."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {table.name: getattr(self, table.name) for table in self.tables},
            prefix,
            {table.name: 0 for table in self.tables if table.per_head},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded


class ModelTables(TableModule):
    """Parameters that all layers of a mixer read, one copy on every pipeline stage.

    Args:
        config: the model's config.
        tables: parameters with ``per_model``.
        pg_collection: process groups; ``tp`` is used.
        copy: which copy this is, over pipeline stages and their chunks: 0 counts for the gradient norm and is saved.
    """

    def __init__(
        self,
        config: LinearMoEConfig,
        tables: Sequence[Parameter],
        pg_collection: ProcessGroupCollection,
        copy: int = 0,
    ) -> None:
        super().__init__(config, pg_collection)
        self.copy = copy
        self.create(tables)
        for parameter in self.parameters():
            # Summed over pipeline stages at the end of a step (config.has_cond_embedder), which needs equal slices of
            # it on the ranks of each stage, so a bucket of its own in the distributed optimizer.
            setattr(parameter, "pipeline_parallel", True)  # noqa: B010
            setattr(parameter, "shared_embedding", True)  # noqa: B010
            setattr(parameter, "shared", copy > 0)  # noqa: B010

    def forward(self) -> dict[str, Tensor]:
        """:meth:`weights`; layers that do not own them call this, so that Megatron's hooks know of the use."""
        return self.weights()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One copy is written, every copy reads it."""
        sharded = self.sharded_tables(prefix, sharded_offsets, metadata)
        for tensor in sharded.values():
            _, *rest = tensor.replica_id
            tensor.replica_id = (self.copy, *rest)
        return sharded
