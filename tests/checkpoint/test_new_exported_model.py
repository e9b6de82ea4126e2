"""A model that transformers makes of an exported config alone starts as one of ours does, tensor by tensor."""

import math
from unittest.mock import patch

import torch

from linear_moe import lsm
from tests.inference.models import argv


def started(words, seed):
    """Our model as a training starts it, and its tensors under the names of an exported folder."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.checkpoint.blueprint import blueprint
    from linear_moe.checkpoint.tables import rows
    from linear_moe.model.builder import LinearMoEBuilder
    from tests.workers import leave_model_parallel

    plan = blueprint([*words, "--seed", str(seed)], padded_vocab_size=128)
    plan.config.transformer.perform_initialization = True
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(plan.config).build_model(groups, pre_process=True, post_process=True)
    ours = {name: tensor.detach() for name, tensor in model.named_parameters()}
    table, unknown = rows("linear_moe", plan.shape(128), {name: tuple(x.shape) for name, x in ours.items()})
    assert not unknown
    found = {}
    for row in table:
        found |= zip(row.names, row.transform.to_theirs(ours[row.key]), strict=True)
    leave_model_parallel()
    return plan.config, found


def differences(rank, world):
    from linear_moe.checkpoint.remote import hf_config
    from linear_moe.checkpoint.remote.model.configuration_linear_moe import LinearMoeConfig
    from linear_moe.checkpoint.remote.model.modeling_linear_moe import LinearMoeForCausalLM

    words = argv([*lsm.names(), *lsm.names(), "softmax"], moe=False)
    (config, ours), (_, again) = started(words, 1), started(words, 2)
    torch.manual_seed(3)
    empty = torch.empty
    with patch.object(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(math.nan)):
        model = LinearMoeForCausalLM(LinearMoeConfig(**hf_config(config, vocab_size=128, dtype="float32")))
    theirs = {name: tensor.detach() for name, tensor in model.named_parameters()}
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    wrong, fixed = [], 0
    for name, tensor in ours.items():
        x, y = tensor.double(), theirs[name].double()
        if tensor.equal(again[name]):
            fixed += 1
            same = torch.allclose(x, y, rtol=1e-5, atol=1e-6)
        elif len(tensor.flatten()) < 50:
            same = not y.equal(x) and y.unique().numel() > 1
        else:
            # Megatron makes output projections smaller by the depth; the classes of transformers do not
            size = 0.02 if name.endswith(("down_proj.weight", "o_proj.weight")) else x.std().item()
            chance = 6 / tensor.numel() ** 0.5
            same = bool((x.mean() - y.mean()).abs() < chance * size)
            same = same and abs(y.std().item() / size - 1) < max(chance, 0.05)
        if not same:
            wrong.append(f"{name}: {x.mean():.4f} +- {x.std():.4f}, {y.mean():.4f} +- {y.std():.4f}")
    return wrong, fixed, len(ours)


def test_a_new_model_starts_as_ours(gloo):
    wrong, fixed, count = gloo(1, differences)[0]
    assert wrong == []
    assert 100 < fixed < count
