"""What transformers does with an exported model beside greedy text: beams, chunks, training, half precision, refusals.

Runs in the process of ``remote_reader.py``, without linear_moe. Each function gets a folder, whose model has two mixers
with what layers share, short convolutions, softmax attention and experts, and raises where something is wrong.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.dynamic_module_utils import get_imports, get_relative_import_files


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def some_tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 127, (rows, length), generator=torch.Generator().manual_seed(3))


def a_state_does_not_grow(folder: Path) -> None:
    model, ids = opened(folder), some_tokens(1, 40)
    sizes = []
    for length in (10, 40):
        cache = model(ids[:, :length], use_cache=True).past_key_values
        linear = [entry for entry in cache.layers if type(entry).__name__ == "MixerCacheLayer"]
        assert 0 < len(linear) < len(cache.layers)
        sizes.append(sum(x.numel() for entry in linear for x in entry.state.memory))
        assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1]
    assert cache.memory_size() > 4 * sizes[1]


def beams_carry_their_states(folder: Path) -> None:
    """With a cache, beams find what they find without."""
    model, ids = opened(folder), some_tokens()
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    kept, again = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert kept.equal(again)


def rows_are_chosen_and_repeated(folder: Path) -> None:
    model, ids = opened(folder), some_tokens(3)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = ids[[2, 2, 0, 0]]
    found = model(rows[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(rows).logits[:, 6:], rtol=0, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0


def generate_goes_on_from_a_cache(folder: Path) -> None:
    """It reads what the cache has not, and leaves the cache with what it read."""
    model, ids = opened(folder), some_tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cache = model(ids[:, :6], use_cache=True).past_key_values
    kept = model.generate(ids, past_key_values=cache, **options)
    assert kept.equal(model.generate(ids, **options))
    assert cache.get_seq_length() == ids.shape[1] + 3  # the last token is not read


def any_column_may_be_padding(folder: Path) -> None:
    """Holes in the middle, a row without tokens in the first call, and a call without tokens."""
    model, ids = opened(folder), some_tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    mask[1, 3:4] = 0
    mask[:, 5:7] = 0
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    model(ids[:, 5:7], attention_mask=mask[:, :7], past_key_values=cache)
    found = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    for row in range(2):
        real = mask[row].bool()
        alone = model(ids[row][real][None]).logits[0]
        last = int(real[7:].sum())
        torch.testing.assert_close(found[row][real[7:]], alone[-last:], rtol=0, atol=1e-4)


def documents_in_a_row_are_read_alone(folder: Path) -> None:
    """As TRL and transformers pack them: positions start again, and there is no mask."""
    model, ids = opened(folder), some_tokens(2, 10)
    places = torch.tensor([[*range(4), *range(6)], [*range(10)]])
    logits = model(ids, position_ids=places).logits
    alone = [model(part).logits for part in (ids[:1, :4], ids[:1, 4:], ids[1:])]
    torch.testing.assert_close(logits[:1], torch.cat(alone[:2], dim=1), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1:], alone[2], rtol=0, atol=1e-4)


def scores_do_not_depend_on_the_batch(folder: Path) -> None:
    """Log-likelihoods of texts alone, and in batches padded left or right: the same order, to the printed digits."""
    model = opened(folder)
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(1, 127, (int(n),), generator=generator) for n in torch.arange(32) % 19 + 2]
    alone = torch.stack([_scores(model, [text], left=True)[0] for text in texts])
    for left in (True, False):
        for size in (5, 16):
            batches = [texts[i : i + size] for i in range(0, len(texts), size)]
            found = torch.cat([_scores(model, batch, left) for batch in batches])
            torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-4)
            assert found.argsort().equal(alone.argsort())


def _scores(model: Any, texts: list[torch.Tensor], left: bool) -> torch.Tensor:
    longest = max(map(len, texts))
    rows = [(longest - len(text), 0) if left else (0, longest - len(text)) for text in texts]
    ids = torch.stack([F.pad(text, pads) for text, pads in zip(texts, rows, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(t), pads) for t, pads in zip(texts, rows, strict=True)])
    with torch.no_grad():
        log_p = model(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    of_tokens = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (of_tokens * mask[:, :-1] * mask[:, 1:]).sum(1)


def it_trains(folder: Path) -> None:
    """Loss and gradients, the same with checkpointed layers, and the same for padded rows."""
    ids = some_tokens()
    gradients = []
    for checkpointed in (False, True):
        model = opened(folder).train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        loss = model(ids, labels=ids).loss
        loss.backward()
        missing = [name for name, x in model.named_parameters() if x.grad is None]
        assert not missing, missing
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids[:, :4]), torch.ones_like(ids)], dim=1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 4] = -100  # nothing comes before the first token of a row
    again = model(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)


def it_trains_under_autocast(folder: Path) -> None:
    """As Trainer does with ``bf16=True``: weights in float32, matrix products in bfloat16."""
    ids = some_tokens()
    for name in (folder.name, "mamba2", "mom_gla", "rwkv6"):
        model = opened(folder.parent / name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids, labels=ids)
            model.generate(ids, max_new_tokens=2, pad_token_id=0)
        out.loss.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters()), name
        exact = model(ids).logits
        assert (out.logits.float() - exact).abs().mean() < 0.1 * exact.abs().mean(), name


def half_precision_keeps_what_must_be_float32(folder: Path) -> None:
    model, ids = opened(folder, dtype=torch.bfloat16), some_tokens()
    kept = {name for name, x in model.named_parameters() if x.dtype == torch.float32}
    endings = ("mixer.A_log", "mixer.dt_bias", "tables.hgrn2.lower_bounds", "mixer.D")
    wanted = {name for name, _ in model.named_parameters() if name.endswith(endings)}
    assert kept == wanted and wanted, (kept, wanted)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    exact = opened(folder)(ids).logits
    assert (logits.float() - exact).abs().mean() < 0.15 * exact.abs().mean()


def a_new_model_starts(folder: Path) -> None:
    """From its config alone, with finite logits and a loss near that of guessing."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)  # a router's 256 weights are far from zero on average in one start of a hundred
    model, ids = AutoModelForCausalLM.from_config(config, trust_remote_code=True), some_tokens(4, 30)
    loss = model(ids, labels=ids).loss.item()
    assert abs(loss - torch.tensor(128.0).log().item()) < 0.5, loss
    first = model.model.layers[0].mixer  # RWKV7's own start
    assert first.o_proj.weight.eq(0).all() and first.x_r.ne(0).any() and first.norm_weight.lt(1).all()
    endings = (
        "embed_tokens.weight",
        "self_attn.q_proj.weight",
        "mlp.gate.weight",
        "gate_up_proj",
        "down_proj",
    )
    random = {name: x for name, x in model.named_parameters() if name.endswith(endings)}
    assert {ending for ending in endings if any(name.endswith(ending) for name in random)} == set(endings)
    for name, x in random.items():
        size = config.initializer_range
        assert 0.8 * size < x.std() < 1.2 * size and abs(x.mean()) < 0.2 * size, name


