"""What is counted and measured, as plans of the launcher: without torch or Megatron, so that mistakes show at once."""

from __future__ import annotations

from linear_moe.launch.environment import RunSettings
from linear_moe.launch.plan import RunPlan, plan_run
from linear_moe.model.families import FAMILIES


def plan_model(
    family: str,
    size: str | None = None,
    la_module: str | None = None,
    layer_type_list: str | None = None,
    extra_args: str = "",
    mixer_modules: str | None = None,
) -> RunPlan:
    """The plan of a model: without a mixer the family as it was published, softmax or its mixer everywhere.

    Raises:
        ValueError: an unknown family, size or mixer, or a pattern that does not fit.
    """
    if la_module is None and family in FAMILIES:
        la_module = FAMILIES[family].mixer
    if la_module is None and layer_type_list is None:
        layer_type_list = "N"
    settings = RunSettings(
        base_model=family,
        model_size=size,
        la_module=la_module or "",
        layer_type_list=layer_type_list,
        extra_args=extra_args,
        mixer_modules=mixer_modules,
    )
    return plan_run(settings, cuda_devices=0)
