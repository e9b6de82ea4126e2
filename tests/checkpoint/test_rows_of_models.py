"""Which tensors of another side each of ours comes from: latent attention, mixers by their place, experts, the rest."""

from linear_moe import lsm
from linear_moe.checkpoint.tables import Shape, rows


def shape(kinds: tuple[str, ...]) -> Shape:
    mixers = {}
    for kind in {*kinds} - {"softmax"}:
        config = lsm.get(kind).Config.from_model(
            hidden_size=64, num_heads=4, head_dim=16, layers_of_kind=kinds.count(kind)
        )
        mixers[kind] = lsm.get(kind)(config)
    return Shape(kinds, mixers, groups=4, channels=16, vocab_size=100, padded_vocab_size=128)


def named(
    model_type: str, kinds: tuple[str, ...], *keys: str, size: tuple[int, ...] = (64, 64)
) -> dict[str, list[str]]:
    """Names of the other side by key; unknown keys have none."""
    found, unknown = rows(model_type, shape(kinds), dict.fromkeys(keys, size))
    names: dict[str, list[str]] = {key: [] for key in unknown}
    for row in found:
        names.setdefault(row.key, []).extend(row.names)
    return names


DOWN = "decoder.layers.1.self_attention.linear_kv_down_proj.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def test_latent_attention_of_a_model_that_brings_its_code():
    """Its tensors have the names of DeepSeek-V2's, which a model of one query, key and value for each head has not."""
    kinds = ("gla", "softmax")
    assert named("linear_moe", kinds, DOWN)[DOWN] == ["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert named("linear_moe", kinds, DOWN) == named("deepseek_v2", kinds, DOWN)
    ordinary = named("linear_moe", kinds, QKV)[QKV]
    assert ordinary == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    for model_type in ("qwen2", "llama"):
        assert named(model_type, kinds, DOWN) == {DOWN: []}


def test_layers_come_in_the_order_of_their_numbers():
    keys = [f"decoder.layers.{i}.self_attention.linear_proj.weight" for i in (10, 2, 0, 1)]
    found, _ = rows("llama", shape(("softmax",) * 11), dict.fromkeys(keys, (64, 64)))
    assert [int(row.key.split(".")[2]) for row in found] == [0, 1, 2, 10]


def test_a_mixer_has_the_tensors_of_its_place_among_its_kind():
    """The first layer of rwkv7 takes no values of an earlier one, whatever stands before it."""
    kinds = ("gla", "rwkv7", "gla", "rwkv7")
    mixer = shape(kinds).mixers["rwkv7"]
    first, second = ({p.name for p in mixer.low_rank_projections(layer)} for layer in (0, 1))
    (extra,) = second - first
    keys = [f"decoder.layers.{i}.self_attention.low_rank.{extra}.up.weight" for i in (1, 3)]
    found = named("linear_moe", kinds, *keys)
    assert found[keys[0]] == [] and found[keys[1]][0].startswith("model.layers.3.mixer.")


def test_experts_are_one_tensor_here_and_one_each_there():
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    found, unknown = rows(
        "mixtral", shape(("softmax",)), {key: (3, 64, 64), "decoder.layers.0.surprise": (1,)}
    )
    assert [(row.expert, row.names) for row in found] == [
        (e, tuple(f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight" for name in ("w1", "w3")))
        for e in range(3)
    ]
    assert unknown == ["decoder.layers.0.surprise"]