def hidden_states_are_returned(folder: Path) -> None:
    model = opened(folder, attn_implementation="eager")
    out = model(some_tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(model.model.layers) + 1
    assert len(out.attentions) == model.config.layer_kinds.count("softmax")
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(()))


def every_file_needs_torch_and_transformers_only(folder: Path) -> None:
    """As transformers reads it: it asks for every package that a file imports outside of a try."""
    files = sorted(folder.glob("*.py"))
    wanted = {name for file in files for name in get_imports(file)} - sys.stdlib_module_names
    assert wanted == {"torch", "transformers"}, wanted
    reached = {Path(name).name for name in get_relative_import_files(folder / "modeling_linear_moe.py")}
    assert reached == {file.name for file in files} - {"modeling_linear_moe.py"}


def folders_of_one_name_are_two_models(folder: Path) -> None:
    """``a/hf/iter_0000100`` and ``b/hf/iter_0000100``, of other mixers, in one process."""
    for mixer in ("gla", "deltanet"):
        model = opened(Path(shutil.copytree(folder.parent / mixer, folder.parent / f"of {mixer}" / "model")))
        assert model(some_tokens()).logits.equal(opened(folder.parent / mixer)(some_tokens()).logits)


def it_refuses(folder: Path) -> None:
    model, ids = opened(folder), some_tokens()
    cache = model(ids, use_cache=True).past_key_values
    config = type(model.config)
    refused: dict[str, Callable[[], Any]] = {
        "cannot be taken back from the memory": lambda: cache.crop(-1),
        "past_key_values is a DynamicCache\n": lambda: model(ids, past_key_values=DynamicCache()),
        "past_key_values is a DynamicCache": lambda: model.generate(ids, past_key_values=DynamicCache()),
        "does not hold the states": lambda: model.generate(
            ids, cache_implementation="static", max_new_tokens=2
        ),
        "assisted generation is not supported": lambda: model.generate(
            ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=2
        ),
        "attention_mask has shape [2, 1, 9, 9]": lambda: model(ids, attention_mask=torch.ones(2, 1, 9, 9)),
        "attention_mask has shape [2, 8]": lambda: model(ids, attention_mask=torch.ones(2, 8)),
        "attention_mask has shape [1, 9]": lambda: model(ids, attention_mask=torch.ones(1, 9)),
        "give input_ids or inputs_embeds": lambda: model(),
        "mixers lacks gla": lambda: config(num_hidden_layers=1, layer_kinds=["gla"]),
        "layer_kinds names 1 of 2 layers": lambda: config(num_hidden_layers=2, layer_kinds=["softmax"]),
        "cannot share 3 key heads": lambda: config(num_attention_heads=4, num_key_value_heads=3),
        "num_experts_per_tok is 9": lambda: config(
            num_experts=8, num_experts_per_tok=9, moe_intermediate_size=4
        ),
        "router_score is 'tanh'": lambda: config(router_score="tanh"),
        "moe_layers says 1 of 2 layers": lambda: config(num_hidden_layers=2, moe_layers=[False]),
        "layers with experts, but num_experts None": lambda: config(
            num_hidden_layers=2, moe_layers=[True, False]
        ),
        "layers with experts, but num_experts 8 of width None": lambda: config(num_experts=8),
        "latent attention with": lambda: config(kv_lora_rank=8, qk_nope_head_dim=8, v_head_dim=8),
    }
    experts = {"num_experts": 8, "moe_intermediate_size": 4, "num_experts_per_tok": 3}
    config(**experts, router_groups=4, router_topk_groups=2)
    config(**experts, router_groups=4, router_topk_groups=4)
    for groups, chosen in ((3, 2), (4, 5), (4, 1), (4, None), (0, 1)):
        text = f"router_groups {groups}, router_topk_groups {chosen}"
        other = {"router_groups": groups, "router_topk_groups": chosen}
        refused[text] = lambda other=other: config(**experts, **other)
    for text, attempt in refused.items():
        try:
            attempt()
        except ValueError as error:
            assert text in str(error), (text, str(error))
        else:
            raise AssertionError(f"nothing refused: {text}")


