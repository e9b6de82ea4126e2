"""From and to Hugging Face: import, export, and the mapping tables that both read. Importing this imports no torch.

    importing.py    Hugging Face -> run folder
    exporting.py    run folder -> Hugging Face
    linearise.py    layers that get another mixer on the way in
    remote/         the code of exported folders that no class of transformers fits
    tables.py       one table per family: our checkpoint keys <-> Hugging Face names; transforms.py: exact both ways
    parts.py        tensors of Hugging Face that are parts of several of ours
    hf_config.py    config.json -> family and size; native.py: the way back;
                    mamba2.py qwen3_next.py: layers of a type; rope.py: rotary positions
    options.py      the command line that such a model is trained with
    blueprint.py    what the checkpoint of a model holds, asked of the model itself
    torch_dist.py   Megatron's checkpoint format, read by region and written tensor by tensor
    hf_folder.py    safetensors, read and written tensor by tensor
    folders.py report.py origins.py   complete or not there; one grouped report of differences; the table of origins
    __main__.py     the command line of tools/convert.py

What export calls of ``remote`` (it writes all tensors, ``generation_config.json`` and the tokenizer itself)::

    remote.hf_config(model: LinearMoEModelConfig, *, vocab_size: int, dtype: str) -> dict[str, Any]
        the whole config.json, auto_map and architectures included; may raise ValueError for what it cannot express
    remote.write_code(directory: Path, config: Mapping[str, Any]) -> None
        puts configuration_linear_moe.py, modeling_linear_moe.py and the modules of config's mixers there
    remote.mixer_rows(mixer: Mixer, layer_of_kind: int) -> list[MixerRow]
        every tensor of a mixer by name, with the part of ours that it is: names follow from the mixer's tables

Names of the tensors in a remote folder (D hidden, H heads, G groups, W width of the projection in the mixer's table):

    model.embed_tokens.weight  model.norm.weight  lm_head.weight (absent when embeddings are tied)
    model.layers.{i}.input_layernorm.weight       model.layers.{i}.post_attention_layernorm.weight
    model.layers.{i}.self_attn.{q,k,v,o}_proj.{weight,bias}     softmax layers; latent attention: DeepSeek-V2's names
    model.layers.{i}.mixer.{name}.weight          [H * W, D], each fused or grouped ([G * W, D]) projection of the table
    model.layers.{i}.mixer.{name}.down.weight     [rank, D], and {name}.up.weight [H * W, rank], {name}.up.bias
    model.layers.{i}.mixer.{parameter}            as in the table of parameters, biases (q_bias [H, W]), conv and norm
    model.layers.{i}.mixer.o_proj.weight          [D, H * V]
    model.tables.{mixer}.{parameter}              parameters of the whole model (per_model)
    model.layers.{i}.mlp.{gate,up,down}_proj.weight             dense
    model.layers.{i}.mlp.gate.weight              router [E, D];  mlp.gate.e_score_correction_bias where there is one
    model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight
    model.layers.{i}.mlp.shared_expert.{gate,up,down}_proj.weight    mlp.shared_expert_gate.weight [1, D] where gated
"""
