"""What conversions print: the table of origins, and the differences between two models."""

from linear_moe.checkpoint.origins import Origin, origin_counts, origin_table
from linear_moe.checkpoint.report import differences


def origins() -> list[Origin]:
    """Of a model of eight layers, the fourth and the last of which stay softmax."""
    found: dict[str, Origin] = {}
    Origin.note(found, "embedding.word_embeddings.weight", "carried", "model.embed_tokens.weight")
    for layer in range(8):
        prefix, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        Origin.note(found, f"{prefix}input_layernorm.weight", "carried", f"{theirs}input_layernorm.weight")
        if layer in (3, 7):
            Origin.note(
                found, f"{prefix}self_attention.linear_proj.weight", "carried", f"{theirs}o_proj.weight"
            )
        else:
            Origin.note(found, f"{prefix}self_attention.conv_weight", "started", "each token through")
        for expert in range(2):
            key = f"{prefix}mlp.experts.experts.linear_fc2.weight"
            Origin.note(found, key, "carried", f"{theirs}mlp.experts.{expert}.down_proj.weight")
    return list(found.values())


def test_the_table_of_origins():
    lines = [line.split("  ") for line in origin_table(origins(), 8).splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["tensor", "layers", "from"],
        ["embedding.word_embeddings.weight", "carried", "model.embed_tokens.weight"],
        ["input_layernorm.weight", "all", "carried", "model.layers.*.input_layernorm.weight"],
        ["self_attention.conv_weight", "0-2 4-6", "started", "each token through"],
        [
            "mlp.experts.experts.linear_fc2.weight",
            *("all", "carried", "model.layers.*.mlp.experts.*.down_proj.weight"),
        ],
        ["self_attention.linear_proj.weight", "3 7", "carried", "model.layers.*.o_proj.weight"],
    ]
    starts = [line.index("model.layers.*") for line in origin_table(origins(), 8).splitlines() if "*" in line]
    assert len(set(starts)) == 1, "the columns stand below each other"
    (alone,) = origin_table(origins()[1:2], 9).splitlines()[1:]
    assert "0-7" in alone, "a layer is missing"


def test_the_number_of_tensors_of_each_origin():
    assert origin_counts(origins()) == "tensors: 27 carried, 6 started"


def test_differences_are_told_by_group():
    """Several that differ in numbers by a pattern, and how many; one by its name."""
    expected = {f"layers.{i}.weight": (2, 3) for i in range(3)} | {"norm.weight": (3,), "head": (4, 3)}
    found = {
        "layers.1.weight": (3, 2),
        "norm.weight": (3,),
        "head": (5, 3),
        "mtp.0.fc": (1,),
        "x.inv_freq": (2,),
    }
    assert differences(expected, found, ignored=[r"inv_freq$"]).splitlines() == [
        "    missing: layers.*.weight [2, 3] (2 tensors, the first is layers.0.weight)",
        "    not known: mtp.0.fc [1]",
        "    wrong shape: layers.1.weight expected [2, 3], found [3, 2]",
        "    wrong shape: head expected [4, 3], found [5, 3]",
    ]
    assert differences(expected, expected) == ""