def fused_kernels_that_are_not_there_are_a_warning(folder: Path) -> None:
    """One for each operation: chunked torch computes it."""
    model, ids = opened(folder), some_tokens()
    before, texts = model(ids).logits, []
    for _ in range(2):
        with (
            warnings.catch_warnings(record=True) as caught,
            patch.dict(os.environ, LINEAR_MOE_KERNELS="triton"),
        ):
            warnings.simplefilter("always")
            assert model(ids).logits.equal(before)
        texts.append([str(warning.message) for warning in caught])
    assert any(text.startswith("delta_rule has no fused kernel here (it comes with") for text in texts[0]), (
        texts
    )
    assert len({text.split()[0] for text in texts[0]}) == len(texts[0]) and not texts[1], texts


def without_experts_it_is_one_graph(folder: Path) -> None:
    """``torch.export``, which traces as ``torch.compile`` does with ``fullgraph=True``."""
    model, ids = opened(folder.parent / "qwen2_dense").eval(), some_tokens()
    with torch.no_grad():
        graph = torch.export.export(model, (ids,), {"use_cache": False}, strict=True).module()
        assert graph(ids, use_cache=False).logits.equal(model(ids, use_cache=False).logits)


def installed_kernels_are_used(folder: Path) -> None:
    """Where linear_moe can be imported, its kernels compute: comes last, since it lets it in."""
    sys.modules.pop("linear_moe", None)
    sys.path.append(str(Path(__file__).parents[2]))
    copy = folder.parent / "with_linear_moe"
    shutil.copytree(folder, copy)
    model, before = opened(copy), opened(folder)
    ours, own = (sys.modules[f"{type(x).__module__.rpartition('.')[0]}.kernels"] for x in (model, before))
    assert ours.delta_rule.__module__ == "linear_moe.kernels.ops", ours.delta_rule.__module__
    assert own.delta_rule.__module__.startswith("transformers_modules."), own.delta_rule.__module__
    torch.testing.assert_close(model(some_tokens()).logits, before(some_tokens()).logits, rtol=0, atol=1e-4)


BEHAVIOURS = [
    a_state_does_not_grow,
    beams_carry_their_states,
    rows_are_chosen_and_repeated,
    generate_goes_on_from_a_cache,
    any_column_may_be_padding,
    documents_in_a_row_are_read_alone,
    scores_do_not_depend_on_the_batch,
    it_trains,
    it_trains_under_autocast,
    half_precision_keeps_what_must_be_float32,
    a_new_model_starts,
    hidden_states_are_returned,
    every_file_needs_torch_and_transformers_only,
    folders_of_one_name_are_two_models,
    it_refuses,
    fused_kernels_that_are_not_there_are_a_warning,
    without_experts_it_is_one_graph,
    installed_kernels_are_used,
]
